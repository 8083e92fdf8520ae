"""Fixtures shared by all tests: one seed, poisoned uninitialised memory, one body of tests for every backend."""

import functools
import os

import devices
import pytest
import torch

BACKENDS = ("reference", "cpu", "triton", "cuda")
DEVICE_BACKENDS = ("triton", "cuda")

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


missing = functools.cache(devices.missing)
SERVED = pytest.StashKey[devices.Served]()


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Serves every operation by one backend for the length of a test, wherever it runs (devices.py).

    Skipped with the reason where it cannot run, and where it turns out to have served nothing of the test. A simulated
    device runs each value of each parameter of a test, all their combinations under `-m ""`, and nothing marked `big`.
    """
    name = request.param
    if reason := missing(name):
        pytest.skip(f"backend {name}: {reason}")
    with devices.running(name), devices.Served().recording() as served:
        request.node.stash[SERVED] = served
        yield name


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    result = yield
    served = item.stash.get(SERVED, None)
    name = served and item.callspec.params["backend"]
    if name in DEVICE_BACKENDS and name not in {backend for _, backend in served.operations}:
        reasons = "; ".join(f"{op}: {reason}" for op, reason in served.reasons.items())
        pytest.skip(f"backend {name} served no operation of this test" + (f" ({reasons})" if reasons else ""))
    return result


def _simulated(item):
    """The backend that a stand-in for a device would run this test on, or None."""
    if "backend" not in getattr(item, "fixturenames", ()) or not hasattr(item, "callspec"):
        return None
    name = item.callspec.params.get("backend")
    return name if name in DEVICE_BACKENDS and devices.simulated(name) else None


def _each_value_once(items):
    """Items of one test that together take every value of every parameter; those with most new values first."""
    values = {item: {(name, repr(value)) for name, value in item.callspec.params.items()} for item in items}
    wanted, chosen = set().union(*values.values()), []
    while wanted or not chosen:
        best = max(items, key=lambda item: len(values[item] & wanted))
        chosen.append(best)
        wanted -= values[best]
    return chosen


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    tests, big = {}, []
    for item in items:
        name = _simulated(item)
        if name and item.get_closest_marker("big"):
            big.append(item)
        elif name:
            tests.setdefault((item.path, item.originalname, item.cls, name), []).append(item)
    for cases in tests.values():
        kept = _each_value_once(cases)
        for item in cases:
            if item not in kept:
                item.add_marker(pytest.mark.slow)
    if big:
        config.hook.pytest_deselected(items=big)
        config.stash[TOO_BIG] = len(big)
        items[:] = [item for item in items if item not in big]


TOO_BIG = pytest.StashKey[int]()


def pytest_terminal_summary(terminalreporter):
    """Name what did not run here, and why: a green run without a backend must not read as a proof of it."""
    reasons = [(name, missing(name)) for name in BACKENDS]
    lines = [f"backend {name} did not run: {reason}" for name, reason in reasons if reason]
    if count := terminalreporter.config.stash.get(TOO_BIG, 0):
        lines.append(f"{count} tests marked big need a device for the backends triton and cuda")
    if not devices.ON_DEVICE:
        lines.append("level 5 (kernels on a device) did not run: torch sees no CUDA or ROCm device")
    terminalreporter.section("backends and levels")
    for line in lines or ["every backend ran"]:
        terminalreporter.write_line(line)
