"""Options of the benchmarks, the measured rows and what goes into every result."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bench import environment
from bench.arms import LABELS, names
from bench.cases import SETS
from bench.row import Row, measure_row

ROWS = pytest.StashKey[dict[str, Row]]()
CASES = {case.id: case for cases in SETS.values() for case in cases}


def pytest_addoption(parser):
    group = parser.getgroup("peftkern benchmarks")
    group.addoption("--bench-set", choices=sorted(SETS), default="quick", help="quick: the README's rows; full: all")
    group.addoption("--bench-seconds", type=float, default=30.0, help="time for the interleaved rounds of one case")
    group.addoption("--bench-case", action="append", help="measure this case only (its id, as printed); repeatable")
    group.addoption("--bench-threads", type=int, help="torch's number of threads (default: torch's own)")


def pytest_configure(config):
    threads = config.getoption("--bench-threads", None)
    if threads:
        torch.set_num_threads(threads)


def pytest_generate_tests(metafunc):
    if "row" not in metafunc.fixturenames:
        return
    wanted = metafunc.config.getoption("--bench-case")
    unknown = set(wanted or ()) - set(CASES)
    if unknown:
        raise pytest.UsageError(f"--bench-case {sorted(unknown)[0]!r}: no such case; the cases are {', '.join(CASES)}")
    cases = [CASES[name] for name in wanted] if wanted else SETS[metafunc.config.getoption("--bench-set")]
    pairs = [(case.id, arm) for case in cases for arm in names(case)]
    metafunc.parametrize(("row", "arm"), pairs, indirect=["row"], ids=[f"{case}-{arm}" for case, arm in pairs])


@pytest.fixture
def row(request) -> Row:
    """The row of a case: measured for the test of its first arm, and handed to those of the others."""
    case = CASES[request.param]
    rows = request.config.stash.setdefault(ROWS, {})
    if case.id not in rows:
        seconds = request.config.getoption("--bench-seconds")
        rows[case.id] = measure_row(case, seconds if case.trains else seconds / 4)
    return rows[case.id]


class ReplayClock:
    """A timer for pytest-benchmark that replays times already taken, since its own rounds cannot interleave arms."""

    __name__ = "interleaved_perf_counter"

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def feed(self, benchmark, times: list[float]) -> None:
        """Make `times` (seconds) the rounds of `benchmark`, to the last bit."""
        left = iter(times)

        def rewind():
            self.now = 0.0

        def pass_time():
            self.now = next(left)

        benchmark.pedantic(pass_time, setup=rewind, rounds=len(times))


REPLAY = ReplayClock()


@pytest.fixture
def replay() -> Callable[[object, list[float]], None]:
    return REPLAY.feed


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=REPLAY))


@pytest.fixture(scope="session")
def surroundings() -> dict[str, object]:
    """Machine, versions, backends and commit: the extra_info that every row shares."""
    return {
        "machine": environment.machine(),
        "versions": environment.versions(),
        "backends": environment.backends(),
        "commit": environment.commit(),
    }


def pytest_benchmark_update_machine_info(config, machine_info):
    """The result file is published: it says what the machine is, not which one."""
    machine_info.pop("node", None)


def pytest_terminal_summary(terminalreporter, config):
    rows = list(config.stash.get(ROWS, {}).values())
    if not rows:
        return
    terminalreporter.section("overhead over the frozen layer (median of the rounds' ratios; frozen layer = 1.00)")
    width = max(len(row.case.title) for row in rows)
    heads = [arm for arm in LABELS if any(arm in names(row.case) for row in rows) and arm != "frozen"]
    columns = [max(len(head), len("refused")) + 2 for head in heads]
    line = "".join(f"{head:>{column}}" for head, column in zip(heads, columns, strict=True))
    terminalreporter.write_line(" " * (width + len("gram_schmidt") + 2) + line)
    for row in rows:
        cells = []
        for name in heads:
            if name in row.refused:
                cells.append("refused")
            elif name in row.times:
                cells.append(f"{row.info[name]['overhead']['median_of_ratios']:.2f}")
            else:
                cells.append("-")
        line = "".join(f"{cell:>{column}}" for cell, column in zip(cells, columns, strict=True))
        terminalreporter.write_line(f"{row.case.kind:<13} {row.case.title:<{width}}" + line)
    absent = {(name, reason) for row in rows for name, reason in row.absent.items()}
    for name, reason in sorted(absent):
        terminalreporter.write_line(f"{LABELS[name]}: not available: {reason}")
    for row in rows:
        for reason in row.refused.values():
            terminalreporter.write_line(f"refused: {reason}")
