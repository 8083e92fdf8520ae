"""Build peftkern: CMake + Ninja + pybind11 for the native libraries, pure Python where there is no compiler.

    pip install .                          build whatever this machine can: a CPU library with g++, a CUDA library with
                                           nvcc (no GPU needed), otherwise pure Python and one line that says why
    python setup.py build_ext --inplace    rebuild the libraries into the source tree

Metadata is in pyproject.toml. The native code knows no torch, so torch is not needed to build. Options, all read from
the environment:

    PEFTKERN_CUDA_ARCHS         semicolon-separated GPU architectures, default "80;90;100" (those that nvcc knows); the
                                last one is embedded as PTX too, which newer GPUs compile when they load it
    PEFTKERN_SKIP_CUDA=1        build no CUDA library although nvcc is here
    PEFTKERN_SKIP_NATIVE=1      build no native library at all: pure Python on plain torch
    PEFTKERN_REQUIRE_NATIVE=1   fail where a native library does not build, instead of going on without it
    PEFTKERN_SANITIZE=1         build the CPU library with AddressSanitizer and UndefinedBehaviorSanitizer
    MAX_JOBS                    parallel compile jobs, default min(cores, available GiB / 2)
    CXX, CUDACXX, CUDA_HOME     the compilers, where the first g++, c++, clang++ and nvcc found are not the right ones
"""

import dataclasses
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PACKAGE = "peftkern"
INFO_FILE = "_build_info.json"
DEFAULT_CUDA_ARCHS = ("80", "90", "100")
CXX_NAMES = ("g++", "c++", "clang++")
USUAL_NVCC = "/usr/local/cuda/bin/nvcc"

PURE = "so this is a pure Python install, which runs on plain torch"
AGAIN = "and run pip install again"
HOW = {
    "compiler": f"no C++ compiler (looked for {', '.join(CXX_NAMES)}), {PURE}; for the CPU library install one "
    f"(Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; conda: conda install cxx-compiler) {AGAIN}",
    "headers": f"no Python.h in {{where}}, {PURE}; for the CPU library install Python's headers "
    f"(Debian, Ubuntu: apt install python3-dev; Fedora: dnf install python3-devel) {AGAIN}",
    "tools": f"the build tools {{names}} are missing, {PURE}; for the CPU library run "
    f"pip install cmake ninja pybind11 {AGAIN}, or install with build isolation",
    "nvcc": f"no nvcc (looked for $CUDACXX, $CUDA_HOME/bin/nvcc, nvcc and {USUAL_NVCC})",
}


def enabled(environ, name):
    return environ.get(name, "").lower() not in ("", "0", "off", "no", "false")


def max_jobs(environ, cores, available_gib):
    """Compile jobs: MAX_JOBS, else one per core but no more than one per two available GiB; at least 1."""
    asked = environ.get("MAX_JOBS", "")
    if not asked:
        return max(1, min(cores, int(available_gib / 2)))
    if not asked.isdigit() or int(asked) < 1:
        raise SystemExit(f"peftkern: MAX_JOBS must be a whole number of at least 1; got {asked!r}")
    return int(asked)


def available_gib(meminfo="/proc/meminfo", cgroup="/sys/fs/cgroup"):
    """Memory that compilers may take: the kernel's estimate, or what a container's limit leaves if that is less."""
    amounts = []
    try:
        amounts.append(1024 * int(re.search(r"MemAvailable:\s+(\d+)", Path(meminfo).read_text())[1]))
        amounts.append(int(Path(cgroup, "memory.max").read_text()) - int(Path(cgroup, "memory.current").read_text()))
    except (OSError, ValueError, TypeError):
        pass
    return min(amounts, default=4 << 30) / 2**30


def usable_cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cuda_archs(environ, known):
    """The architectures asked for, as they are; else those of the default that this nvcc knows (None: any)."""
    asked = environ.get("PEFTKERN_CUDA_ARCHS", "")
    if asked:
        return ";".join(re.split(r"[;, ]+", asked.strip("; ,")))
    return ";".join(a for a in DEFAULT_CUDA_ARCHS if known is None or a in known)


