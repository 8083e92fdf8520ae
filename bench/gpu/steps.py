"""The steps of a run. Each returns what it found and sentences about it; none knows whether another one failed."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from bench.gpu import card, child, outcomes, plan, stand_in

ROOT = Path(__file__).parents[2]
# Of ten minutes; timing gets whatever the others leave.
TOTAL_SECONDS = 600.0
REPORT_SECONDS = 10.0
SECONDS = {"environment": 30.0, "build": 120.0, "tests": 170.0, "sanitizer": 90.0, "peaks": 30.0}
SANITIZER_TOOLS = ("memcheck", "racecheck", "synccheck")
# What runs on the device, told by the ids of the fixture `backend` (tests/conftest.py).
DEVICE_TESTS = ("tests/ops", "tests/nn", "tests/integrations", "tests/test_native_cuda.py", "-k", "triton or cuda")
NAMED_FAILURES = 40


@dataclass
class Step:
    """What a step leaves: ok (None: it did not run), sentences, figures for the result file."""

    name: str
    ok: bool | None = None
    said: list[str] = field(default_factory=list)
    data: dict[str, object] = field(default_factory=dict)
    seconds: float = 0.0

    def fields(self) -> dict[str, object]:
        seconds = round(self.seconds, 1)
        return {"name": self.name, "ok": self.ok, "seconds": seconds, "said": self.said, **self.data}


@dataclass
class Run:
    """What the steps share. folder: for what processes leave behind; stop: time.time() at which all of it ends; cases:
    time at most so many; card: what `environment` found out about it."""

    dry: bool
    folder: Path
    stop: float
    cases: int | None = None
    card: dict[str, object] = field(default_factory=dict)

    def left(self, step: str) -> float:
        return max(0.0, min(SECONDS.get(step, TOTAL_SECONDS), self.stop - REPORT_SECONDS - time.time()))


def process(command: Sequence[str], seconds: float, **environ: str) -> tuple[int | None, str]:
    """(exit status, or None where it was stopped at its time; what it printed). It and its children end with it."""
    with tempfile.TemporaryFile("w+", errors="replace") as out:
        running = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **environ},
        )
        try:
            status = running.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)
            running.wait()
        out.seek(0)
        return status, out.read()


def last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it printed nothing"


def ended(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


def _child(run: Run, step: str, *options: str, seconds: float) -> tuple[int | None, str, Path]:
    out = run.folder / f"{step}.jsonl"
    dry = ["--dry-run"] if run.dry else []
    command = [sys.executable, "-m", "bench.gpu.child", step, str(out), *dry, *options]
    return *process(command, seconds), out


def environment(run: Run) -> Step:
    """What is here, and a sentence for each thing that is missing."""
    import torch

    from bench import environment as surroundings
    from peftkern import _versions

    step = Step("environment", ok=True)
    versions = surroundings.versions()
    nvcc = _tool("nvcc")
    if nvcc:
        _, text = process([nvcc, "--version"], 20)
        versions["nvcc"] = text.partition("release ")[2].partition(",")[0] or None
    versions["torch's CUDA"] = torch.version.cuda
    versions["triton"] = _versions.installed("triton")
    for name in ("lycoris-lora", "pybind11", "cmake", "ninja", "pytest"):
        versions[name] = surroundings.version(name)
    step.data = {"versions": versions, "card": {}}
    needs = {
        "triton": "the triton backend is left out",
        "nvcc": "the CUDA library is not built and the cuda backend is left out",
        "peft": "the arms PEFT and torch.compile(PEFT) are left out, and errors in mixed dtypes have no yardstick",
        "pytest": "the tests are left out",
    }
    step.said += [f"{name} is missing: {what}" for name, what in needs.items() if not versions.get(name)]
    step.said += _versions.check()
    if not _tool("compute-sanitizer"):
        step.said.append("compute-sanitizer is missing: its step is left out")
    if run.dry:
        step.said.append("dry run: a GPU would be asked for its name, driver, memory and clocks")
        return step
    if not torch.cuda.is_available():
        step.ok = False
        step.said.append("torch sees no CUDA device: nothing can be measured (--dry-run goes up to the launch)")
        return step
    status, text, out = _child(run, "card", seconds=run.left("environment"))
    found = child.lines(out)
    if found:
        run.card = step.data["card"] = found[0]["card"]
    else:
        step.ok = False
        step.said.append(f"the card's properties could not be read ({_how(status)}): {last_line(text)}")
    return step


def _how(status: int | None) -> str:
    return "stopped at its time" if status is None else ended(status)


def _tool(name: str) -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which(name) or shutil.which(name, path=f"{home}/bin")


def build(run: Run) -> Step:
    """The native libraries, in place, for this card alone; a dry run compiles the kernels and throws them away."""
    step = Step("build")
    if run.dry:
        return _compile_only(step, run)
    environ = {"PEFTKERN_REQUIRE_NATIVE": "0"}
    if "capability" in run.card:
        environ["PEFTKERN_CUDA_ARCHS"] = run.card["capability"].replace(".", "")
    status, text = process(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], run.left("build"), **environ
    )
    info = json.loads((ROOT / "peftkern" / "_build_info.json").read_text()) if status == 0 else {}
    step.ok = status == 0 and all(info.get(part, {}).get("built") for part in ("cpu", "cuda"))
    if status != 0:
        step.said.append(f"setup.py build_ext --inplace: {_how(status)}: {last_line(text)}")
    step.said += [f"no {part.upper()} library: {facts['reason']}" for part, facts in info.items() if not facts["built"]]
    step.data = {"libraries": info}
    return step


def _compile_only(step: Step, run: Run, arch: str = "sm_90") -> Step:
    nvcc = _tool("nvcc")
    step.said.append("dry run: setup.py build_ext --inplace would build for the card's architecture")
    if not nvcc:
        step.said.append("no nvcc here, so no CUDA source was compiled")
        return step
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    step.ok = True
    if any(stand_in.is_current(path) for path in (ROOT / "peftkern").glob("_native_cuda*.so")):
        step.said.append("the CUDA library here is newer than its sources, so nothing was compiled again")
        return step
    for source in sources:
        command = [nvcc, "-std=c++17", f"-arch={arch}", "-I", str(ROOT / "csrc"), "-cubin", str(source)]
        status, text = process([*command, "-o", str(run.folder / f"{source.stem}.cubin")], run.left("build"))
        if status != 0:
            step.ok = False
            step.said.append(f"{source.name} did not compile ({_how(status)}): {last_line(text)}")
    step.said.append(f"compiled for {arch}: {', '.join(source.name for source in sources)}")
    return step


def tests(run: Run) -> Step:
    """The whole test suite with the backends running natively: first what runs on the device, then the rest."""
    step = Step("tests")
    if importlib.util.find_spec("pytest") is None:
        step.said.append("pytest is missing, so no test ran")
        return step
    file, known = run.folder / "tests.jsonl", run.folder / "known.jsonl"
    base = [sys.executable, "-m", "pytest", "-q", "-p", "bench.gpu.outcomes", "--outcomes", str(file)]
    # A file that needs a package which this Python lacks takes no other file along.
    base.append("--continue-on-collection-errors")
    workers = max(1, min(8, len(os.sched_getaffinity(0)) // 2)) if importlib.util.find_spec("xdist") else 0
    spread = ["-n", str(workers), "--dist", "loadgroup"] if workers else []
    parts = {"on the device": [*base, *DEVICE_TESTS], "the rest": [*base, "tests", "--not-again", str(known)]}
    stop = time.time() + run.left("tests")
    step.ok = True
    if run.dry:
        step.said += [f"dry run: would run {' '.join([*part, *spread][1:])}" for part in parts.values()]
        parts = {"collecting": [*parts["on the device"], "--collect-only"]}
        spread = []
    for name, command in parts.items():
        left = stop - time.time()
        if left < 5:
            step.said.append(f"{name}: no time left")
            step.ok = step.ok and None
            break
        if file.exists():
            shutil.copy(file, known)
        status, text = process([*command, *spread], left, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
        if status is None:
            step.said.append(f"{name}: cut off at the end of its time; the counts are of the tests that ran")
            step.ok = step.ok and None
        else:
            step.said.append(f"{name}: {last_line(text)}")
            # 1: some failed, which their lines say; 5: none were left to run.
            step.ok = False if status not in (0, 1, 5) else step.ok
    found = child.lines(file)
    missing = {line["test"]: line["said"] for line in found if line["outcome"] == outcomes.NOT_COLLECTED}
    for said in sorted(set(missing.values())):
        files = sorted(file for file, reason in missing.items() if reason == said)
        step.said.append(f"left out, {said}: {', '.join(files)}")
    step.data = {
        "counts": dict(Counter(line["outcome"] for line in found)),
        "failures": [line for line in found if line["outcome"] == "failed"][:NAMED_FAILURES],
        "skipped": dict(Counter(line["said"] for line in found if line["outcome"] == "skipped")),
    }
    if step.data["failures"] or any("No module named" not in said for said in missing.values()):
        step.ok = False
    return step


def _no_card(step: Step) -> Step:
    step.said.append("no CUDA device, so nothing ran")
    return step


def sanitizer(run: Run) -> Step:
    """compute-sanitizer on every operation and layer at one small odd shape."""
    step = Step("sanitizer")
    tool = _tool("compute-sanitizer")
    stop = time.time() + run.left("sanitizer")
    work = [(name, backend) for name in SANITIZER_TOOLS for backend in ("cuda", "triton")]
    if run.dry:
        from bench.gpu import small
        from bench.gpu.device import StandIn

        device = StandIn()
        with device.backends() as launched:
            left_out = [line for backend in ("cuda", "triton") for line in small.run(backend, device)]
        step.ok = True
        step.said.append(f"dry run: would run the small set under {', '.join(SANITIZER_TOOLS)}")
        step.said.append(f"prepared {len(launched)} launches of {len(set(launched))} kernels and launchers")
        step.data = {"launched": sorted(set(launched)), "left_out": sorted(set(left_out))}
        return step
    if tool is None:
        step.said.append("compute-sanitizer is not installed with this CUDA, so nothing was checked")
        return step
    if not run.card:
        return _no_card(step)
    step.ok, step.data = True, {"reports": {}}
    for name, backend in work:
        left = stop - time.time()
        if left < 5:
            step.said.append(f"{name} on {backend}: no time left")
            continue
        # Without the caching allocator every tensor has an allocation of its own, whose bounds are then checked.
        command = [tool, "--tool", name, "--error-exitcode", "86", sys.executable, "-m", "bench.gpu.small", backend]
        status, text = process(command, left, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        summary = [line.lstrip("= ") for line in text.splitlines() if "SUMMARY" in line]
        said = summary[-1] if summary else last_line(text)
        step.data["reports"][f"{name} {backend}"] = said
        if status is None:
            step.said.append(f"{name} on {backend}: stopped at the end of the step's time")
        elif status != 0:
            step.ok = False
            step.said.append(f"{name} on {backend}: {ended(status)}: {said}")
            (run.folder / f"sanitizer-{name}-{backend}.txt").write_text(text)
    return step


def peaks(run: Run) -> Step:
    """The card's own copy bandwidth, matrix products and gap between launches."""
    step = Step("peaks")
    if not (run.dry or run.card):
        return _no_card(step)
    status, text, out = _child(run, "peaks", seconds=run.left("peaks"))
    found = child.lines(out)
    step.ok = bool(found)
    if not found:
        step.said.append(f"not measured ({_how(status)}): {last_line(text)}")
    elif run.dry:
        step.said.append("dry run: the same code ran at tiny sizes on the processor; its figures mean nothing")
        sizes = [f"{n >> 20} MiB" for n in card.COPY_BYTES]
        step.said.append(f"would copy {', '.join(sizes)} and multiply {', '.join(map(str, card.PRODUCT_SIZES))} square")
    else:
        step.data = found[0]["peaks"]
    return step


