"""What a dry run has in the place of a device: kernels are compiled, arguments prepared, and nothing is launched."""

from __future__ import annotations

import importlib.util
import re
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

# cudaErrorInsufficientDriver, cudaErrorNoDevice: what a launcher meets last on a machine without a GPU.
_NO_DEVICE = re.compile(r"\(CUDA error (35|100)\)")
SOURCES = Path(__file__).parents[2] / "csrc"
_FIRST_DEVICE = 1 << 21  # Triton keeps compiled kernels per device number


class _TritonDriver:
    """Just enough of a driver for Triton's front end to compile for a target that is not here."""

    utils = None

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return _FIRST_DEVICE + self.arch

    def get_current_stream(self, device=0):
        return 0

    def set_current_device(self, device):
        pass

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_interface(self):
        return torch.cpu

    def map_python_to_cpp_type(self, type_):
        return type_


@contextmanager
def _triton(arch: int, launched: list[str]):
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from peftkern.ops import _triton

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        if hasattr(compiled, "result"):
            compiled = compiled.result()
        if not warmup:
            launched.append(self.fn.__name__)
        return compiled

    run, active, simulated = JITFunction.run, driver._active, _triton.SIMULATED
    driver.set_active(_TritonDriver(arch))
    JITFunction.run, _triton.SIMULATED = compile_only, True
    try:
        yield
    finally:
        JITFunction.run, _triton.SIMULATED = run, simulated
        driver._active = active


class _Library:
    """The shipped CUDA library, whose launchers run as far as they come without a driver."""

    def __init__(self, module, launched: list[str]):
        self._module, self._launched = module, launched

    def __getattr__(self, name):
        function = getattr(self._module, name)

        def launch(*args, **kwargs):
            try:
                result = function(*args, **kwargs)
            except RuntimeError as error:
                if not _NO_DEVICE.search(str(error)):
                    raise
                result = None
            # A launcher returns nothing; what returns something was a question about sizes.
            if result is None:
                self._launched.append(name)
            return result

        return launch


@contextmanager
def _cuda(launched: list[str]):
    from peftkern import _native
    from peftkern.ops import _cuda

    before = _cuda.SIMULATED, _cuda.SIMULATED_LIBRARY
    _cuda.SIMULATED, _cuda.SIMULATED_LIBRARY = True, _Library(_native.cuda()[0], launched)
    try:
        yield
    finally:
        _cuda.SIMULATED, _cuda.SIMULATED_LIBRARY = before


def missing() -> dict[str, str]:
    """Backends that a dry run cannot prepare here, each with the reason."""
    from peftkern import _native

    reasons = {}
    if importlib.util.find_spec("triton") is None:
        reasons["triton"] = "Triton is not installed"
    elif importlib.util.find_spec("peftkern.ops._triton") is None:
        reasons["triton"] = "no Triton kernels are written"
    library, reason = _native.cuda()
    if library is None:
        reasons["cuda"] = reason
    elif not is_current(Path(library.__file__)):
        reasons["cuda"] = "the CUDA library here is older than its sources; run python setup.py build_ext --inplace"
    return reasons


def is_current(library: Path) -> bool:
    """Whether a built library is newer than all native sources."""
    return library.stat().st_mtime > max(path.stat().st_mtime for path in SOURCES.rglob("*") if path.is_file())


@contextmanager
def prepared(arch: int = 90):
    """Inside the block the triton and cuda backends serve CPU tensors up to the launch, and outputs stay unwritten.

    Yields the list of what would have been launched: names of Triton kernels and of the CUDA library's launchers.
    """
    launched: list[str] = []
    absent = missing()
    with ExitStack() as stack:
        if "triton" not in absent:
            stack.enter_context(_triton(arch, launched))
        if "cuda" not in absent:
            stack.enter_context(_cuda(launched))
        yield launched