def archs_known_to(nvcc):
    """`{"80", "90", ...}` from `nvcc --list-gpu-arch`, or None where that does not run."""
    try:
        listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return set(re.findall(r"compute_(\w+)", listed))


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to build (`parts`: of "cpu", "cuda"), with which `tools`, and a sentence for each part left out."""

    parts: tuple
    tools: dict
    reasons: dict


def plan(environ, include=None, scripts=None, has_pybind11=None):
    """Decide what this machine can build. Looks at names on the search path only; runs nothing."""
    path = environ.get("PATH", "") + os.pathsep + (scripts or sysconfig.get_path("scripts"))

    def find(*names):
        return next((found for name in names if name and (found := shutil.which(name, path=path))), None)

    if enabled(environ, "PEFTKERN_SKIP_NATIVE"):
        asked = "PEFTKERN_SKIP_NATIVE is set"
        return Plan((), {}, {"cpu": asked, "cuda": asked})

    include = include or sysconfig.get_path("include")
    cxx = environ.get("CXX", "").split()
    tools = {"cxx": find(cxx[-1]) if cxx else find(*CXX_NAMES), "cmake": find("cmake"), "ninja": find("ninja")}
    if has_pybind11 is None:
        has_pybind11 = importlib.util.find_spec("pybind11") is not None
    absent = [name for name in ("cmake", "ninja") if not tools[name]] + ["pybind11"] * (not has_pybind11)
    missing = None
    if not tools["cxx"]:
        missing = HOW["compiler"] if not cxx else HOW["compiler"].replace(", ".join(CXX_NAMES), f"CXX={cxx[-1]}")
    elif not Path(include, "Python.h").exists():
        missing = HOW["headers"].format(where=include)
    elif absent:
        missing = HOW["tools"].format(names=", ".join(absent))
    if missing:
        return Plan((), tools, {"cpu": missing, "cuda": "needs the same tools as the CPU library"})

    home = environ.get("CUDA_HOME") or environ.get("CUDA_PATH")
    tools["nvcc"] = find(environ.get("CUDACXX"), home and f"{home}/bin/nvcc", "nvcc", USUAL_NVCC)
    reasons = {}
    if enabled(environ, "PEFTKERN_SKIP_CUDA"):
        reasons["cuda"] = "PEFTKERN_SKIP_CUDA is set"
    elif not tools["nvcc"]:
        reasons["cuda"] = HOW["nvcc"]
    return Plan(tuple(part for part in ("cpu", "cuda") if part not in reasons), tools, reasons)


def first_error(log):
    """What a build log says went wrong: the compiler's first error, else CMake's, else the last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    for line in lines:
        if re.search(r"\berror:|\bfatal\s*:|undefined reference|^Killed", line):
            return line
    for i, line in enumerate(lines):
        if line.startswith("CMake Error"):
            said = itertools.takewhile(lambda s: not re.match(r"CMake |Call Stack|--|It fails", s), lines[i + 1 :])
            return " ".join(itertools.islice(said, 3))
    return lines[-1] if lines else "nothing was printed"


def announce(sentence):
    """Print one line, on the terminal as well where pip swallows what a build prints."""
    line = f"peftkern: {sentence}\n"
    sys.stderr.write(line)
    if not sys.stderr.isatty():
        try:
            with open("/dev/tty", "w") as terminal:
                terminal.write("\n" + line)
        except OSError:
            pass


def left_out(sentence):
    """A native library will be missing: one line, or the end of the install where natives are required."""
    if enabled(os.environ, "PEFTKERN_REQUIRE_NATIVE"):
        raise SystemExit(f"peftkern: PEFTKERN_REQUIRE_NATIVE is set, but {sentence}")
    announce(sentence)


class BuildFailed(Exception):
    pass


class BuildPy(build_py):
    """Starts from an empty folder, so that no library or module of an earlier build travels along."""

    def run(self):
        folder = ROOT / PACKAGE if self.editable_mode else Path(self.build_lib) / PACKAGE
        if not self.editable_mode:
            shutil.rmtree(folder, ignore_errors=True)
        super().run()
        if not PLAN.parts:
            remove_libraries(folder)
            write_info(folder, {part: {"built": False, "reason": PLAN.reasons[part]} for part in ("cpu", "cuda")})
            if not enabled(os.environ, "PEFTKERN_SKIP_NATIVE"):
                left_out(PLAN.reasons["cpu"])


