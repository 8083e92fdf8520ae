"""`python -m peftkern`, the supported versions, and what importing the package costs."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from peftkern import __main__ as cli
from peftkern import _versions, dispatch

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments, **environ):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PEFTKERN_")}
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, env={**kept, **environ}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def printed():
    return run("-m", "peftkern")


def test_the_report_names_versions_devices_and_ranges(printed):
    for words in (_versions.__version__, torch.__version__, "supported: 2.11 to 2.14", "supported: 0.21", "features"):
        assert words in printed
    assert max(map(len, printed.splitlines())) <= 120


def test_the_report_says_who_serves_every_operation(printed):
    section = printed.split("Who serves cpu tensors\n")[1]
    rows = dict(line.split(None, 1) for line in section.splitlines() if line.startswith("  "))
    for name, operation in dispatch.operations().items():
        serving = next(backend for backend, ok, _ in operation.explain_static("cpu") if ok)
        assert rows[name].startswith(serving)


def test_the_report_tells_of_both_native_libraries(printed):
    for label, text in cli.built():
        (line,) = (line for line in printed.splitlines() if line.startswith(f"  {label} "))
        assert text[:40] in line


def test_a_switched_off_package_is_served_by_the_reference_and_says_why():
    printed = run("-m", "peftkern", PEFTKERN_DISABLE="1")
    rows = printed.split("Who serves cpu tensors\n")[1].split("\n\n")[0].splitlines()
    names = dispatch.operations().keys()
    assert [line.split()[1] for line in rows if line.split()[0] in names] == ["reference"] * len(names)
    assert "PEFTKERN_DISABLE  1" in printed


def test_built_alone_is_two_lines():
    lines = run("-m", "peftkern", "--built").splitlines()
    assert [line.split(":")[0] for line in lines] == ["CPU library", "CUDA library"]


def test_reasons_of_backends_that_do_not_serve_are_told():
    rows = [("cuda", False, "no driver"), ("cpu", False, "not built"), ("reference", True, "serves")]
    operations = {"rotate": SimpleNamespace(explain_static=lambda kind: rows)}
    assert cli.backends("cpu", operations) == [("rotate", "reference   (cuda: no driver; cpu: not built)")]


def test_a_library_that_was_not_built_or_does_not_load_says_why(monkeypatch):
    info = {"cpu": {"built": False, "reason": "no compiler"}, "cuda": {"built": True, "compiler": "nvcc"}}
    monkeypatch.setattr(_versions, "build_info", lambda: info)
    monkeypatch.setattr(cli, "_library", lambda part: (None, "undefined symbol"))
    rows = dict(cli.built())
    assert rows["CPU library"] == "no: no compiler"
    assert rows["CUDA library"] == "built by nvcc, but does not load: undefined symbol"


@pytest.mark.parametrize(
    "driver,said", [(0, "no driver here"), (12080, "serves CUDA 12.8: update it"), (13010, "driver for CUDA 13.1")]
)
def test_a_driver_older_than_the_cuda_library_is_told(monkeypatch, driver, said):
    info = {"cpu": {"built": False, "reason": ""}, "cuda": {"built": True, "compiler": "nvcc 13.0", "archs": "80;90"}}
    library = SimpleNamespace(runtime_version=lambda: 13000, driver_version=lambda: driver)
    monkeypatch.setattr(_versions, "build_info", lambda: info)
    monkeypatch.setattr(cli, "_library", lambda part: (library, None))
    assert said in dict(cli.built())["CUDA library"]


@pytest.mark.parametrize(
    "name,version,ok",
    [
        ("torch", "2.11.0", True),
        ("torch", "2.13.0+cpu", True),
        ("torch", "2.14.1", True),
        ("torch", "2.10.2", False),
        ("torch", "2.15.0.dev20260901", False),
        ("torch", "3.0", False),
        ("triton", "3.6.0", True),
        ("triton", "3.10.0", False),
        ("peft", "0.21.2", True),
        ("peft", "0.22.0", False),
        ("peft", "main", False),
    ],
)
def test_supported_versions(name, version, ok):
    assert _versions.in_range(name, version) == ok
    sentences = _versions.check({name: version})
    assert len(sentences) == (not ok)
    for sentence in sentences:
        assert f"{name} {version} is not supported" in sentence
        assert f"is made for {_versions.supported_range(name)}" in sentence


def test_a_package_that_is_not_installed_is_no_problem():
    assert _versions.check({"triton": None}) == []


def test_declared_dependencies_agree_with_the_supported_versions():
    declared = (ROOT / "pyproject.toml").read_text()
    first, last = _versions.SUPPORTED["peft"]
    assert f'"peft>={first[0]}.{first[1]},<{last[0]}.{last[1] + 1}"' in declared
    assert '"torch>={}.{}"'.format(*_versions.SUPPORTED["torch"][0]) in declared


def test_importing_the_package_imports_nothing_heavy_starts_nothing_and_touches_no_device():
    code = (
        "import subprocess, sys, torch\n"
        "known = set(sys.modules)\n"
        "def refuse(*args, **kwargs): raise AssertionError('a process was started')\n"
        "subprocess.Popen.__init__ = refuse\n"
        "import peftkern\n"
        "print(torch.cuda.is_initialized(), *sorted(set(sys.modules) - known))"
    )
    initialized, *modules = run("-c", code).split()
    assert initialized == "False"
    heavy = {"triton", "peft", "transformers", "accelerate", "bitsandbytes", "pybind11", "torch._inductor", "scipy"}
    assert heavy.isdisjoint(modules)
    assert not {"peftkern._native_cpu", "peftkern._native_cuda", "peftkern.nn", "peftkern.integrations"} & set(modules)
