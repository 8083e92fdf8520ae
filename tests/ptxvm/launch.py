"""Runs a Program over a grid: parameters and memory ranges in, counts or an error out."""

from __future__ import annotations

import ctypes
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .counts import COUNTER, Counts, Traffic
from .errors import BY_KIND, PtxError, Trap
from .machine import GLOBAL, SHARED, library
from .program import Program, dynamic_shared_start

_U4, _U8 = "u4", "u8"
# Same layouts as Config, Range and ErrorOut in engine/.
_CONFIG_NUMBERS = (
    "shared_bytes", "local_bytes", "param_bytes", "reg_bytes", "const_bytes", "n_ops", "n_ranges", "n_specials",
    "seed", "resident", "check_races", "check_global_races", "check_uninitialised", "late_copies", "shared_granule",
    "global_granule", "dynamic_shared_bytes", "word_atomics",
)  # fmt: skip
_RANGE_COUNTS = ("read", "written", "sectors_read", "sectors_written", "unique_read", "unique_written")
CONFIG = np.dtype(
    [("grid", _U4, 3), ("block", _U4, 3), *((n, _U4) for n in _CONFIG_NUMBERS), ("max_ops", _U8)], align=True
)
RANGE = np.dtype(
    [("begin", _U8), ("end", _U8), *((n, _U8) for n in _RANGE_COUNTS)]
    + [("region_begin", _U8), ("region_end", _U8), ("region", _U4), ("read_only", _U4)],
    align=True,
)
ERROR = np.dtype(
    [("kind", _U4), ("op", _U4), ("other_op", _U4), ("block", _U4, 3), ("thread", _U4, 3), ("text", "S4096")],
    align=True,
)


@dataclass(frozen=True)
class Options:
    """How a launch runs.

    seed            0 runs blocks and warps in order; anything else shuffles blocks, warps, their time slices and the
                    order of atomics. Results must not depend on it.
    late_copies     cp.async moves its data in the wait that covers it (True) or at once (False)
    races           check that conflicting accesses are ordered, and that nobody touches what a cp.async is filling
    global_races    the same for global memory. A formal race may be harmless: Triton lets all warps read a scalar that
                    one thread then overwrites in place
    uninitialised   check that shared memory is written before it is read
    resident        blocks in flight together; more than one where blocks wait for each other
    max_ops         warp instructions after which a launch counts as stuck
    shared_limit    bytes of shared memory that a block may have (sm_80: 163 KiB, sm_90: 227 KiB)
    """

    seed: int = 0
    late_copies: bool = True
    races: bool = True
    global_races: bool = True
    uninitialised: bool = True
    resident: int = 1
    max_ops: int = 2_000_000_000
    shared_limit: int = 163 * 1024


@dataclass(frozen=True)
class MemoryRange:
    """Bytes [begin, end) that a kernel may touch, under the name of the argument."""

    name: str
    begin: int
    end: int
    read_only: bool = False


@dataclass(frozen=True)
class Launch:
    """A launch that ran to its end."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    counts: Counts
    seconds: float


def memory_range(tensor, name: str) -> MemoryRange | None:
    """The bytes between a strided tensor's first and last element (torch tensor or numpy array); None if it's empty."""
    if hasattr(tensor, "data_ptr"):
        begin, item, shape = tensor.data_ptr(), tensor.element_size(), tuple(tensor.shape)
        strides = tuple(s * item for s in tensor.stride())
    else:
        begin, item, shape, strides = tensor.ctypes.data, tensor.itemsize, tensor.shape, tensor.strides
    if 0 in shape:
        return None
    return MemoryRange(name, begin, begin + item + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)))


def _ranges(program: Program, given: Sequence[MemoryRange]) -> tuple[np.ndarray, list[str]]:
    """The machine's table of ranges; overlapping ones (views of one storage) share a region and its shadow memory."""
    everything = list(given)
    for variable, buffer in program.data:
        start = buffer.ctypes.data
        everything.append(MemoryRange(variable.name, start, start + variable.size, variable.space == "const"))
    table = np.zeros(len(everything), RANGE)
    order = sorted(range(len(everything)), key=lambda k: everything[k].begin)
    region, end, members = -1, -1, []
    groups: list[list[int]] = []
    for k in order:
        if everything[k].begin >= end:
            region, end, members = region + 1, everything[k].end, []
            groups.append(members)
        end = max(end, everything[k].end)
        members.append(k)
    for region, members in enumerate(groups):
        # Aligned down, so that shadow granules and sectors begin where the memory's do.
        begin = min(everything[k].begin for k in members) & ~31
        end = (max(everything[k].end for k in members) + 31) & ~31
        for k in members:
            r = everything[k]
            table[k] = (r.begin, r.end, 0, 0, 0, 0, 0, 0, begin, end, region, r.read_only)
    return table, [r.name for r in everything]


def pack_params(program: Program, values: Sequence[bytes]) -> np.ndarray:
    """Parameter values, each already of its parameter's size, at their offsets."""
    buffer = np.zeros(max(program.param_bytes, 1), np.uint8)
    for param, offset, value in zip(program.function.params, program.param_offsets, values, strict=True):
        if len(value) != param.size:
            raise ValueError(f"{program.name}: parameter {param.name} has {param.size} bytes, {len(value)} given")
        buffer[offset : offset + param.size] = np.frombuffer(value, np.uint8)
    return buffer