def timing(run: Run, restarts: int = 6) -> Step:
    """All operations and layers; a process that dies is started again without the contender that ended it."""
    step = Step("timing")
    if not (run.dry or run.card):
        return _no_card(step)
    out = run.folder / "timing.jsonl"
    stop = time.time() + run.left("timing")
    options = ["--deadline", repr(stop)] + (["--cases", str(run.cases)] if run.cases else [])
    text = ""
    for _ in range(restarts):
        left = stop - time.time()
        if left < 5:
            break
        # A little longer than the deadline that the process keeps to by itself.
        status, text, _ = _child(run, "timing", *options, seconds=left + 5)
        if status == 0:
            break
        if status is None:
            step.said.append("stopped at the end of its time, in the middle of a case")
            break
        _, _, running = child.unfinished(out)
        if running is None:
            if status != child.LOST:
                step.said.append(f"the process ended with {ended(status)}: {last_line(text)}")
                break
            continue
        case, name = running
        reason = f"ended the process with {ended(status)}: {last_line(text)}"
        if name in ("frozen", "the rounds"):
            child.append(out, failed=[case, reason], done=case)
        else:
            child.append(out, ended=[case, name, reason])
    found = child.lines(out)
    done, ended_by, _ = child.unfinished(out)
    failed = dict(line["failed"] for line in found if "failed" in line)
    planned = plan.cases(child.timed_operations())
    wanted = planned[: run.cases]
    rows = [line["row"] for line in found if "row" in line]
    step.data = {
        "rows": rows,
        "order": plan.ORDER,
        "dropped": [case.id for case in planned if case.id not in done],
        "failed": failed,
        "ended": ended_by,
    }
    step.ok = bool(rows) and not failed and not ended_by
    step.said += [f"{case}: {reason}" for case, reason in failed.items()]
    step.said += [f"{case}, {name}: {why}" for case, names in ended_by.items() for name, why in names.items()]
    missing = [case for case in wanted if case.id not in done]
    if missing:
        step.said.append(f"no time for {len(missing)} of {len(wanted)} cases; they are named in the file")
    if run.dry:
        launched = sorted({name for line in found if "launched" in line for name in line["launched"][1]})
        step.data["launched"] = launched
        step.said.append(f"dry run: {len(rows)} rows prepared at small sizes; {len(planned)} cases would be timed")
        step.said.append(f"kernels and launchers prepared: {', '.join(launched) or 'none'}")
    if not rows:
        step.said.append(f"no row was measured: {last_line(text)}")
    return step


STEPS = {
    "environment": environment,
    "build": build,
    "tests": tests,
    "sanitizer": sanitizer,
    "peaks": peaks,
    "timing": timing,
}
