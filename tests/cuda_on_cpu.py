"""The shipped CUDA library on CPU tensors: its sources compiled for the PTX machine, bound as on a device."""

import sysconfig
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import ptxvm
from ptxvm import build

from peftkern.ops import _cuda

CSRC = Path(__file__).resolve().parents[1] / "csrc"


def missing():
    """Why the library cannot be built for the machine here, or None."""
    if build.nvcc() is None:
        return "no nvcc ($NVCC, the PATH or $CUDA_HOME)"
    if build.compiler() is None:
        return "no C++ compiler (g++ or $CXX)"
    try:
        import pybind11  # noqa: F401
    except ImportError:
        return "no pybind11"
    return None


@cache
def library():
    """`(HostLibrary, module)` of all .cu files of csrc/cuda and bind_cuda.cpp."""
    import pybind11

    include = [CSRC, pybind11.get_include(), sysconfig.get_path("include")]
    host = ptxvm.HostLibrary([*sorted((CSRC / "cuda").glob("*.cu")), CSRC / "bind_cuda.cpp"], include=include)
    return host, host.python_module("_native_cuda")


@contextmanager
def cuda_on_cpu(**options):
    """CUDA C++ backends serve CPU tensors inside the block; yields the machine, whose `launches` have the counts.

    options: those of `ptxvm.Options`, e.g. seed=1 or shared_limit=227 * 1024.
    """
    host, module = library()
    with host.on_cpu(**options) as machine:
        before = _cuda.SIMULATED, _cuda.SIMULATED_LIBRARY
        _cuda.SIMULATED, _cuda.SIMULATED_LIBRARY = True, module
        try:
            yield machine
        finally:
            _cuda.SIMULATED, _cuda.SIMULATED_LIBRARY = before


def run(backend, op, args, **options):
    """The results of an operation of a backend's module as a tuple, and its launches."""
    with cuda_on_cpu(**options) as machine:
        result = getattr(backend, op)(*args)
    return result if isinstance(result, tuple) else (result,), machine.launches


def assert_costs(stated, seen):
    """The kernels of stated launches, those of the library left out, are those seen, to 10 % of bytes and flops."""
    stated = [launch for launch in stated if not launch.kernel.startswith("library")]
    for ours, launch in zip(stated, seen, strict=True):
        counts = launch.counts
        pairs = {"read": (counts.global_bytes_read, ours.read), "written": (counts.global_bytes_written, ours.written)}
        pairs |= {kind: (counts.flops[kind], flops) for kind, flops in ours.flops.items()}
        assert ours.kernel in launch.kernel and ours.blocks == launch.grid[0] * launch.grid[1]
        for what, (counted, formula) in pairs.items():
            assert 0.9 * formula <= counted <= 1.1 * formula, f"{ours.kernel}: {what} {counted}, stated {formula}"
