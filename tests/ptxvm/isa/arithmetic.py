"""Integer, floating-point, half-precision and bit instructions."""

from __future__ import annotations

from ..machine import FLAGS as F
from ..parser import type_bytes
from . import opcode

INTEGERS = ("u16", "s16", "u32", "s32", "u64", "s64")
BITS = ("b16", "b32", "b64")
HALVES = ("f16", "bf16", "f16x2", "bf16x2")
FLOATS = ("f32", "f64", *HALVES)
ROUNDING = {"rn": 0, "rz": F["RZ"], "rm": F["RM"], "rp": F["RP"]}


def bits(type_: str) -> str:
    """The type of the same width without a sign: s32 -> b32."""
    return f"b{8 * type_bytes(type_)}"


def operands(b, i, *sizes: int, first: int | None = None) -> list[int]:
    """Destination of `first` (or sizes[0]) bytes and sources of the given sizes."""
    if len(i.operands) != len(sizes) + 1:
        b.refuse(f"{i.name}: {len(i.operands)} operands")
    out = b.dst(i.operands[0], first or sizes[0])
    return [out, *(b.src(text, size) for text, size in zip(i.operands[1:], sizes, strict=True))]


def flops(type_: str, count: int) -> tuple[str, int]:
    kind = {"f32": "fp32", "f64": "fp64"}.get(type_) or ("bf16" if type_.startswith("bf16") else "fp16")
    return kind, count * (2 if type_.endswith("x2") else 1)


def float_flags(m, type_: str, *, rounding=True, sat=True, relu=False) -> int:
    """Rounding, .ftz, .sat and .relu, as far as the type has them."""
    flags = 0
    if rounding:
        flags |= ROUNDING[m.one(*(ROUNDING if type_ == "f32" else ("rn",)), default="rn")]
    if type_ in ("f32", "f16", "f16x2") and m.flag("ftz"):
        flags |= F["FTZ"]
    if sat and type_ in ("f32", "f16", "f16x2") and m.flag("sat"):
        flags |= F["SAT"]
    if relu and type_ in HALVES and m.flag("relu"):
        flags |= F["RELU"]
    return flags


def carry_flags(i, m) -> int:
    return (F["CC_IN"] if i.opcode.endswith("c") else 0) | (F["CC_OUT"] if m.flag("cc") else 0)


@opcode("add", "sub", "addc", "subc")
def add(b, i, m):
    type_ = m.type(*INTEGERS, *(FLOATS if len(i.opcode) == 3 else ()))
    size = type_bytes(type_)
    if type_ in FLOATS:
        flags = float_flags(m, type_)
        b.emit(f"{i.opcode}.{type_}", operands(b, i, size, size), flags, flops=flops(type_, 1))
        return
    carry = carry_flags(i, m)
    name = i.opcode[:3]
    if carry:
        b.emit(f"{name}.cc.{bits(type_)}", operands(b, i, size, size), carry)
    elif type_ == "s32" and m.flag("sat"):
        b.emit(f"{name}.sat.s32", operands(b, i, size, size))
    else:
        b.emit(f"{name}.{bits(type_)}", operands(b, i, size, size))


@opcode("mul")
def mul(b, i, m):
    type_ = m.type(*INTEGERS, *FLOATS)
    size = type_bytes(type_)
    if type_ in FLOATS:
        b.emit(f"mul.{type_}", operands(b, i, size, size), float_flags(m, type_), flops=flops(type_, 1))
        return
    part = m.need("lo", "hi", "wide")
    if part == "lo":
        b.emit(f"mul.lo.{bits(type_)}", operands(b, i, size, size))
    else:
        b.emit(f"mul.{part}.{type_}", operands(b, i, size, size, first=2 * size if part == "wide" else size))


@opcode("mad", "madc")
def mad(b, i, m):
    type_ = m.type(*INTEGERS, "f32", "f64")
    if type_ in FLOATS:
        fma_of(b, i, m, type_)
        return
    size = type_bytes(type_)
    part = m.need("lo", "hi") if i.opcode == "madc" else m.need("lo", "hi", "wide")
    carry = carry_flags(i, m)
    if carry:
        b.emit(f"mad.cc.{part}.{type_}", operands(b, i, size, size, size), carry)
    elif part == "lo":
        b.emit(f"mad.lo.{bits(type_)}", operands(b, i, size, size, size))
    else:
        wide = 2 * size if part == "wide" else size
        b.emit(f"mad.{part}.{type_}", operands(b, i, size, size, wide, first=wide))


@opcode("fma")
def fma(b, i, m):
    fma_of(b, i, m, m.type(*FLOATS))


def fma_of(b, i, m, type_):
    size = type_bytes(type_)
    flags = float_flags(m, type_, relu=True)
    b.emit(f"fma.{type_}", operands(b, i, size, size, size), flags, flops=flops(type_, 2))


@opcode("mul24")
def mul24(b, i, m):
    type_ = m.type("u32", "s32")
    m.need("lo")
    b.emit(f"mul24.lo.{type_}", operands(b, i, 4, 4))


@opcode("sad")
def sad(b, i, m):
    type_ = m.type(*INTEGERS)
    size = type_bytes(type_)
    b.emit(f"sad.{type_}", operands(b, i, size, size, size))


@opcode("dp4a")
def dp4a(b, i, m):
    second, first = m.type("u32", "s32"), m.type("u32", "s32")
    b.emit(f"dp4a.{first}.{second}", operands(b, i, 4, 4, 4))


