"""Compiles the machine (engine/*.cpp) once and keeps it, and other compiled things, outside the source tree."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

ENGINE = Path(__file__).with_name("engine")
FLAGS = ["-std=c++20", "-O2", "-march=native", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC", "-Wall"]


def cache_dir() -> Path:
    """Folder of compiled things: $PTXVM_CACHE, or ~/.cache/peftkern/ptxvm."""
    root = os.environ.get("PTXVM_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    path = Path(root) if root else base / "peftkern" / "ptxvm"
    path.mkdir(parents=True, exist_ok=True)
    return path


def compiler() -> str | None:
    """The C++ compiler ($CXX or g++), or None."""
    return shutil.which(os.environ.get("CXX", "g++"))


def nvcc() -> str | None:
    """nvcc ($NVCC, the PATH or $CUDA_HOME), or None."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return os.environ.get("NVCC") or shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


def digest(*parts: str | bytes) -> str:
    """Name under which a compiled thing is kept: a hash of everything that it depends on."""
    h = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        h.update(len(data).to_bytes(8, "little"))
        h.update(data)
    return h.hexdigest()[:24]


def keep(target: Path, produce) -> Path:
    """`target`, made by `produce(path)` if it isn't there. Of several processes one makes it, the others wait."""
    if target.exists():
        return target
    with open(target.with_name(target.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=target.parent) as folder:
                made = Path(folder) / target.name
                produce(made)
                os.replace(made, target)
    return target


def command(*args: str | Path):
    """Run a compiler; its own words in the error."""
    done = subprocess.run([str(a) for a in args], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, args))}\n{done.stderr.strip()[:4000]}")
    return done.stdout


@cache
def _target_options(cxx: str) -> str:
    """What -march=native means here: a library built on another machine must not be picked up."""
    return command(cxx, "-march=native", "-Q", "--help=target") + command(cxx, "--version")


@cache
def engine() -> Path:
    """The machine as a shared library, compiled on first use (about 25 seconds of one core)."""
    cxx = compiler()
    if cxx is None:
        raise RuntimeError("the PTX machine needs a C++20 compiler: install g++ 12 or newer, or set CXX")
    files = sorted(ENGINE.iterdir())
    key = digest(_target_options(cxx), *FLAGS, *(f.name + "\n" + f.read_text() for f in files))
    units = [f for f in files if f.suffix == ".cpp"]

    def produce(made: Path):
        def unit(source: Path) -> Path:
            command(cxx, *FLAGS, "-c", source, "-o", made.with_name(source.stem + ".o"))
            return made.with_name(source.stem + ".o")

        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(unit, sorted(units, key=lambda f: -f.stat().st_size)))
        command(cxx, "-shared", "-o", made, *objects)

    return keep(cache_dir() / f"engine-{key}.so", produce)
