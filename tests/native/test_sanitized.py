"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, in C++ programs that check themselves."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
FLAGS = ["-std=c++17", "-O1", "-g1", "-fopenmp", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


def compiler():
    found = shutil.which(os.environ.get("CXX", "g++"))
    if not found:
        pytest.skip("no C++ compiler: g++ is not on the path and CXX names none")
    return found


def run(*command, **environment):
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout


def test_kernels_are_clean_under_the_sanitizers(tmp_path):
    cxx = compiler()
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    if subprocess.run([cxx, *FLAGS, probe, "-o", tmp_path / "probe"], capture_output=True).returncode:
        pytest.skip(f"{cxx} cannot link the sanitizers or OpenMP")

    def compile_one(source):
        target = tmp_path / f"{source.stem}.o"
        run(cxx, *FLAGS, f"-I{CSRC}", "-c", str(source), "-o", str(target))
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        checks = sorted(HERE.glob("check_*.cpp"))
        kernels = list(pool.map(compile_one, sorted((CSRC / "cpu").glob("*.cpp"))))
        programs = list(pool.map(compile_one, checks))
    for check, main in zip(checks, programs, strict=True):
        program = str(tmp_path / check.stem)
        run(cxx, *FLAGS, *kernels, main, "-o", program)
        # libgomp keeps its pool of threads for the life of the process.
        assert "0 failures" in run(program, ASAN_OPTIONS="detect_leaks=0", OMP_NUM_THREADS="2")
