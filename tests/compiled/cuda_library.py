"""The kernels of the CUDA library as it was built, by architecture."""

import functools
import importlib
import importlib.util
import re
import subprocess
import tempfile
from pathlib import Path

from . import machine_code

CSRC = Path(__file__).resolve().parents[2] / "csrc"
# What a block may have without and with the launcher's opting in is checked at every launch on the PTX machine; static
# shared memory is all that the binary tells.
STATIC_SHARED = 48 * 1024


def _file():
    found = importlib.util.find_spec("peftkern._native_cuda")
    return Path(found.origin) if found else None


def missing():
    """Why there is no library to look into; None if there is."""
    if _file() is None:
        return "the CUDA library was not built"
    sources = [*CSRC.glob("cuda/*"), CSRC / "bind_cuda.cpp"]
    if any(source.stat().st_mtime > _file().stat().st_mtime for source in sources):
        return "the CUDA library is older than its sources; build it again (make install)"
    if not machine_code.tool("cuobjdump") or not machine_code.tool("nvdisasm"):
        return "no cuobjdump and nvdisasm (the CUDA toolkit and Triton have them)"
    return None


def version():
    """Version of the CUDA that compiled the library."""
    number = importlib.import_module("peftkern._native_cuda").runtime_version()
    return f"{number // 1000}.{number % 1000 // 10}"


# Kernels that must use tensor cores, by the opcode, and those whose loops must move 16 bytes per lane and access.
TENSOR = {
    "householder_rows_kernel": "HMMA",
    "householder_outer_kernel": "HMMA",
    "householder_factor_kernel": "DMMA",
    "gram_schmidt_gram_kernel": "DMMA",
    "gram_schmidt_factor_kernel": "DMMA",
    "block_rotate_kernel": "HMMA",
    "block_rotate_scaled_kernel": "HMMA",
    "block_rotate_backward_kernel": "HMMA",
}
WIDE = (
    "householder_rows_kernel", "householder_outer_kernel", "gram_schmidt_gram_kernel", "block_rotate_kernel",
    "block_rotate_scaled_kernel", "block_rotate_backward_kernel", "scale_outputs_kernel", "scale_product_kernel",
)  # fmt: skip


def broken_rules(kernel, figures):
    """Rules that a kernel breaks, as sentences."""
    base = kernel.split("<")[0]
    lines = [f"{figures.spilled} bytes spilled"] if figures.spilled else []
    if figures.shared > STATIC_SHARED:
        lines.append(f"{figures.shared} bytes of static shared memory")
    if base in TENSOR and TENSOR[base] not in figures.tensor:
        lines.append(f"no {TENSOR[base]} (found: {' '.join(figures.tensor) or 'no tensor cores'})")
    if base in WIDE and figures.widest_in_loops < 16:
        lines.append(f"loops move at most {figures.widest_in_loops} bytes per access to global memory")
    return lines


@functools.cache
def figures(target):
    """{kernel with its template arguments: Figures} of an architecture; {} if the library was not built for it."""
    with tempfile.TemporaryDirectory() as folder:
        command = [machine_code.tool("cuobjdump"), "--extract-elf", f"sm_{target.removeprefix('sm')}", _file()]
        subprocess.run([str(c) for c in command], cwd=folder, check=True, capture_output=True)
        found = {}
        for cubin in Path(folder).glob("*.cubin"):
            found |= machine_code.of_cubin(cubin.read_bytes())
    names = subprocess.run(["c++filt"], input="\n".join(found), capture_output=True, text=True, check=True).stdout
    return {_short(name): f for name, f in zip(names.splitlines(), found.values(), strict=True)}


def _short(name):
    """`void peftkern::cuda::(anonymous namespace)::kernel<float, 16>(...)` as `kernel<float, 16>`."""
    name = re.sub(r"\(anonymous namespace\)::|peftkern::cuda::|^void ", "", name)
    return re.sub(r">\(.*$", ">", name) if "<" in name else name.split("(")[0]
