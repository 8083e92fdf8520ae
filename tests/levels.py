"""What a test run proves: for each operation and backend the levels at which tests that exercised it passed.

| level | what ran |
|---|---|
| 0 | the reference against oracles in float64 |
| 1 | the C++ kernels, natively |
| 2 | the Triton kernels, interpreted (tests/interpreted) |
| 3 | the kernels compiled for every architecture, their code inspected (tests/compiled) |
| 4 | the compiled PTX, executed on the CPU (tests/ptxvm) |
| 5 | the kernels on a device |

`peftkern/_proven.json` holds the claims, `pytest --write-levels` writes them, and a whole run fails where it does not
prove a claim again. A level that cannot run on a machine is named with the reason and its claims are left alone.
"""

import json
from collections import defaultdict
from pathlib import Path

import devices
import pytest

from peftkern import dispatch

ROOT = Path(__file__).resolve().parents[1]
TABLE, README = ROOT / "peftkern" / "_proven.json", ROOT / "README.md"
BEGIN, END = "<!-- levels:begin -->", "<!-- levels:end -->"
BACKENDS = {0: ("reference",), 1: ("cpu",), 2: ("triton",), 3: ("triton", "cuda"), 4: ("triton", "cuda")}
BACKENDS[5] = BACKENDS[4]
NAMES = {
    0: "the reference against float64",
    1: "C++ kernels",
    2: "Triton interpreted",
    3: "kernels compiled and inspected",
    4: "compiled PTX executed on the CPU",
    5: "kernels on a device",
}
PROPERTY = "proves"


def proves(item, level, backend, operations):
    """Say that a test, if it passes, proves operations of a backend at a level; if it fails, that it does not."""
    item.user_properties.append((PROPERTY, [level, backend, sorted(operations)]))


class Record:
    """(level, backend, operation) -> how many tests passed, and which failed."""

    def __init__(self):
        self.passed, self.failed = defaultdict(int), defaultdict(list)
        self.tests = defaultdict(int)

    def add(self, test, outcome, properties):
        if outcome not in ("passed", "failed"):
            return
        for name, value in properties:
            if name == PROPERTY:
                level, backend, operations = value
                self.tests[level, backend] += outcome == "passed"
                for operation in operations:
                    key = level, backend, operation
                    if outcome == "passed":
                        self.passed[key] += 1
                    else:
                        self.failed[key].append(test)

    def proven(self):
        """{operation: {backend: [levels]}} of what passed and never failed."""
        table = {}
        for level, backend, operation in sorted(set(self.passed) - set(self.failed)):
            table.setdefault(operation, {}).setdefault(backend, []).append(level)
        return {operation: table[operation] for operation in sorted(table)}


def read(path=TABLE):
    return json.loads(path.read_text())["levels"] if path.exists() else {}


def claims(table):
    """The set of (level, backend, operation) that a table claims."""
    return {(level, b, operation) for operation, row in table.items() for b, levels in row.items() for level in levels}


def table_of(claimed):
    """The table of a set of claims."""
    record = Record()
    record.passed.update(dict.fromkeys(claimed, 1))
    return record.proven()


def missing(level, backend):
    """Why no test of this process or its children can prove this backend at this level; None if some can."""
    if backend not in BACKENDS[level]:
        return "no such level"
    if level in (0, 1):
        return devices.missing(backend)
    if level == 5:
        return None if devices.ON_DEVICE else "torch sees no CUDA or ROCm device"
    if level == 4 and devices.ON_DEVICE:
        return "the tests run on the device instead"
    if level == 2 or (level == 3 and backend == "triton"):
        return devices.triton_missing()
    if level == 3:
        from compiled import cuda_library

        return cuda_library.missing()
    return devices.missing(backend)


def update(table, record, reason=missing):
    """The table after a run: what it proved, and what the levels that it could not run had proven before."""
    kept = {claim for claim in claims(table) if reason(*claim[:2])}
    return table_of(kept | claims(record.proven()))


def unproven(table, record, reason=missing):
    """Claims that a whole run should have proven and has not, as sentences."""
    lines = []
    for level, backend, operation in sorted(claims(table) - claims(record.proven())):
        if reason(level, backend):
            continue
        failed = record.failed.get((level, backend, operation))
        why = f"failed: {failed[0]}" if failed else "no test exercised it"
        lines.append(f"{operation} of {backend} is claimed at level {level}, but {why}")
    return lines


def markdown(table):
    """The table of the README: a row for each operation, a column for each backend."""
    head = ["operation", *dispatch.BACKENDS]
    rows = [
        [f"`{name}`", *(" ".join(map(str, row.get(b, []))) or "–" for b in head[1:])] for name, row in table.items()
    ]
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


def write(table, path=TABLE, readme=README):
    """Write the claims, and the README's table between its markers."""
    rows = ",\n".join(f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in table.items())
    path.write_text('{\n  "levels": {\n' + rows + "\n  }\n}\n")
    before, rest = readme.read_text().split(BEGIN)
    readme.write_text(f"{before}{BEGIN}\n{markdown(table)}\n{END}{rest.split(END)[1]}")


class Plugin:
    """Collects what every test proves, from all workers, and holds the claims to it."""

    def __init__(self, config):
        self.config, self.record = config, Record()
        self.problems, self.written = [], None

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or (report.when == "setup" and report.failed):
            # What is known to fail is not proven either.
            outcome = "failed" if hasattr(report, "wasxfail") else report.outcome
            self.record.add(report.nodeid, outcome, report.user_properties)

    def whole(self):
        """Whether this run was of all tests."""
        options = self.config.option
        partial = ("keyword", "deselect", "ignore", "ignore_glob", "lf", "failedfirst", "maxfail", "collectonly")
        return (
            self.config.args_source is pytest.Config.ArgsSource.TESTPATHS
            and not any(getattr(options, name, None) for name in partial)
            and options.markexpr in ("", "not slow")
        )

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session):
        if hasattr(self.config, "workerinput"):
            return
        if path := self.config.option.levels_record:
            Path(path).write_text(json.dumps(sorted(claims(self.record.proven()))))
        if not self.whole():
            return
        if self.config.option.write_levels:
            self.written = update(read(), self.record)
            write(self.written)
        else:
            self.problems = unproven(read(), self.record)
            if self.problems and session.exitstatus == pytest.ExitCode.OK:
                session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        section = terminalreporter
        section.section("levels of proof")
        for level, name in NAMES.items():
            for backend in BACKENDS[level]:
                count, reason = self.record.tests[level, backend], missing(level, backend)
                label = f"level {level}, {name}" + (f", {backend}" if len(BACKENDS[level]) > 1 else "")
                if count:
                    section.write_line(f"{label}: {count} tests passed")
                else:
                    section.write_line(f"{label}: did not run" + (f": {reason}" if reason else " in this selection"))
        for problem in self.problems:
            section.write_line(f"NOT PROVEN: {problem}", red=True)
        if self.problems:
            section.write_line("`make levels` writes down what a run proves", red=True)
        if self.config.option.write_levels:
            text = (
                f"wrote {TABLE.relative_to(ROOT)}"
                if self.written
                else "wrote no levels: this was not a run of all tests"
            )
            section.write_line(text)
        elif self.whole() and (new := claims(self.record.proven()) - claims(read())):
            section.write_line(f"{len(new)} proofs are not in the table yet; `make levels` writes them down")
