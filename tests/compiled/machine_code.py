"""What compiled code says of itself: registers, spills, shared memory, tensor cores, widest accesses in loops."""

import functools
import importlib.util
import json
import re
import shutil
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from ptxvm import build

# Opcodes that use tensor cores, under one name for each kind of unit.
TENSOR = re.compile(r"\b(HMMA|DMMA|IMMA|HGMMA|QGMMA|UTC[A-Z]*MMA|v_(?:smfmac|mfma)_f(?:32|64))")
# Accesses to global memory, with the bits of one lane; TMA (UBLKCP, UTMALDG, ...) moves whole tiles.
NVIDIA_GLOBAL = re.compile(r"\b(?:LDG|STG|LDGSTS)(?![A-Z])(\.[\w.]+)?")
TILE_COPY = re.compile(r"\b(?:UTMALDG|UTMASTG|UBLKCP)")
AMD_GLOBAL = re.compile(r"\b(?:global|buffer)_(?:load|store)_(?:lds_)?(dword(?:x\d)?|ushort|short|ubyte|byte|d16)")
AMD_BYTES = {"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16, "ushort": 2, "short": 2, "d16": 2}


@dataclass(frozen=True)
class Figures:
    """registers per thread; spilled bytes per thread; shared bytes per block; opcodes of tensor cores; bytes that one
    lane moves in the widest access to global memory inside a loop (0: no loop has any; tile copies count as 16)."""

    registers: int
    spilled: int
    shared: int
    tensor: tuple
    widest_in_loops: int

    def row(self):
        return {**asdict(self), "tensor": list(self.tensor)}


@functools.cache
def tool(name):
    """A tool of the CUDA toolkit: from the PATH, or the one that Triton brings; None if there is neither."""
    found, triton = shutil.which(name), importlib.util.find_spec("triton")
    if found is None and triton is not None:
        bundled = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name
        found = str(bundled) if bundled.exists() else None
    return found


def _output(*command):
    return subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True).stdout


def _widest_in_loops(lines, label_of, target_of, width_of):
    """Widest access between a label and a later branch back to it."""
    at, widest = {}, 0
    widths = [width_of(line) for line in lines]
    for k, line in enumerate(lines):
        if label := label_of(line):
            at[label] = k
        elif (target := target_of(line)) in at:
            widest = max(widest, *widths[at[target] : k + 1])
    return widest


def _nvidia_width(line):
    if TILE_COPY.search(line):
        return 16
    found = NVIDIA_GLOBAL.search(line)
    if not found:
        return 0
    suffixes = (found[1] or "").split(".")
    return next((bits // 8 for bits in (128, 64) if str(bits) in suffixes), 2 if "U16" in suffixes else 4)


def of_sass(text, registers, spilled, shared):
    """Figures of one function of nvdisasm's listing."""
    lines = text.splitlines()

    def label_of(line):
        found = re.match(r"\s*(\.L_x_\d+|\.L_\d+):", line)
        return found and found[1]

    def target_of(line):
        found = re.search(r"\bBRA\b.*?`?\(?(\.L_x_\d+|\.L_\d+)\)?", line)
        return found and found[1]

    tensor = tuple(sorted({m for line in lines for m in TENSOR.findall(line)}))
    return Figures(registers, spilled, shared, tensor, _widest_in_loops(lines, label_of, target_of, _nvidia_width))


def of_cubin(data):
    """{mangled name: Figures} of every kernel in a cubin; shared memory is the static part. Kept by content."""
    kept = build.cache_dir() / f"figures-{build.digest(Path(__file__).read_text(), data)}.json"

    def read(made):
        made.write_text(json.dumps({name: figures.row() for name, figures in _read_cubin(data).items()}))

    rows = json.loads(build.keep(kept, read).read_text())
    return {name: Figures(**{**row, "tensor": tuple(row["tensor"])}) for name, row in rows.items()}


def _read_cubin(data):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(data)
        usage = _output(tool("cuobjdump"), "--dump-resource-usage", file)
        listing = _output(tool("nvdisasm"), "-c", file)
    functions = dict(
        re.findall(r"^\s*\.section\s+\.text\.(\S+?),.*?$(.*?)(?=^\s*\.section\s|\Z)", listing, re.M | re.S)
    )
    figures = {}
    for name, facts in re.findall(r"Function (\S+?):\s*\n\s*(.*)", usage):
        n = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", facts)}
        figures[name] = of_sass(functions[name], n["REG"], n["STACK"] + n["LOCAL"], n["SHARED"])
    return figures


def of_amdgcn(text, shared):
    """Figures of the one kernel in AMD's assembly."""

    def number(key):
        return int(re.search(rf"\.{key}:\s*(\d+)", text)[1])

    lines = text.splitlines()

    def label_of(line):
        found = re.match(r"(\.LBB\d+_\d+):", line)
        return found and found[1]

    def target_of(line):
        found = re.search(r"\bs_c?branch\w*\s+(\.LBB\d+_\d+)", line)
        return found and found[1]

    def width_of(line):
        found = AMD_GLOBAL.search(line)
        return AMD_BYTES.get(found[1], 1) if found else 0

    tensor = tuple(sorted({m for line in lines for m in TENSOR.findall(line)}))
    spilled = 4 * number("vgpr_spill_count") + number("private_segment_fixed_size")
    return Figures(
        number("vgpr_count"), spilled, shared, tensor, _widest_in_loops(lines, label_of, target_of, width_of)
    )


def of_launch(launch):
    """Figures of a kernel that Triton compiled."""
    if "cubin" in launch.asm:
        (figures,) = of_cubin(launch.asm["cubin"]).values()
        return Figures(figures.registers, figures.spilled, launch.shared, figures.tensor, figures.widest_in_loops)
    return of_amdgcn(launch.asm["amdgcn"], launch.shared)
