"""pytest plugin (-p bench.gpu.outcomes): outcomes as they are known, for a run that may be cut off."""

import json
from pathlib import Path

NOT_COLLECTED = "not collected"


def pytest_addoption(parser):
    parser.addoption("--outcomes", help="append one line of JSON per test to this file")
    parser.addoption("--not-again", help="leave out the tests that have a line in this file")


def pytest_configure(config):
    # Workers of pytest-xdist report to their controller, which writes.
    if config.getoption("--outcomes") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Writer(config.getoption("--outcomes")))


def pytest_collection_modifyitems(config, items):
    file = config.getoption("--not-again")
    if file and Path(file).exists():
        known = {json.loads(line)["test"] for line in Path(file).read_text().splitlines()}
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in known])
        items[:] = [item for item in items if item.nodeid not in known]


class _Writer:
    def __init__(self, path):
        self.file = open(path, "a")  # noqa: SIM115 (open as long as pytest runs)

    def write(self, **line):
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()

    def pytest_collectreport(self, report):
        if report.failed:
            said = str(report.longrepr).strip().rpartition("\n")[2].removeprefix("E").strip()
            self.write(test=report.nodeid, outcome=NOT_COLLECTED, said=said)

    def pytest_runtest_logreport(self, report):
        # Of the three phases of a test: its call, or what kept it from being called, or broke after it.
        if report.when == "call" or report.outcome != "passed":
            said = ""
            if report.outcome == "failed":
                crash = getattr(report.longrepr, "reprcrash", None)
                said = (crash.message if crash else str(report.longrepr)).strip().partition("\n")[0]
            elif report.outcome == "skipped" and isinstance(report.longrepr, tuple):
                said = report.longrepr[2]
            self.write(test=report.nodeid, outcome=report.outcome, said=said, seconds=report.duration)
