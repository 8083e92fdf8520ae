"""Instructions that a warp executes together: shuffles, votes, reductions, matrix products, block barriers."""

from __future__ import annotations

from ..machine import FLAGS as F
from ..machine import NO_REG
from ..parser import split_operands
from . import opcode


@opcode("shfl")
def shfl(b, i, m):
    m.need("sync")
    mode = m.need("up", "down", "bfly", "idx")
    m.type("b32")
    out, value, lane, clamp, members = i.operands
    register, _, inside = out.partition("|")
    sources = [b.src(o, 4) for o in (value, lane, clamp, members)]
    b.emit(f"shfl.{mode}", [b.dst(register.strip(), 4), b.dst_pred(inside.strip() or "_"), *sources])


@opcode("vote")
def vote(b, i, m):
    m.need("sync")
    mode = m.need("all", "any", "uni", "ballot")
    m.type("b32" if mode == "ballot" else "pred")
    out, pred, members = i.operands
    register = b.dst(out, 4) if mode == "ballot" else b.dst_pred(out)
    b.emit(f"vote.{mode}", [register, b.pred(pred), b.src(members, 4)])


@opcode("redux")
def redux(b, i, m):
    m.need("sync")
    operation = m.need("add", "min", "max", "and", "or", "xor")
    type_ = m.type(*(("b32",) if operation in ("and", "or", "xor") else ("u32", "s32")))
    if operation == "add":
        type_ = "u32"
    out, value, members = i.operands
    b.emit(f"redux.{operation}.{type_}", [b.dst(out, 4), b.src(value, 4), b.src(members, 4)])


@opcode("match")
def match(b, i, m):
    mode = m.need("any", "all")
    m.need("sync")
    type_ = m.type("b32", "b64")
    out, value, members = i.operands
    register, _, same = out.partition("|")
    if same and mode == "any":
        b.refuse(f"{i.name}: predicate")
    sources = [b.src(value, 4 if type_ == "b32" else 8), b.src(members, 4)]
    b.emit(f"match.{mode}.{type_}", [b.dst(register.strip(), 4), b.dst_pred(same.strip() or "_"), *sources])


@opcode("elect")
def elect(b, i, m):
    m.need("sync")
    register, _, pred = i.operands[0].partition("|")
    out = NO_REG if register.strip() == "_" else b.dst(register.strip(), 4)
    b.emit("elect.sync", [out, b.dst_pred(pred.strip()), b.src(i.operands[1], 4)])


@opcode("activemask")
def activemask(b, i, m):
    m.type("b32")
    b.emit("activemask", [b.dst(i.operands[0], 4)])


_ELEMENTS = {"bf16": 0, "f16": 1, "tf32": 2, "s8": 3, "u8": 4, "e4m3": 5, "e5m2": 6}
_SHAPES = {
    "bf16": (8, 16), "f16": (8, 16), "tf32": (4, 8), "s8": (16, 32), "u8": (16, 32), "e4m3": (16, 32), "e5m2": (16, 32)
}  # fmt: skip


@opcode("mma")
def mma(b, i, m):
    m.need("sync")
    m.need("aligned")
    shape = m.need("m8n8k4", "m16n8k4", "m16n8k8", "m16n8k16", "m16n8k32")
    m.need("row")
    m.need("col")
    integer = m.left[-2] in ("s8", "u8")
    flags = F["SATFINITE"] if integer and m.flag("satfinite") else 0
    c = m.type("f32", "f16", "f64", "s32")
    kinds = ("f64",) if c == "f64" else tuple(_ELEMENTS)
    tb, ta = m.type(*kinds), m.type(*kinds)
    d = m.type("f32", "f16", "f64", "s32")
    parts = [split_operands(o[1:-1]) if o.startswith("{") else [o] for o in i.operands]
    k = int(shape.rpartition("k")[2])
    if c == "f64":
        if shape != "m8n8k4" or [ta, tb, d] != ["f64"] * 3:
            b.refuse(f"{i.name}: shape")
        out, *sources = parts
        registers = [*(b.dst(r, 8) for r in out), *(b.src(r, 8) for part in sources for r in part)]
        b.emit("mma.m8n8k4.f64", registers, flops=("tensor_fp64", 2 * 8 * 8 * 4 // 32))
        return
    mixed = {ta, tb} <= {"s8", "u8"} or {ta, tb} <= {"e4m3", "e5m2"}
    if not shape.startswith("m16n8") or k not in _SHAPES[ta] or (ta != tb and not mixed):
        b.refuse(f"{i.name}: shape or types")
    if (c == "s32") != integer or (d == "s32") != integer or ("f16" in (c, d) and ta not in ("f16", "e4m3", "e5m2")):
        b.refuse(f"{i.name}: accumulator")
    per = {"tf32": 1, "bf16": 2, "f16": 2}.get(ta, 4)
    want = [2 if d == "f16" else 4, k // per // 2, k // per // 4, 2 if c == "f16" else 4]
    if [len(p) for p in parts] != want:
        b.refuse(f"{i.name}: operands")
    bits = k | _ELEMENTS[ta] << 8 | _ELEMENTS[tb] << 12 | (c == "f16") << 16 | (d == "f16") << 17
    registers = [*(b.dst(r, 4) for r in parts[0]), *(b.src(r, 4) for part in parts[1:] for r in part)]
    kind = "int8" if integer else {"bf16": "bf16", "f16": "fp16", "tf32": "tf32"}.get(ta, "fp8")
    b.emit("mma.m16n8", registers, flags, shape=bits, flops=(f"tensor_{kind}", 2 * 16 * 8 * k // 32))


@opcode("bar", "barrier")
def bar(b, i, m):
    if i.opcode == "bar" and m.flag("warp"):
        m.need("sync")
        b.emit("bar.warp.sync", [b.src(i.operands[0], 4)])
        return
    m.flag("cta")
    mode = m.need("sync", "arrive", "red")
    m.flag("aligned")
    operands = list(i.operands)
    if mode == "red":
        operation = m.need("popc", "and", "or")
        m.type("u32" if operation == "popc" else "pred")
        out, number, *count, pred = operands
        register = b.dst(out, 4) if operation == "popc" else b.dst_pred(out)
        a = [b.src(number, 4), b.src(count[0], 4) if count else NO_REG, b.pred(pred), register]
        b.emit("bar", a, shape=1 + ("popc", "and", "or").index(operation))
        return
    if len(operands) not in ((2,) if mode == "arrive" else (1, 2)):
        b.refuse(f"{i.name}: {len(operands)} operands")
    a = [b.src(o, 4) for o in operands]
    b.emit("bar", [*a, NO_REG][:2], imm=(int(mode == "arrive"), 0))
