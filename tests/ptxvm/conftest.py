"""What these tests need, and the reason for a skip where it's missing."""

import pytest

from . import build

triton_missing = None
try:
    import triton  # noqa: F401
except ImportError:
    triton_missing = "Triton is not installed"


def pytest_collection_modifyitems(items):
    """Every test here needs a C++ compiler; those marked below need nvcc or Triton too."""
    missing = {
        "needs_cxx": None if build.compiler() else "no C++ compiler (g++ or $CXX)",
        "needs_nvcc": None if build.nvcc() else "no nvcc ($NVCC, the PATH or $CUDA_HOME)",
        "needs_triton": triton_missing,
    }
    for item in items:
        if "ptxvm" not in item.path.parts:
            continue
        for name, reason in missing.items():
            if reason and (name == "needs_cxx" or name in getattr(item.module, "NEEDS", ())):
                item.add_marker(pytest.mark.skip(reason=reason))
