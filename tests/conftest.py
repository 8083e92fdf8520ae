"""Fixtures shared by all tests: one seed, poisoned uninitialised memory, one body of tests for every backend."""

import functools
import os

import devices
import levels
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
    try:
        result = yield
    finally:
        if served := item.stash.get(SERVED, None):
            name = item.callspec.params["backend"]
            operations = {operation for operation, backend in served.operations if backend == name}
            if operations:
                levels.proves(item, devices.level(name), name, operations)
    if served and name in DEVICE_BACKENDS and not operations:
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
    if devices.INTERPRETED:
        # This process is for what the interpreter runs; the same tests at other levels run in its parent.
        items[:] = [item for item in items if _simulated(item) == "triton" or "interpreted" in item.path.parts]
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


def pytest_addoption(parser):
    group = parser.getgroup("levels of proof")
    group.addoption("--write-levels", action="store_true", help="write what this run of all tests proves")
    group.addoption("--write-compiled", action="store_true", help="write tests/compiled/table.json anew")
    group.addoption("--levels-record", metavar="FILE", help="write what this run proves to FILE, for another to read")


def pytest_configure(config):
    config.pluginmanager.register(levels.Plugin(config))


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["big"] = session.config.stash.get(TOO_BIG, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Every worker of xdist collects all tests."""
    node.config.stash[TOO_BIG] = getattr(node, "workeroutput", {}).get("big", 0)


def pytest_terminal_summary(terminalreporter):
    if count := terminalreporter.config.stash.get(TOO_BIG, 0):
        terminalreporter.write_line(f"{count} tests marked big were left out: they need a device for triton and cuda")
