"""The machine and the versions a result was measured on. `python -m bench.environment` prints the machine's slug."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

import torch

FEATURES = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "sve", "bf16")


def _cpuinfo() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    lines = [line.partition(":") for line in text.split("\n\n")[0].split("\n")]
    return {key.strip(): value.strip() for key, _, value in lines}


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def machine() -> dict[str, object]:
    """CPU model, processor features that matter here, cores, torch threads. No host name."""
    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return {
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "model": " ".join(info[key] for key in ("cpu family", "model", "stepping") if key in info),
        "features": [name for name in FEATURES if name in flags],
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
    }


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    found = {name: version(name) for name in ("torch", "peft", "lycoris-lora", "peftkern", "pytest-benchmark")}
    if found["peftkern"] is None:
        try:
            import peftkern

            found["peftkern"] = getattr(peftkern, "__version__", "source tree")
        except ImportError:
            pass
    return {"python": platform.python_version(), **found}


def backends(device_type: str = "cpu") -> dict[str, str]:
    """Which backend serves each operation on this machine, on devices of a type."""
    try:
        from peftkern import dispatch
    except ImportError:
        return {}
    served = {}
    for name, operation in dispatch.operations().items():
        served[name] = next((backend for backend, ok, _ in operation.explain_static(device_type) if ok), "none")
    return served


def commit() -> str | None:
    """The commit of this tree, with `+` where other tracked files than results differ; None outside a git checkout."""
    root = Path(__file__).parent.parent

    def git(*args: str) -> str | None:
        try:
            run = subprocess.run(["git", *args], cwd=root, capture_output=True, text=True)
        except OSError:
            return None
        return run.stdout.strip() if run.returncode == 0 else None

    head = git("rev-parse", "--short=12", "HEAD")
    return head and head + (
        "+" if git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results", ":!README.md") else ""
    )


def slug() -> str:
    """A file name for this machine's results: processor and cores."""
    info = machine()
    name = re.sub(r"\((r|tm)\)|processor|cpu|@.*", "", str(info["cpu"]).lower())
    name = "-".join(re.findall(r"[a-z0-9]+", name)) or "cpu"
    kind = "amx" if "amx_bf16" in info["features"] else "avx512" if "avx512f" in info["features"] else ""
    return "-".join(part for part in (name, kind, f"{info['cores']}cores") if part)


if __name__ == "__main__":
    print(slug())
