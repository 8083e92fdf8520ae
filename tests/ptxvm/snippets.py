"""Runs one PTX instruction on columns of inputs: what the instruction tests are written with."""

from __future__ import annotations

import numpy as np

from .launch import MemoryRange, Options, run
from .parser import parse, type_bytes
from .program import translate

_REGISTER = {"pred": "pred", 1: "b16", 2: "b16", 4: "b32", 8: "b64"}
_NUMPY = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def module(body: str, registers: str = "", params: int = 2, target: str = "sm_80", extra: str = "") -> str:
    """PTX text of a kernel `k` whose parameters p0.. are loaded into %p0..; %t is the thread's index."""
    declared = ",\n".join(f".param .u64 p{i}" for i in range(params))
    loads = "\n".join(f"ld.param.u64 %p{i}, [p{i}];" for i in range(params))
    return f"""
.version 8.0
.target {target}
.address_size 64
{extra}
.visible .entry k({declared})
{{
.reg .b64 %p<{params}>;
.reg .b32 %t;
{registers}
{loads}
mov.u32 %t, %tid.x;
{body}
ret;
}}
"""


def run_text(text: str, arrays, grid=1, block=32, shared=0, **options):
    """Launch the kernel `k` of a PTX text on numpy arrays; the Launch."""
    program = translate(parse(text), "k")
    ranges, params = [], []
    for index, array in enumerate(arrays):
        begin = array.ctypes.data
        ranges.append(MemoryRange(f"p{index}", begin, begin + array.nbytes))
        params.append(begin.to_bytes(8, "little"))
    return run(program, grid, block, params, ranges, shared, Options(**options))


def bits(values, type_: str) -> np.ndarray:
    """Inputs as raw bits: ints as they are (two's complement), floats rounded to f16, f32 or f64."""
    size = type_bytes(type_)
    if type_ in ("f16", "f32", "f64"):
        kind = {"f16": np.float16, "f32": np.float32, "f64": np.float64}[type_]
        if all(isinstance(v, (float, np.floating)) for v in values):
            with np.errstate(over="ignore"):
                return np.array(values, kind).view(_NUMPY[size])
    return np.array([int(v) & ((1 << (8 * size)) - 1) for v in values], _NUMPY[size])


def evaluate(instruction: str, out: str, ins: str, *columns) -> list:
    """The results of `instruction` over columns of inputs, as numbers of type `out`.

    The text names its result {d} and its sources {a}, {b}, {c}, {e}. A result or source of type pred is 0 or 1. Floats
    in the columns are rounded to their type; ints are raw bits.
    """
    types = ins.split()
    n = len(columns[0])
    lanes = max(32, -(-n // 32) * 32)
    arrays, registers, body = [], "", ""
    for index, (type_, column) in enumerate(zip(types, columns, strict=True)):
        size = type_bytes(type_)
        data = np.zeros(lanes, _NUMPY[size])
        data[:n] = bits(column, "u8" if type_ == "pred" else type_)
        arrays.append(data)
        register = _REGISTER[max(size, 2)]
        registers += f".reg .b64 %a{index}; .reg .{register} %i{index}; .reg .pred %q{index};\n"
        body += f"mad.wide.u32 %a{index}, %t, {size}, %p{index};\nld.global.b{8 * size} %i{index}, [%a{index}];\n"
        if type_ == "pred":
            body += f"setp.ne.u16 %q{index}, %i{index}, 0;\n"
    size = type_bytes(out)
    result = np.zeros(lanes, _NUMPY[size])
    arrays.append(result)
    last = len(types)
    registers += f".reg .b64 %ad; .reg .{_REGISTER[max(size, 2)]} %d; .reg .pred %dq;\n"
    names = {name: (f"%q{k}" if types[k] == "pred" else f"%i{k}") for k, name in enumerate("abce"[: len(types)])}
    body += f"mad.wide.u32 %ad, %t, {size}, %p{last};\n"
    body += instruction.format(d="%dq" if out == "pred" else "%d", **names) + ";\n"
    if out == "pred":
        body += "selp.u16 %d, 1, 0, %dq;\n"
    body += f"st.global.b{8 * size} [%ad], %d;\n"
    run_text(module(body, registers, len(arrays)), arrays, block=lanes)
    result = result[:n]
    kind = {"f16": np.float16, "f32": np.float32, "f64": np.float64}.get(out)
    if kind is not None:
        return result.view(kind).tolist()
    if out[0] == "s":
        return result.view({1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}[size]).tolist()
    return result.tolist()
