"""What every Triton backend asks before a launch. Triton itself is imported at the first question, not with peftkern.

SIMULATED: kernels run on CPU tensors (the interpreter, or compiled code on a simulated machine); set by tests only.
"""

import contextlib
import functools
import importlib.util
import os

import torch

SIMULATED = False

_OLDEST = (3, 6)


@functools.cache
def _installed():
    if importlib.util.find_spec("triton") is None:
        return False, "Triton is not installed"
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < _OLDEST:
        wanted = ".".join(map(str, _OLDEST))
        return False, f"needs Triton {wanted} or newer; found {triton.__version__}"
    return True, None


def _device_types():
    types = ["cuda"] if torch.cuda.is_available() else []
    return types + (["xpu"] if hasattr(torch, "xpu") and torch.xpu.is_available() else [])


def available():
    """`(ok, reason)`: Triton is there, and a device it compiles for."""
    ok, reason = _installed()
    if ok and not SIMULATED and not _device_types():
        return False, "torch sees no CUDA, ROCm or XPU device"
    return ok, reason


def serves(*tensors):
    """`(ok, reason)` for the tensors of one call; None among them is skipped."""
    ok, reason = available()
    if not ok:
        return ok, reason
    wanted = ("cpu",) if SIMULATED else ("cuda", "xpu")
    for tensor in tensors:
        if tensor is not None and tensor.device.type not in wanted:
            return False, f"serves {' and '.join(wanted)} tensors; got one on {tensor.device}"
    return True, None


def family():
    """The architecture family of the active target, key of the closed tables of tile sizes.

    sm80 (A100), sm86 (8.6, 8.9 and 12.x: 99 KB of shared memory), sm90, sm100, gfx942 (every AMD target) or generic.
    """
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return "sm80"
    from triton.runtime import driver

    target = driver.active.get_current_target()
    if target.backend == "hip":
        return "gfx942"
    if target.backend != "cuda":
        return "generic"
    if target.arch in (80, 90):
        return f"sm{target.arch}"
    return "sm100" if 100 <= target.arch < 120 else "sm86"


@functools.cache
def _kept_counters(device, _stream, count):
    return torch.zeros(count, dtype=torch.int32, device=device)


def counters(tensor, count):
    """`count` int32 zeros for a kernel that counts its programs and leaves zeros again; kept for each stream."""
    # A graph under capture fills its memory when it is replayed, so it gets zeros of its own.
    if tensor.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=tensor.device)
    return _kept_counters(tensor.device, torch.cuda.current_stream(tensor.device).cuda_stream, count)


def guard(tensor):
    """A context in which the device of the tensor is the current one, as a launch wants it."""
    if tensor.device.type == "cuda":
        return torch.cuda.device(tensor.device)
    if tensor.device.type == "xpu":
        return torch.xpu.device(tensor.device)
    return contextlib.nullcontext()
