"""The package's version, the versions of others that it supports, and what was built into this installation."""

import json
import re
from importlib import metadata
from pathlib import Path

__version__ = "0.1.0"

# First and last supported minor version, both included.
SUPPORTED = {
    "torch": ((2, 11), (2, 14)),
    "triton": ((3, 6), (3, 9)),
    "peft": ((0, 21), (0, 21)),
}
_DISTRIBUTIONS = {"triton": ("triton", "pytorch-triton", "triton-rocm", "pytorch-triton-rocm", "triton-xpu")}
_IN_USE = {
    "torch": "operations may fail or fall back to the reference",
    "triton": "the Triton kernels are left alone",
    "peft": "accelerate() leaves its layers alone",
}


def installed(name):
    """Version string of an installed package, without importing it; None where there is none."""
    for distribution in _DISTRIBUTIONS.get(name, (name,)):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            pass
    return None


def supported_range(name):
    """The supported versions in words, e.g. "2.11 to 2.14"."""
    first, last = (".".join(map(str, version)) for version in SUPPORTED[name])
    return first if first == last else f"{first} to {last}"


def in_range(name, version):
    """Whether a version string lies in the supported range; patch level and local suffix do not count."""
    found = re.match(r"(\d+)\.(\d+)", version)
    first, last = SUPPORTED[name]
    return found is not None and first <= tuple(map(int, found.groups())) <= last


def check(versions=None):
    """One sentence per package whose version is not supported; an empty list when all are, or are not installed.

    Args:
        versions: name to version string, for names in `SUPPORTED`; by default what is installed.
    """
    versions = {name: installed(name) for name in SUPPORTED} if versions is None else versions
    return [
        f"{name} {version} is not supported: peftkern {__version__} is made for {supported_range(name)}, "
        f"so {_IN_USE[name]}"
        for name, version in versions.items()
        if version is not None and not in_range(name, version)
    ]


def build_info():
    """What setup.py built: `{"cpu": {...}, "cuda": {...}}`, each with "built" and, where it is not, the "reason"."""
    try:
        return json.loads(Path(__file__).with_name("_build_info.json").read_text())
    except OSError:
        reason = "this source tree has not been built; run pip install . or python setup.py build_ext --inplace"
        return {part: {"built": False, "reason": reason} for part in ("cpu", "cuda")}
