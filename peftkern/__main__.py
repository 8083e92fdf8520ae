"""`python -m peftkern`: the environment, what is built, and which backend serves each operation; made to be pasted."""

import argparse
import importlib
import json
import os
import platform
import re
import sys
import textwrap
from pathlib import Path

from peftkern import _native, _versions

FEATURES = """avx2 fma f16c avx512f avx512bw avx512vl avx512_bf16 avx512_fp16 amx_tile amx_bf16 amx_int8
asimd asimdhp bf16 sve i8mm"""
WIDTH = 118
LEVELS = "Proven by tests (0 formulas, 1 C++, 2 Triton interpreted, 3 compiled, 4 PTX executed on the CPU, 5 on a GPU)"


def _read(path):
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _section(title, rows):
    """Lines of one section: `rows` are pairs of label and text; a long text goes on under itself."""
    indent = 4 + max(len(label) for label, _ in rows)
    lines = [title]
    for label, text in rows:
        first = f"  {label}".ljust(indent)
        lines += textwrap.wrap(first + text, WIDTH, subsequent_indent=" " * indent, break_on_hyphens=False)
    return lines


def cuda_version(number):
    """13000 -> "13.0", as CUDA counts its versions."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _library(part):
    """The native module, or None and the reason why it does not load."""
    try:
        return importlib.import_module(f"peftkern._native_{part}"), None
    except ImportError as error:
        return None, str(error)


def versions(torch):
    rows = [("peftkern", _versions.__version__)]
    rows.append(("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"))
    accelerator = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU alone"
    if torch.version.hip:
        accelerator = f"ROCm {torch.version.hip}"
    for name in _versions.SUPPORTED:
        found = torch.__version__ if name == "torch" else _versions.installed(name)
        text = f"{found or 'not installed'} (supported: {_versions.supported_range(name)})"
        rows.append((name, text + (f", built for {accelerator}" if name == "torch" else "")))
    return rows


def devices(torch):
    model = re.search(r"model name\s*:\s*(.+)", _read("/proc/cpuinfo"))
    name = model[1].strip() if model else platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    rows = [("cpu", f"{name}, {cores} cores, torch uses {torch.get_num_threads()} threads")]
    for kind in ("cuda", "xpu"):
        module = getattr(torch, kind)
        for i in range(module.device_count() if module.is_available() else 0):
            p = module.get_device_properties(i)
            capability = f", capability {p.major}.{p.minor}" if kind == "cuda" and not torch.version.hip else ""
            rows.append((f"{kind}:{i}", f"{p.name}{capability}, {p.total_memory / 2**30:.0f} GiB"))
    if len(rows) == 1:
        rows.append(("gpu", "none that this torch can use"))
    names, source = features()
    rows.append(("features", f"{names} (from {source})"))
    return rows


def features():
    """Names of the processor's features that kernels care about, and who said so."""
    cpu, _ = _library("cpu")
    if cpu is not None:
        return " ".join(name for name, present in cpu.features().items() if present) or "none", "the CPU library"
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    if not flags:
        return "unknown", "nowhere: no /proc/cpuinfo"
    present = set(flags[1].split())
    return " ".join(name for name in FEATURES.split() if name in present) or "none", "/proc/cpuinfo"


def openmp_runtimes():
    """The OpenMP runtimes mapped into this process, or None where the system does not tell."""
    maps = _read("/proc/self/maps")
    return sorted(set(re.findall(r"\S*/lib(?:g|i|)omp[^/\s]*\.so\S*", maps))) if maps else None


def built():
    """Pairs of library and what is to be said of it."""
    info = _versions.build_info()
    rows = []
    for part in ("cpu", "cuda"):
        facts = info[part]
        label = f"{part.upper()} library"
        module, failure = _library(part)
        if not facts["built"]:
            rows.append((label, f"no: {facts['reason']}" if module is None else "yes, but not put here by setup.py"))
            continue
        if module is None:
            rows.append((label, f"built by {facts['compiler']}, but does not load: {failure}"))
            continue
        text = f"yes, built by {facts['compiler']}"
        if part == "cuda":
            runtime, driver = module.runtime_version(), module.driver_version()
            text += f" for {facts['archs']}, CUDA runtime {cuda_version(runtime)}"
            if not driver:
                text += ", no driver here"
            elif driver // 1000 < runtime // 1000:
                text += f", but the driver serves CUDA {cuda_version(driver)}: update it, or build with a CUDA like it"
            else:
                text += f", driver for CUDA {cuda_version(driver)}"
        else:
            text += f", OpenMP {facts['openmp']}" if facts["openmp"] else ", no OpenMP: one thread"
            text += f", kernels for {_native.cpu_isa()}"
        if facts.get("sanitized") == "ON":
            text += ", with sanitizers"
        rows.append((label, text))
    runtimes = openmp_runtimes()
    if runtimes:
        names = ", ".join("/".join(Path(path).parts[-3:]) for path in runtimes)
        shared = "one, shared with torch" if len(runtimes) == 1 else f"{len(runtimes)}, so thread counts are set apart"
        rows.append(("OpenMP runtime", f"{shared}: {names}"))
    return rows


def backends(device_type, operations):
    """Pairs of operation and the backend that serves it on a device type, with the reasons of those that do not."""
    rows = []
    for name, operation in sorted(operations.items()):
        found = operation.explain_static(device_type)
        serving = next((backend for backend, ok, _ in found if ok), "nothing")
        reasons = "; ".join(f"{backend}: {reason}" for backend, ok, reason in found if not ok)
        rows.append((name, f"{serving}   ({reasons})" if reasons else serving))
    return rows


def proven():
    """Pairs of operation and the levels proven for each backend, from the table that the test suite writes."""
    table = json.loads(_read(Path(__file__).with_name("_proven.json")) or '{"levels": {}}')["levels"]
    return [
        (name, ", ".join(f"{backend} {'+'.join(map(str, levels))}" for backend, levels in sorted(row.items())))
        for name, row in table.items()
    ]


def report():
    """The whole report as a list of lines."""
    import torch

    from peftkern import dispatch

    lines = [*_section("Versions", versions(torch)), "", *_section("Devices", devices(torch))]
    lines += ["", *_section("Built", built())]
    switches = [(name, os.environ[name]) for name in sorted(os.environ) if name.startswith("PEFTKERN_")]
    if switches:
        lines += ["", *_section("Switches in the environment", switches)]

    if rows := proven():
        lines += ["", *_section(LEVELS, rows)]

    operations = dispatch.operations()
    kinds = ["cpu", *(kind for kind in ("cuda", "xpu") if getattr(torch, kind).is_available())]
    for kind in kinds:
        lines += ["", *_section(f"Who serves {kind} tensors", backends(kind, operations))]
    idle = [b for b in dispatch.BACKENDS if not any(b in dispatch.PREFERENCE[kind] for kind in kinds)]
    if idle:
        wanted = " or ".join(kind for kind in dispatch.PREFERENCE if kind not in kinds)
        lines.append(f"  {' and '.join(idle)} serve {wanted} tensors, and no such device is here")

    found = {name: _versions.installed(name) for name in _versions.SUPPORTED}
    problems = _versions.check({**found, "torch": torch.__version__})
    return [*lines, "", *([f"Warning: {problem}" for problem in problems] or ["All versions are supported."])]


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m peftkern", description=__doc__.split(": ", 1)[1])
    parser.add_argument("--built", action="store_true", help="say in two lines which native libraries there are")
    options = parser.parse_args(argv)
    lines = [f"{label}: {text}" for label, text in built() if "library" in label] if options.built else report()
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
