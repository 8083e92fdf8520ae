"""What setup.py decides, says and leaves behind; the real installs are slow tests."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import peftkern
from peftkern import _versions

ROOT = Path(__file__).resolve().parents[1]
NOTHING = "/nonexistent"


@pytest.fixture(scope="module")
def setup():
    spec = importlib.util.spec_from_file_location("peftkern_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def machine(tmp_path, setup, monkeypatch):
    """Plans for a machine that has the named tools and nothing else."""
    monkeypatch.setattr(setup, "USUAL_NVCC", NOTHING)
    (tmp_path / "Python.h").touch()

    def plan(*tools, pybind11=True, headers=True, **environ):
        folder = tmp_path / "bin"
        folder.mkdir()
        for tool in tools:
            (folder / tool).touch(mode=0o755)
        environ = {"PATH": str(folder), **environ}
        include = tmp_path if headers else tmp_path / "bin"
        return setup.plan(environ, include=str(include), scripts=NOTHING, has_pybind11=pybind11)

    return plan


def test_gxx_alone_builds_the_cpu_library(machine):
    plan = machine("g++", "cmake", "ninja")
    assert plan.parts == ("cpu",)
    assert plan.reasons.keys() == {"cuda"}
    assert "no nvcc" in plan.reasons["cuda"]


def test_nvcc_beside_gxx_builds_both_libraries(machine):
    plan = machine("g++", "nvcc", "cmake", "ninja")
    assert plan.parts == ("cpu", "cuda")
    assert plan.reasons == {}


def test_gxx_is_preferred_to_clang(machine):
    assert machine("clang++", "c++", "g++", "cmake", "ninja").tools["cxx"].endswith("/g++")


def test_nvcc_is_found_in_cuda_home(machine, tmp_path):
    (tmp_path / "bin2").mkdir()
    home = tmp_path / "toolkit"
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "nvcc").touch(mode=0o755)
    assert machine("g++", "cmake", "ninja", CUDA_HOME=str(home)).tools["nvcc"] == str(home / "bin" / "nvcc")


def test_no_compiler_gives_pure_python_and_one_line_that_says_how_to_get_one(machine):
    plan = machine("nvcc", "cmake", "ninja")
    assert plan.parts == ()
    reason = plan.reasons["cpu"]
    assert "\n" not in reason
    for words in ("no C++ compiler", "g++, c++, clang++", "pure Python", "apt install g++", "run pip install again"):
        assert words in reason


def test_a_cxx_that_is_not_there_is_named(machine):
    plan = machine("g++", "cmake", "ninja", CXX="ccache no-such-compiler")
    assert plan.parts == ()
    assert "CXX=no-such-compiler" in plan.reasons["cpu"]


def test_missing_python_headers_are_named(machine):
    plan = machine("g++", "cmake", "ninja", headers=False)
    assert plan.parts == ()
    assert "no Python.h" in plan.reasons["cpu"] and "apt install python3-dev" in plan.reasons["cpu"]


def test_missing_build_tools_are_named(machine):
    plan = machine("g++", "ninja", pybind11=False)
    assert plan.parts == ()
    assert "cmake, pybind11 are missing" in plan.reasons["cpu"]


@pytest.mark.parametrize("value,parts", [("1", ("cpu",)), ("0", ("cpu", "cuda")), ("", ("cpu", "cuda"))])
def test_skip_cuda(machine, value, parts):
    assert machine("g++", "nvcc", "cmake", "ninja", PEFTKERN_SKIP_CUDA=value).parts == parts


def test_skip_native(machine):
    plan = machine("g++", "nvcc", "cmake", "ninja", PEFTKERN_SKIP_NATIVE="1")
    assert plan.parts == ()
    assert set(plan.reasons.values()) == {"PEFTKERN_SKIP_NATIVE is set"}


@pytest.mark.parametrize("cores,gib,jobs", [(8, 64, 8), (8, 5, 2), (8, 1.5, 1), (2, 24, 2)])
def test_jobs_are_bounded_by_cores_and_by_two_gib_each(setup, cores, gib, jobs):
    assert setup.max_jobs({}, cores, gib) == jobs


def test_max_jobs_overrides_the_bound(setup):
    assert setup.max_jobs({"MAX_JOBS": "12"}, 2, 1) == 12


@pytest.mark.parametrize("value", ["0", "-3", "many", "2.5"])
def test_a_wrong_max_jobs_is_refused_in_a_sentence(setup, value):
    with pytest.raises(SystemExit, match=re.escape(f"MAX_JOBS must be a whole number of at least 1; got {value!r}")):
        setup.max_jobs({"MAX_JOBS": value}, 2, 8)


def test_available_memory_is_the_lesser_of_machine_and_container(setup, tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 99999999 kB\nMemAvailable:    8388608 kB\n")
    assert setup.available_gib(meminfo, tmp_path) == 8
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("0\n")
    assert setup.available_gib(meminfo, tmp_path) == 8
    (tmp_path / "memory.max").write_text(f"{4 << 30}\n")
    (tmp_path / "memory.current").write_text(f"{1 << 30}\n")
    assert setup.available_gib(meminfo, tmp_path) == 3


@pytest.mark.parametrize(
    "asked,known,archs",
    [
        ("", {"75", "80", "86", "90", "100"}, "80;90;100"),
        ("", {"80", "86", "90"}, "80;90"),
        ("", None, "80;90;100"),
        ("80, 90a", {"80"}, "80;90a"),
        ("86;", None, "86"),
    ],
)
def test_cuda_archs_are_those_asked_for_or_the_default_that_nvcc_knows(setup, asked, known, archs):
    assert setup.cuda_archs({"PEFTKERN_CUDA_ARCHS": asked}, known) == archs


@pytest.mark.parametrize(
    "log,said",
    [
        ("[1/2] Building\na.cpp:3:10: fatal error: x.h: No such file\n", "a.cpp:3:10: fatal error: x.h"),
        ("a.cpp:1: warning: unused\na.cpp:9:1: error: expected ';'\n", "a.cpp:9:1: error: expected ';'"),
        ("nvcc fatal   : Unsupported gpu architecture 'compute_12'\n", "nvcc fatal   : Unsupported"),
        ("ld: a.o: undefined reference to `f'\nninja: build stopped\n", "ld: a.o: undefined reference to `f'"),
        (
            'CMake Error at /x/Test.cmake:73 (message):\n  The C++ compiler\n\n    "/b/g++"\n\n'
            "  is not able to compile.\n\n  It fails with the following output:\n",
            'The C++ compiler "/b/g++" is not able to compile.',
        ),
        ("ninja: build stopped: subcommand failed.\n", "ninja: build stopped"),
        ("", "nothing was printed"),
    ],
)
def test_the_line_that_says_what_went_wrong_is_found_in_a_log(setup, log, said):
    found = setup.first_error(log)
    assert found.startswith(said) and "\n" not in found


def test_a_build_folder_is_kept_for_the_same_options_and_emptied_for_others(setup, tmp_path):
    folder = tmp_path / "build"
    setup.fresh_folder(folder, "one")
    (folder / "object.o").touch()
    setup.fresh_folder(folder, "one")
    assert (folder / "object.o").exists()
    setup.fresh_folder(folder, "two")
    assert not (folder / "object.o").exists()


def test_installing_a_library_leaves_the_old_one_to_those_who_have_it_open(setup, tmp_path):
    new, folder = tmp_path / "_native_cpu.so", tmp_path / "peftkern"
    new.write_text("old")
    setup.install(new, folder)
    with (folder / new.name).open() as mapped:
        new.write_text("new")
        setup.install(new, folder)
        assert mapped.read() == "old"
    assert [path.name for path in folder.iterdir()] == [new.name]
    assert (folder / new.name).read_text() == "new"


def test_native_code_includes_nothing_of_torch():
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".h", ".cu", ".cuh")]
    assert sources
    guilty = [str(p) for p in sources if re.search(r'#\s*include\s*[<"](torch|ATen|c10)/', p.read_text())]
    assert guilty == []


def test_one_version_everywhere():
    assert peftkern.__version__ == _versions.__version__
    assert f"## {_versions.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    try:
        installed = metadata.version("peftkern")
    except metadata.PackageNotFoundError:
        pytest.skip("peftkern runs from the source tree and is not installed")
    assert installed == _versions.__version__


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
def test_the_cpu_library_shares_one_openmp_runtime_with_torch():
    if importlib.util.find_spec("peftkern._native_cpu") is None:
        pytest.skip(f"no CPU library: {_versions.build_info()['cpu']['reason']}")
    code = (
        "import peftkern._native_cpu, torch, peftkern.__main__ as m\n"
        "torch.mm(torch.ones(300, 300), torch.ones(300, 300))\n"
        "print(len(m.openmp_runtimes()))"
    )
    for imports in (code, "import torch\n" + code):
        done = subprocess.run([sys.executable, "-c", imports], capture_output=True, text=True, cwd=ROOT)
        assert done.stdout.strip() == "1", done.stderr


def pip_install(tmp_path, **environ):
    """A real `pip install` of a copy of the sources, offline. Returns the process and the folder installed into."""
    if _versions.installed("pip") is None:
        pytest.skip("this Python has no pip")
    source, target = tmp_path / "source", tmp_path / "target"
    if not source.exists():
        source.mkdir()
        for name in ("setup.py", "CMakeLists.txt", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, source)
        skipped = shutil.ignore_patterns("*.so", "__pycache__", "_build_info.json")
        for name in ("csrc", "peftkern"):
            shutil.copytree(ROOT / name, source / name, ignore=skipped)
    command = [sys.executable, "-m", "pip", "install", "-v", "--no-deps", "--no-build-isolation", "--no-index"]
    command += ["--target", str(target), str(source)]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PEFTKERN_", "CXX", "CUDA"))}
    done = subprocess.run(command, capture_output=True, text=True, env={**kept, **environ})
    return done, target


# An editable install answers for modules that the installed copy lacks, such as a native library.
ALONE = "import sys\nsys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"


def run_installed(target, code):
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PEFTKERN_")}
    environ["PYTHONPATH"] = str(target)
    done = subprocess.run([sys.executable, "-c", ALONE + code], capture_output=True, text=True, cwd=target, env=environ)
    assert done.returncode == 0, done.stderr
    return done.stdout


ROTATE = (
    "import peftkern, torch\n"
    "x, u = torch.randn(5, 12), torch.randn(12, 3)\n"
    "assert torch.allclose(peftkern.rotate(peftkern.rotate(x, u), u, reverse=True), x, atol=1e-5)\n"
    "print(peftkern.__file__)\n"
)


@pytest.mark.slow
def test_an_install_without_a_compiler_is_pure_python_and_works(tmp_path):
    done, target = pip_install(tmp_path, PATH=NOTHING)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "peftkern: no C++ compiler" in done.stdout + done.stderr
    assert list(target.rglob("*.so")) == []
    (wheel,) = target.glob("peftkern-*.dist-info/WHEEL")
    assert "Root-Is-Purelib: true" in wheel.read_text()
    assert run_installed(target, ROTATE).startswith(str(target))
    assert "no C++ compiler" in run_installed(target, "import peftkern.__main__ as m; m.main(['--built'])")


@pytest.mark.slow
def test_a_compiler_that_does_not_work_gives_pure_python_unless_natives_are_required(tmp_path, setup):
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho out of order >&2\nexit 1\n")
    broken.chmod(0o755)
    if setup.plan({**os.environ, "CXX": str(broken)}).parts == ():
        pytest.skip("cmake, ninja, pybind11 or Python's headers are missing")
    done, target = pip_install(tmp_path, CXX=str(broken))
    assert done.returncode == 0, done.stdout + done.stderr
    said = r"peftkern: the CPU library did not build and is left out: .*not able to compile"
    assert re.search(said, done.stdout + done.stderr)
    assert list(target.rglob("*.so")) == []
    assert run_installed(target, ROTATE).startswith(str(target))
    shutil.rmtree(target)
    done, _ = pip_install(tmp_path, CXX=str(broken), PEFTKERN_REQUIRE_NATIVE="1")
    assert done.returncode != 0
    assert "PEFTKERN_REQUIRE_NATIVE is set, but the CPU library did not build" in done.stdout + done.stderr


@pytest.mark.slow
def test_an_install_with_a_compiler_has_the_cpu_library(tmp_path, setup):
    if "cpu" not in setup.plan(os.environ).parts:
        pytest.skip(setup.plan(os.environ).reasons["cpu"])
    done, target = pip_install(tmp_path, PEFTKERN_SKIP_CUDA="1", PEFTKERN_REQUIRE_NATIVE="1")
    assert done.returncode == 0, done.stdout + done.stderr
    info = json.loads((target / "peftkern" / "_build_info.json").read_text())
    assert info["cpu"]["built"] and info["cuda"] == {"built": False, "reason": "PEFTKERN_SKIP_CUDA is set"}
    assert "cpu serves" in run_installed(target, ROTATE + "print(peftkern.explain('rotate'))")