def triple(dims: int | Sequence[int]) -> tuple[int, int, int]:
    """Grid or block dimensions with the missing ones 1."""
    dims = (dims,) if isinstance(dims, int) else tuple(int(d) for d in dims)
    return (*dims, 1, 1, 1)[:3]


def _check_shape(program: Program, grid, block, shared: int, options: Options):
    threads = int(np.prod(block))
    if min(grid) < 1 or grid[0] >= 1 << 31 or max(grid[1:]) > 65535:
        raise Trap(f"{program.name}: grid {grid} is outside the device's limits")
    if min(block) < 1 or threads > 1024 or block[2] > 64:
        raise Trap(f"{program.name}: block {block} is outside the device's limits")
    required, most = program.function.required_threads, program.function.max_threads
    if required and triple(required) != block:
        raise Trap(f"{program.name}: block {block}, compiled for {triple(required)}")
    if most and threads > int(np.prod(most)):
        raise Trap(f"{program.name}: {threads} threads, compiled for {int(np.prod(most))} at most")
    if shared > options.shared_limit:
        raise Trap(f"{program.name}: {shared} bytes of shared memory, the device has {options.shared_limit}")


def run(
    program: Program,
    grid: int | Sequence[int],
    block: int | Sequence[int],
    params: Sequence[bytes],
    ranges: Sequence[MemoryRange],
    dynamic_shared: int = 0,
    options: Options = Options(),
) -> Launch:
    """Execute a launch. Raises a PtxError with block, thread and line for anything that goes wrong in it."""
    grid, block = triple(grid), triple(block)
    shared = program.shared_bytes
    if dynamic_shared:
        shared = dynamic_shared_start(shared) + dynamic_shared
    _check_shape(program, grid, block, shared, options)
    table, names = _ranges(program, ranges)
    buffer = pack_params(program, params)
    constants = np.frombuffer(program.constants or b"\0", np.uint8)
    counts = np.zeros(len(program.ops), COUNTER)
    config = np.zeros(1, CONFIG)
    values = {
        "grid": grid, "block": block, "shared_bytes": shared, "local_bytes": program.local_bytes,
        "param_bytes": program.param_bytes, "reg_bytes": program.register_bytes, "const_bytes": len(program.constants),
        "n_ops": len(program.ops), "n_ranges": len(table), "n_specials": len(program.specials), "seed": options.seed,
        "resident": options.resident, "check_races": options.races, "check_uninitialised": options.uninitialised,
        "late_copies": options.late_copies, "shared_granule": min(program.granule[SHARED], 4),
        "global_granule": min(program.granule[GLOBAL], 4), "dynamic_shared_bytes": dynamic_shared,
        "word_atomics": any(i.opcode == "atom" and "cas" in i.modifiers for i in program.instructions),
        "check_global_races": options.races and options.global_races, "max_ops": options.max_ops,
    }  # fmt: skip
    for key, value in values.items():
        config[0][key] = value
    error = np.zeros(1, ERROR)
    arrays = [config, program.ops, counts, table, buffer, constants, program.specials, error]
    start = time.perf_counter()
    failed = library().ptxvm_run(*(ctypes.c_void_p(a.ctypes.data) for a in arrays))
    seconds = time.perf_counter() - start
    if failed:
        raise _error(program, error[0], names)
    traffic = [
        Traffic(name, int(r["end"] - r["begin"]), int(r["read"]), int(r["written"]), int(r["sectors_read"]),
                int(r["sectors_written"]), 32 * int(r["unique_read"]), 32 * int(r["unique_written"]))
        for name, r in zip(names, table, strict=True)
    ]  # fmt: skip
    warps = -(-int(np.prod(block)) // 32)
    return Launch(program.name, grid, block, shared, Counts(program, counts, traffic, warps), seconds)


def same_in_any_order(run, seeds: Sequence[int] = (0, 1, 2, 3), **options):
    """Call run(seed=..., **options), which launches and returns a tensor, for each seed; the tensor, if all are equal
    bit for bit. Raises AssertionError with the number of differing elements otherwise."""
    first = run(seed=seeds[0], **options)
    for seed in seeds[1:]:
        other = run(seed=seed, **options)
        differing = int(((first != other) & ~((first != first) & (other != other))).sum())
        assert differing == 0, f"{differing} elements depend on the order of threads (seed {seed})"
    return first


def _error(program: Program, error: np.void, names: list[str]) -> PtxError:
    def place(index: int) -> str:
        i = program.instructions[index]
        source = f"  ({i.source[0]}:{i.source[1]})" if i.source else ""
        return f"line {i.line}: {i.text}{source}"

    text = error["text"].decode()
    text = re.sub(r"@op\((\d+)\)", lambda m: place(int(m[1])), text)
    text = re.sub(r"@range\((\d+)\)", lambda m: names[int(m[1])], text)
    block, thread = (tuple(int(x) for x in error[k]) for k in ("block", "thread"))
    text = f"{program.name}: block {block} thread {thread}: {text}"
    for key, label in (("op", "at"), ("other_op", "the other is")):
        if int(error[key]) < len(program.instructions):
            text += f"\n  {label} {place(int(error[key]))}"
    return BY_KIND[int(error["kind"])](text)
