"""Loads, stores, atomics, matrix loads, asynchronous copies and fences."""

from __future__ import annotations

from ..machine import FLAGS as F
from ..machine import GENERIC, GLOBAL, LOCAL, NO_REG, PARAM, SHARED
from ..parser import split_operands, type_bytes
from . import opcode

TYPES = ("b8", "u8", "s8", "b16", "u16", "s16", "b32", "u32", "s32", "b64", "u64", "s64", "f16", "bf16", "f32", "f64")
SPACES = {
    "global": GLOBAL,
    "const": GLOBAL,
    "shared": SHARED,
    "shared::cta": SHARED,
    "local": LOCAL,
    "param": PARAM,
    "param::entry": PARAM,
    "param::func": PARAM,
}
# Hints about caches: they change no value.
HINTS = (
    "ca", "cg", "cs", "lu", "cv", "wb", "wt", "L1::evict_normal", "L1::evict_unchanged", "L1::evict_first",
    "L1::evict_last", "L1::no_allocate", "L2::evict_first", "L2::evict_last", "L2::evict_normal", "L2::64B", "L2::128B",
    "L2::256B",
)  # fmt: skip
STRONG, ACQUIRE, RELEASE = F["STRONG"], F["ACQUIRE"], F["RELEASE"]


def _space(m) -> int:
    name = m.one(*SPACES)
    return GENERIC if name is None else SPACES[name]


def _ordering(m, *allowed: str) -> int:
    """Memory-order modifiers as flags; scopes within the device all mean the same here."""
    order = m.one(*allowed)
    m.one("cta", "gpu", "sys")
    return {
        None: 0,
        "weak": 0,
        "volatile": STRONG,
        "relaxed": STRONG,
        "acquire": STRONG | ACQUIRE,
        "release": STRONG | RELEASE,
        "acq_rel": STRONG | ACQUIRE | RELEASE,
    }[order]


def _hints(b, i, m, operands: list[str], plain: int) -> list[str]:
    """Take cache hints; the operand of .L2::cache_hint is dropped."""
    while m.one(*HINTS):
        pass
    if m.flag("L2::cache_hint"):
        b.src(operands[-1], 8)
        operands = operands[:-1]
    if len(operands) != plain:
        b.refuse(f"{i.name}: {len(operands)} operands")
    return operands


def _vector(m) -> int:
    return int((m.one("v2", "v4", "v8") or "v1")[1:])


def _elements(b, text: str, count: int) -> list[str]:
    parts = split_operands(text[1:-1]) if text.startswith("{") else [text]
    if len(parts) != count:
        b.refuse(f"{len(parts)} registers for {count} elements")
    return parts


@opcode("ld", "ldu")
def ld(b, i, m):
    type_ = m.type(*TYPES)
    flags = _ordering(m, "weak", "volatile", "relaxed", "acquire")
    space, count = _space(m), _vector(m)
    if m.flag("nc"):
        flags |= F["READ_ONLY"]
    out, where = _hints(b, i, m, i.operands, 2)
    register, offset, shape = b.address(where, space)
    size = type_bytes(type_)
    parts = _elements(b, out, count)
    widths = {b.register_bytes(p) for p in parts if p != "_"} or {max(size, 2)}
    if len(widths) > 1:
        b.refuse(f"{i.name}: registers of different sizes")
    width = widths.pop()
    registers = [NO_REG if p == "_" else b.dst(p, width) for p in parts]
    b.access(shape & 7, size)
    sign = "s" if type_[0] == "s" and width > size else "u"
    b.emit(f"ld.{sign}{8 * size}.b{8 * width}", [register, *registers], flags, imm=(offset, 0), n=count, shape=shape)


@opcode("st")
def st(b, i, m):
    type_ = m.type(*TYPES)
    flags = _ordering(m, "weak", "volatile", "relaxed", "release")
    space, count = _space(m), _vector(m)
    where, data = _hints(b, i, m, i.operands, 2)
    register, offset, shape = b.address(where, space)
    size = type_bytes(type_)
    parts = _elements(b, data, count)
    widths = {b.register_bytes(p) for p in parts if b.is_register(p)} or {max(size, 2)}
    if len(widths) > 1:
        b.refuse(f"{i.name}: registers of different sizes")
    width = widths.pop()
    registers = [b.src(p, width) for p in parts]
    b.access(shape & 7, size)
    b.emit(f"st.b{8 * width}.u{8 * size}", [register, *registers], flags, imm=(offset, 0), n=count, shape=shape)


