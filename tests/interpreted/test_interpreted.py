"""Level 2: the tests of the operations again, with Triton interpreted, in a process of its own for each folder."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import devices
import levels
import pytest

ROOT = Path(__file__).resolve().parents[2]
OPS = ROOT / "tests" / "ops"
PATHS = sorted(p.name for p in OPS.iterdir() if p.suffix == ".py" or any(p.glob("test_*.py")))


def run(*arguments):
    """A pytest process with Triton interpreted; fails with its output."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "PEFTKERN_", "TRITON_"))}
    environment |= {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        output = done.stdout[-8000:] + done.stderr[-2000:]
        pytest.fail(f"TRITON_INTERPRET=1 {' '.join(command)} failed:\n{output}", pytrace=False)
    return done.stdout


@pytest.fixture(autouse=True)
def triton():
    if reason := devices.triton_missing():
        pytest.skip(reason)


def test_the_interpreter_is_right_and_catches_planted_bugs():
    assert re.search(r"\b\d{2,} passed", run("tests/interpreted/interpreter_checks.py"))


@pytest.mark.parametrize("path", PATHS)
def test_the_operations_interpreted(request, tmp_path, path):
    record = tmp_path / "levels.json"
    options = request.config.option
    slow = ["-m", options.markexpr] if options.markexpr == "" else []
    run(f"tests/ops/{path}", "--levels-record", record, *slow)
    proven = {
        operation for level, backend, operation in json.loads(record.read_text()) if (level, backend) == (2, "triton")
    }
    levels.proves(request.node, 2, "triton", proven)
