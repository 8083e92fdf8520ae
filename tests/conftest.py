"""Fixtures shared by all tests: one seed, poisoned uninitialised memory, one body of tests for every backend."""

import os

import pytest
import torch

from peftkern import dispatch

BACKENDS = ("reference", "cpu")

if os.environ.get("PYTEST_XDIST_WORKER"):
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty returns NaN, so that an output which relies on zeroed memory shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


def why_not(backend, name="rotate"):
    """Why a backend serves no call of an operation on this machine, in dispatch's words; None if it does."""
    with dispatch.use_backend(backend):
        ((_, ok, reason),) = dispatch.operations()[name].explain_static("cpu" if backend == "reference" else backend)
    return None if ok else reason


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Serves every operation by one backend for the length of a test; skipped where it is not built."""
    reason = why_not(request.param)
    if reason:
        pytest.skip(f"backend {request.param}: {reason}")
    with dispatch.use_backend(request.param):
        yield request.param


def pytest_terminal_summary(terminalreporter):
    """Name what did not run here, and why: a green run without a backend must not read as a proof of it."""
    missing = [(name, why_not(name)) for name in dispatch.BACKENDS]
    lines = [f"backend {name} did not run: {reason}" for name, reason in missing if reason]
    if not torch.cuda.is_available():
        lines.append("level 5 (kernels on a device) did not run: torch sees no CUDA or ROCm device")
    terminalreporter.section("backends and levels")
    for line in lines or ["every backend ran"]:
        terminalreporter.write_line(line)