ATOMS = {
    "add": ("u32", "s32", "u64", "s64", "f32", "f64", "f16", "bf16", "f16x2", "bf16x2"),
    "min": ("u32", "s32", "u64", "s64"),
    "max": ("u32", "s32", "u64", "s64"),
    "and": ("b32", "b64"),
    "or": ("b32", "b64"),
    "xor": ("b32", "b64"),
    "exch": ("b32", "b64"),
    "cas": ("b16", "b32", "b64"),
    "inc": ("u32",),
    "dec": ("u32",),
}


@opcode("atom", "red")
def atom(b, i, m):
    operation = m.need(*ATOMS)
    type_ = m.type(*ATOMS[operation])
    flags = STRONG | _ordering(m, "relaxed", "acquire", "release", "acq_rel")
    space = _space(m)
    if type_ in ("f16", "bf16", "f16x2", "bf16x2"):
        m.need("noftz")
    returns = i.opcode == "atom"
    operands = _hints(b, i, m, i.operands, 2 + returns + (operation == "cas"))
    size = type_bytes(type_)
    out = b.dst(operands[0], size) if returns else NO_REG
    where, *values = operands[returns:]
    register, offset, shape = b.address(where, space)
    sources = [b.src(v, size) for v in values]
    b.access(shape & 7, size)
    flags |= 0 if returns else F["NO_RETURN"]
    a = [register, out, *sources, NO_REG][:4]
    b.emit(f"atom.{operation}.{type_}", a, flags, imm=(offset, 0), n=1, shape=shape)


@opcode("ldmatrix", "stmatrix")
def matrix(b, i, m):
    m.need("sync")
    m.need("aligned")
    m.need("m8n8")
    count = int(m.need("x1", "x2", "x4")[1:])
    flags = F["TRANS"] if m.flag("trans") else 0
    m.one("shared::cta", "shared")
    m.type("b16")
    operands = i.operands if i.opcode == "ldmatrix" else i.operands[::-1]
    register, offset, shape = b.address(operands[1], SHARED)
    parts = _elements(b, operands[0], count)
    registers = [b.dst(p, 4) if i.opcode == "ldmatrix" else b.src(p, 4) for p in parts]
    b.access(SHARED, 16)
    b.emit(i.opcode, [register, *registers], flags, imm=(offset, 0), n=count, shape=shape)


@opcode("cp")
def cp(b, i, m):
    m.need("async")
    if m.flag("commit_group"):
        b.emit("cp.async.commit_group")
    elif m.flag("wait_group"):
        b.emit("cp.async.wait_group", imm=(int(i.operands[0], 0), 0))
    elif m.flag("wait_all"):
        b.emit("cp.async.wait_all")
    else:
        _copy(b, i, m)


def _copy(b, i, m):
    cache = m.need("ca", "cg")
    m.need("shared", "shared::cta")
    m.need("global")
    operands = list(i.operands)
    while m.one("L2::64B", "L2::128B", "L2::256B"):
        pass
    if m.flag("L2::cache_hint"):
        operands.pop()
    dest, source, size, *rest = operands
    bytes_ = int(size, 0)
    if bytes_ not in ((16,) if cache == "cg" else (4, 8, 16)) or len(rest) > 1:
        b.refuse(f"{i.name}: operands")
    dest_register, dest_offset, shape = b.address(dest, SHARED)
    register, offset, _ = b.address(source, GLOBAL)
    if register == NO_REG:
        b.refuse(f"{i.name}: source address")
    read_size = ignored = NO_REG
    if rest:
        name = rest[0].lstrip("!")
        if b.is_register(name) and b.frame.function.registers[name] == "pred":
            ignored = b.pred(rest[0])
        else:
            read_size = b.src(rest[0], 4)
    b.access(SHARED, 4)
    b.access(GLOBAL, 4)
    a = [dest_register, register, read_size, ignored]
    b.emit("cp.async", a, imm=(dest_offset, offset), n=bytes_, shape=shape)


@opcode("membar", "fence")
def fence(b, i, m):
    if i.opcode == "membar":
        m.need("cta", "gl", "sys")
    else:
        m.one("acq_rel", "sc")
        m.need("cta", "gpu", "sys")
    b.emit("fence")


@opcode("prefetch", "prefetchu")
def prefetch(b, i, m):
    m.one("global", "local")
    m.need("L1", "L2", "L2::evict_last", "L2::evict_normal")
    b.emit("nop")


@opcode("createpolicy")
def createpolicy(b, i, m):
    """A cache policy: its value goes nowhere but into hints."""
    m.need("fractional")
    m.need(*(h for h in HINTS if h.startswith("L2::evict")), "L2::evict_unchanged")
    m.one(*(h for h in HINTS if h.startswith("L2::evict")), "L2::evict_unchanged")
    m.type("b64")
    b.emit("mov.b64", [b.dst(i.operands[0], 8), b.number(0, 8)])