class CMakeBuild(build_ext):
    """Each part is configured and built by itself: a CUDA library that fails takes no CPU library with it."""

    def run(self):
        folder = ROOT / PACKAGE if self.inplace else Path(self.build_lib) / PACKAGE
        info = {part: {"built": False, "reason": reason} for part, reason in PLAN.reasons.items()}
        for part in PLAN.parts:
            try:
                library, info[part] = self.build_part(part)
            except BuildFailed as error:
                remove_libraries(folder, part)
                info[part] = {"built": False, "reason": str(error)}
                left_out(f"the {part.upper()} library did not build and is left out: {error}")
            else:
                install(library, folder)
        write_info(folder, info)

    def build_part(self, part):
        """Configure and build one part. Returns the library's path and its build info; raises BuildFailed."""
        import pybind11

        tools = PLAN.tools
        options = {
            "PEFTKERN_CPU": "ON" if part == "cpu" else "OFF",
            "PEFTKERN_CUDA": "ON" if part == "cuda" else "OFF",
            "PEFTKERN_SANITIZE": "ON" if enabled(os.environ, "PEFTKERN_SANITIZE") else "OFF",
            "CMAKE_CXX_COMPILER": tools["cxx"],
            "Python_EXECUTABLE": sys.executable,
        }
        if part == "cuda":
            options["CMAKE_CUDA_COMPILER"] = tools["nvcc"]
            options["CMAKE_CUDA_HOST_COMPILER"] = tools["cxx"]
            options["PEFTKERN_CUDA_ARCHS"] = cuda_archs(os.environ, archs_known_to(tools["nvcc"]))
        # An editable install is given a folder that goes away; objects kept in the tree make the next one quick.
        kept = ROOT / "build" / f"editable.{sys.implementation.cache_tag}"
        build = (kept if self.editable_mode else Path(self.build_temp).resolve()) / part
        fresh_folder(build, json.dumps(options))
        # These live in a folder that pip makes anew for every build, so they are no reason to start over.
        options |= {"CMAKE_MAKE_PROGRAM": tools["ninja"], "pybind11_DIR": pybind11.get_cmake_dir()}
        jobs = max_jobs(os.environ, usable_cores(), available_gib())
        defines = [f"-D{name}={value}" for name, value in options.items()]
        self.log_run(build, "configuring", [tools["cmake"], "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *defines])
        self.log_run(build, "compiling", [tools["cmake"], "--build", str(build), "--parallel", str(jobs)])
        library = build / f"_native_{part}{sysconfig.get_config_var('EXT_SUFFIX')}"
        if not library.exists():
            raise BuildFailed(f"the build left no {library.name}")
        return library, {"built": True, **json.loads((build / f"{part}_info.json").read_text())}

    def log_run(self, build, doing, command):
        print(" ".join(command), flush=True)
        log = build / f"{doing}.log"
        with log.open("w") as out:
            status = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT).returncode
        text = log.read_text(errors="replace")
        print(text, flush=True)
        if status:
            raise BuildFailed(f"{doing} failed: {first_error(text)} (all of it: {log})")

    def get_outputs(self):
        folder = ROOT / PACKAGE if self.inplace else Path(self.build_lib) / PACKAGE
        return [str(path) for path in [*folder.glob("_native_*.so"), folder / INFO_FILE]]

    def get_output_mapping(self):
        return {}

    def get_source_files(self):
        return []


def fresh_folder(build, fingerprint):
    """Keep a build folder for the same compilers and options; a change of them starts from an empty one."""
    mark = build / "fingerprint"
    if not mark.exists() or mark.read_text() != fingerprint:
        shutil.rmtree(build, ignore_errors=True)
        build.mkdir(parents=True)
        mark.write_text(fingerprint)


def install(library, folder):
    """Copy, then rename: a process that has the old library mapped keeps it."""
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / f".{library.name}.new"
    shutil.copy2(library, scratch)
    os.replace(scratch, folder / library.name)


def remove_libraries(folder, part=""):
    """A library of an earlier build that no longer belongs to these sources."""
    for library in folder.glob(f"_native_{part}*.so"):
        library.unlink()


def write_info(folder, info):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INFO_FILE).write_text(json.dumps(info, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    PLAN = plan(os.environ)
    setup(
        ext_modules=[Extension(f"{PACKAGE}._native_{part}", sources=[]) for part in PLAN.parts],
        cmdclass={"build_py": BuildPy, "build_ext": CMakeBuild},
    )
