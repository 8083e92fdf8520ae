"""What the suite claims to have proven: recording, the committed table, the README; a lost proof fails a run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import levels
import pytest

import peftkern
from peftkern import __main__ as cli
from peftkern import dispatch

ROOT = Path(__file__).resolve().parents[1]


def record(*tests):
    made = levels.Record()
    for name, outcome, level, backend, operations in tests:
        made.add(name, outcome, [(levels.PROPERTY, [level, backend, operations]), ("other", 1)])
    return made


def test_what_passed_and_never_failed_is_proven():
    made = record(
        ("a", "passed", 0, "reference", ["rotate", "wy_factor"]),
        ("b", "passed", 4, "triton", ["rotate"]),
        ("c", "passed", 2, "triton", ["rotate"]),
        ("d", "passed", 4, "cuda", ["rotate"]),
        ("e", "failed", 4, "cuda", ["rotate", "wy_factor"]),
        ("f", "skipped", 1, "cpu", ["rotate"]),
    )
    assert made.proven() == {"rotate": {"reference": [0], "triton": [2, 4]}, "wy_factor": {"reference": [0]}}
    assert levels.table_of(levels.claims(made.proven())) == made.proven()


def finished(monkeypatch, whole, claimed, *tests):
    """The exit status of a run that passed these tests, for a table of claims."""
    options = SimpleNamespace(levels_record=None, write_levels=False)
    plugin = levels.Plugin(SimpleNamespace(option=options))
    plugin.record = record(*tests)
    monkeypatch.setattr(plugin, "whole", lambda: whole)
    monkeypatch.setattr(levels, "read", lambda: claimed)
    session = SimpleNamespace(exitstatus=pytest.ExitCode.OK)
    plugin.pytest_sessionfinish(session)
    return session.exitstatus


def test_a_whole_run_that_loses_a_proof_fails(monkeypatch):
    claimed, test = {"rotate": {"reference": [0]}}, ("a", "passed", 0, "reference", ["rotate"])
    assert finished(monkeypatch, True, claimed, test) == pytest.ExitCode.OK
    assert finished(monkeypatch, True, claimed) == pytest.ExitCode.TESTS_FAILED
    assert finished(monkeypatch, False, claimed) == pytest.ExitCode.OK


def anything_runs(level, backend):
    return None


def test_a_claim_that_is_not_proven_again_is_named_with_what_went_wrong():
    table = {"rotate": {"reference": [0], "cuda": [3, 4]}}
    made = record(("a", "passed", 0, "reference", ["rotate"]), ("b", "failed", 4, "cuda", ["rotate"]))
    assert levels.unproven(table, made, anything_runs) == [
        "rotate of cuda is claimed at level 3, but no test exercised it",
        "rotate of cuda is claimed at level 4, but failed: b",
    ]


def test_claims_of_what_cannot_run_here_are_left_alone():
    table = {"rotate": {"reference": [0], "cuda": [3, 4, 5]}, "gone": {"cpu": [1]}}
    made = record(("a", "passed", 0, "reference", ["rotate"]), ("b", "passed", 4, "triton", ["rotate"]))

    def no_nvcc(level, backend):
        return "no nvcc" if backend == "cuda" else None

    assert levels.unproven(table, made, no_nvcc) == ["gone of cpu is claimed at level 1, but no test exercised it"]
    assert levels.update(table, made, no_nvcc) == {"rotate": {"cuda": [3, 4, 5], "reference": [0], "triton": [4]}}


def test_the_table_and_the_readme_are_written_together(tmp_path):
    table, readme = tmp_path / "table.json", tmp_path / "README.md"
    readme.write_text(f"before\n{levels.BEGIN}\nold\n{levels.END}\nafter\n")
    proven = {"rotate": {"reference": [0], "triton": [2, 4]}, "wy_factor": {"cpu": [1]}}
    levels.write(proven, table, readme)
    assert levels.read(table) == proven
    rows = "| `rotate` | 0 | – | 2 4 | – |\n| `wy_factor` | – | 1 | – | – |\n"
    assert readme.read_text().endswith(f"{rows}{levels.END}\nafter\n") and "old" not in readme.read_text()


def test_the_readme_shows_the_committed_table():
    inside = levels.README.read_text().split(levels.BEGIN)[1].split(levels.END)[0].strip()
    assert inside == (levels.markdown(levels.read()) if levels.TABLE.exists() else "")


def test_the_committed_table_claims_nothing_that_does_not_exist():
    operations = peftkern.operations()
    for level, backend, operation in levels.claims(levels.read()):
        assert backend in levels.BACKENDS[level]
        assert operations[operation].backend(backend)[0], f"{operation} is not written for {backend}"


def test_the_report_prints_the_committed_table():
    rows = dict(cli.proven())
    assert rows.keys() == levels.read().keys()
    for operation, row in levels.read().items():
        for backend, numbers in row.items():
            assert f"{backend} {'+'.join(map(str, numbers))}" in rows[operation].split(", ")
    assert not rows or cli.LEVELS in cli.report()


def test_every_level_names_backends_that_exist():
    assert set(levels.NAMES) == set(levels.BACKENDS)
    assert {b for backends in levels.BACKENDS.values() for b in backends} == set(dispatch.BACKENDS)
    assert all(levels.missing(0, backend) for backend in ("cpu", "triton", "cuda"))
    assert levels.missing(0, "reference") is None


def run(*arguments):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "PEFTKERN_", "TRITON_"))}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path])
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("workers", ((), ("-n", "2")), ids=("one process", "two workers"))
def test_a_run_records_who_served_while_its_tests_passed(tmp_path, workers):
    file = tmp_path / "record.json"
    test = "tests/ops/householder/test_rotate.py::test_reverse_is_the_inverse"
    done = run(test, "-k", "reference", "--levels-record", str(file), *workers)
    assert done.returncode == 0, done.stdout
    assert set(map(tuple, json.loads(file.read_text()))) == {
        (0, "reference", "rotate"), (0, "reference", "wy_factor")
    }  # fmt: skip
    assert "level 0, the reference against float64: 1 tests passed" in done.stdout
    assert "level 4, compiled PTX executed on the CPU, cuda: did not run" in done.stdout
    assert "NOT PROVEN" not in done.stdout


def test_a_run_of_some_tests_writes_no_table():
    before = levels.TABLE.read_text() if levels.TABLE.exists() else None
    done = run("tests/test_levels.py", "-k", "named_with", "--write-levels")
    assert "wrote no levels: this was not a run of all tests" in done.stdout
    assert (levels.TABLE.read_text() if levels.TABLE.exists() else None) == before