@opcode("div", "rem")
def div(b, i, m):
    type_ = m.type(*INTEGERS, *(("f32", "f64") if i.opcode == "div" else ()))
    size = type_bytes(type_)
    flags = 0
    if type_ == "f32":
        m.need("rn", "approx", "full")
        flags = F["FTZ"] if m.flag("ftz") else 0
    elif type_ == "f64":
        m.need("rn")
    b.emit(f"{i.opcode}.{type_}", operands(b, i, size, size), flags, flops=flops(type_, 1) if type_[0] == "f" else None)


@opcode("min", "max")
def minmax(b, i, m):
    type_ = m.type(*INTEGERS, *FLOATS)
    size = type_bytes(type_)
    flags = 0
    if type_ in FLOATS and type_ != "f64":
        flags = float_flags(m, type_, rounding=False, sat=False)
        flags |= F["NAN_WINS"] if m.flag("NaN") else 0
        if m.flag("xorsign"):
            m.need("abs")
            flags |= F["XORSIGN"]
    b.emit(f"{i.opcode}.{type_}", operands(b, i, size, size), flags)


@opcode("neg", "abs")
def sign(b, i, m):
    type_ = m.type("s16", "s32", "s64", *FLOATS)
    size = type_bytes(type_)
    flags = float_flags(m, type_, rounding=False, sat=False) if type_ in FLOATS else 0
    b.emit(f"{i.opcode}.{type_ if type_ in FLOATS else bits(type_)}", operands(b, i, size), flags)


@opcode("copysign")
def copysign(b, i, m):
    type_ = m.type("f32", "f64")
    size = type_bytes(type_)
    b.emit(f"copysign.{type_}", operands(b, i, size, size))


@opcode("rcp", "sqrt", "rsqrt")
def roots(b, i, m):
    type_ = m.type("f32", "f64")
    how = m.need("approx") if i.opcode == "rsqrt" else m.need("rn", "approx")
    flags = F["FTZ"] if m.flag("ftz") else 0
    if type_ == "f32":
        b.emit(f"{i.opcode}.f32", operands(b, i, 4), flags, flops=("special", 1))
    else:
        approx = ".approx" if how == "approx" else ""
        if flags and not approx:
            m.refuse(f"{i.name}: .ftz")
        b.emit(f"{i.opcode}{approx}.f64", operands(b, i, 8), flops=("fp64", 1))


@opcode("ex2", "lg2", "sin", "cos", "tanh")
def special(b, i, m):
    m.need("approx")
    type_ = m.type("f32", *(HALVES if i.opcode in ("ex2", "tanh") else ()))
    flags = F["FTZ"] if m.flag("ftz") else 0
    b.emit(
        f"{i.opcode}.{type_}", operands(b, i, type_bytes(type_)), flags, flops=("special", 2 if "x2" in type_ else 1)
    )


@opcode("testp")
def testp(b, i, m):
    type_ = m.type("f32", "f64")
    test = m.need("finite", "infinite", "number", "notanumber", "normal", "subnormal")
    b.emit(f"testp.{test}.{type_}", [b.dst_pred(i.operands[0]), b.src(i.operands[1], type_bytes(type_))])


@opcode("and", "or", "xor", "not", "cnot")
def logic(b, i, m):
    type_ = m.type(*BITS, *(() if i.opcode == "cnot" else ("pred",)))
    if type_ == "pred":
        b.emit(f"{i.opcode}.pred", [b.dst_pred(i.operands[0]), *(b.pred(o) for o in i.operands[1:])])
        return
    size = type_bytes(type_)
    b.emit(f"{i.opcode}.{type_}", operands(b, i, *[size] * (len(i.operands) - 1)))


@opcode("shl", "shr")
def shift(b, i, m):
    type_ = m.type(*BITS, *(INTEGERS if i.opcode == "shr" else ()))
    size = type_bytes(type_)
    name = f"shl.{type_}" if i.opcode == "shl" else f"shr.{type_.replace('b', 'u')}"
    b.emit(name, operands(b, i, size, 4))


@opcode("shf")
def funnel(b, i, m):
    m.type("b32")
    side, mode = m.need("l", "r"), m.need("clamp", "wrap")
    b.emit(f"shf.{side}.{mode}.b32", operands(b, i, 4, 4, 4))


@opcode("bfe")
def bfe(b, i, m):
    type_ = m.type("u32", "s32", "u64", "s64")
    b.emit(f"bfe.{type_}", operands(b, i, type_bytes(type_), 4, 4))


@opcode("bfi")
def bfi(b, i, m):
    type_ = m.type("b32", "b64")
    size = type_bytes(type_)
    b.emit(f"bfi.{type_}", operands(b, i, size, size, 4, 4))


@opcode("bfind")
def bfind(b, i, m):
    type_ = m.type("u32", "s32", "u64", "s64")
    amount = ".shiftamt" if m.flag("shiftamt") else ""
    b.emit(f"bfind{amount}.{type_}", operands(b, i, type_bytes(type_), first=4))


@opcode("popc", "clz", "brev")
def counts(b, i, m):
    type_ = m.type("b32", "b64")
    size = type_bytes(type_)
    b.emit(f"{i.opcode}.{type_}", operands(b, i, size, first=size if i.opcode == "brev" else 4))


@opcode("prmt")
def prmt(b, i, m):
    mode = m.one("f4e", "b4e", "rc8", "ecl", "ecr", "rc16")
    m.type("b32")
    b.emit("prmt.b32" + (f".{mode}" if mode else ""), operands(b, i, 4, 4, 4))


@opcode("lop3")
def lop3(b, i, m):
    m.type("b32")
    *registers, table = i.operands
    sources = [b.src(r, 4) for r in registers[1:]]
    b.emit("lop3.b32", [b.dst(registers[0], 4), *sources], imm=(int(table, 0), 0))
