"""A run of the benchmarks as `make bench` starts it, on one small case."""

import json
import os
import subprocess
import sys
from pathlib import Path

from bench.arms import OURS
from bench.result import Result

ROOT = Path(__file__).parents[2]
CASE = "decode-768x768-t1-r8-fp32"


def test_a_run_measures_a_case_once_and_writes_a_row_for_every_arm(tmp_path):
    file = tmp_path / "result.json"
    command = [sys.executable, "-m", "pytest", "bench/test_hra.py", "--benchmark-only", f"--benchmark-json={file}"]
    command += ["--bench-case", CASE, "--bench-seconds", "0.1", "-p", "no:cacheprovider"]
    # pytest-benchmark measures nothing where it believes to run under xdist.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, (run.stdout + run.stderr)[-2000:]
    (line,) = [line for line in run.stdout.splitlines() if line.startswith("decode ")]
    assert "refused" not in line

    data = json.loads(file.read_text())
    assert "node" not in data["machine_info"]
    assert {row["group"] for row in data["benchmarks"]} == {CASE}
    result = Result.load(file)
    case = result.cases[CASE]
    measured = set(case.arms)
    assert measured >= {"frozen", "peft", "torch"}
    # In fp32 there is no `exact`; an arm that is missing says why.
    assert all(arm in measured or case.why_missing(arm) for arm in OURS if arm != "exact")
    for row in data["benchmarks"]:
        times = row["extra_info"]["overhead"]
        assert row["stats"]["rounds"] == len(row["stats"]["data"]) == times["rounds"]
    assert case.arms["frozen"].overhead == 1
    assert result.versions["peft"] and result.machine["threads"] and result.commit != ""
