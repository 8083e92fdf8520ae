"""What the CUDA C++ backends of all families share: the library, the tensors that it serves, streams and devices."""

import contextlib
import functools

import torch

from peftkern import _native

# Set by tests that run the kernels on CPU tensors (tests/cuda_on_cpu.py): launches then go to SIMULATED_LIBRARY.
SIMULATED = False
SIMULATED_LIBRARY = None

OLDEST = (8, 0)  # mma.sync on bf16 and tf32, cp.async


def library():
    """The native module, or None (`available` says why)."""
    return SIMULATED_LIBRARY if SIMULATED else _native.cuda()[0]


def available():
    """`(ok, reason)`: whether this machine can launch anything."""
    if SIMULATED:
        return True, None
    if torch.version.hip:
        return False, "this torch is built for ROCm, the library for CUDA"
    if not torch.cuda.is_available():
        return False, "torch sees no CUDA device"
    module, reason = _native.cuda()
    return module is not None, reason


@functools.cache
def _device_serves(index):
    capability = torch.cuda.get_device_capability(index)
    if capability < OLDEST:
        seen = ".".join(map(str, capability))
        return False, f"needs compute capability {'.'.join(map(str, OLDEST))} or newer; device {index} has {seen}"
    return True, None


def serves(*tensors):
    """`(ok, reason)` for tensors that a call takes; anything that is no tensor is passed over."""
    ok, reason = available()
    if not ok:
        return ok, reason
    devices = {t.device for t in tensors if isinstance(t, torch.Tensor)}
    wanted = "cpu" if SIMULATED else "cuda"
    if any(d.type != wanted for d in devices):
        return False, f"serves {'CPU tensors under simulation' if SIMULATED else 'CUDA tensors'} only"
    return next((answer for d in devices if not SIMULATED and not (answer := _device_serves(d.index))[0]), (True, None))


def stream(tensor):
    """The current stream of a tensor's device, as the integer that launchers take."""
    return 0 if SIMULATED else torch.cuda.current_stream(tensor.device).cuda_stream


def guard(tensor):
    """Context in which the tensor's device is the current one."""
    if SIMULATED or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


@functools.cache
def _kept_counters(device, _stream, count):
    return torch.zeros(count, dtype=torch.int32, device=device)


def counters(tensor, count):
    """At least `count` int32 zeros for kernels that count their blocks and leave zeros again; one buffer per stream."""
    count = -(-count // 64) * 64
    # A graph under capture fills its memory when it is replayed, so it gets zeros of its own.
    if SIMULATED or torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=tensor.device)
    return _kept_counters(tensor.device, stream(tensor), count)
