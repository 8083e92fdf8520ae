"""mov, cvt, cvta, comparisons and selection."""

from __future__ import annotations

from ..machine import FLAGS as F
from ..machine import LOCAL_WINDOW, NO_REG, PARAM_WINDOW, SHARED_WINDOW
from ..parser import split_operands, type_bytes
from . import opcode
from .arithmetic import HALVES, INTEGERS, bits

ALL = ("b16", "b32", "b64", *INTEGERS, "f32", "f64")
COMPARISONS = ["eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"]
UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
TO_INTEGRAL = {
    "rni": F["TO_INTEGRAL"] | F["RNI"],
    "rzi": F["TO_INTEGRAL"] | F["RZ"],
    "rmi": F["TO_INTEGRAL"] | F["RM"],
    "rpi": F["TO_INTEGRAL"] | F["RP"],
}
ROUNDING = {"rn": 0, "rz": F["RZ"], "rm": F["RM"], "rp": F["RP"], "rna": F["RNA"]}
SCALARS = ("u8", "s8", *INTEGERS, "f16", "bf16", "f32", "f64")


def _vector(text: str) -> list[str] | None:
    return split_operands(text.strip()[1:-1]) if text.strip().startswith("{") else None


@opcode("mov")
def mov(b, i, m):
    type_ = m.type(*ALL, "pred", "b8", "f16", "bf16", "f16x2", "bf16x2")
    out, source = i.operands
    if type_ == "pred":
        b.emit("mov.pred", [b.dst_pred(out), b.pred(source)])
        return
    size = type_bytes(type_)
    parts, into = _vector(source), _vector(out)
    if parts:
        part = size // len(parts)
        b.emit(f"pack.b{8 * part}.{bits(type_)}", [b.dst(out, size), *(b.src(p, part) for p in parts)])
    elif into:
        part = size // len(into)
        registers = [NO_REG if p == "_" else b.dst(p, part) for p in into]
        b.emit(f"unpack.b{8 * part}.{bits(type_)}", [b.src(source, size), *registers])
    else:
        b.emit(f"mov.{bits(type_)}", [b.dst(out, size), b.src(source, size)])


@opcode("cvta")
def cvta(b, i, m):
    to = m.flag("to")
    space = m.one("shared::cta", "shared", "global", "const", "local", "param::entry", "param")
    type_ = m.type("u64")
    if space is None:
        m.refuse(f"{i.name}: needs a state space")
    window = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "param": PARAM_WINDOW}.get(space.split("::")[0], 0)
    out, source = b.dst(i.operands[0], 8), b.src(i.operands[1], type_bytes(type_))
    if not window:
        b.emit("mov.b64", [out, source])
    elif to:
        b.emit("and.b64", [out, source, b.number(0xFFFFFFFF, 8)])
    else:
        b.emit("or.b64", [out, source, b.number(window, 8)])


@opcode("isspacep")
def isspacep(b, i, m):
    space = m.need("shared::cta", "shared", "global", "local", "param")
    window = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "param": PARAM_WINDOW}.get(space.split("::")[0], 0)
    b.emit("isspacep", [b.dst_pred(i.operands[0]), b.src(i.operands[1], 8)], imm=(window, 0))


def _source(b, text: str, type_: str) -> int:
    """A source whose register may be wider than its type."""
    return b.src(text, type_bytes(type_), narrow=b.is_register(text), signed=type_[0] == "s")


@opcode("cvt")
def cvt(b, i, m):
    kinds = (*SCALARS, *HALVES, "tf32", "e4m3x2", "e5m2x2")
    source_type, type_ = m.type(*kinds), m.type(*kinds)
    flags = F["FTZ"] * m.flag("ftz") | F["SAT"] * m.flag("sat") | F["RELU"] * m.flag("relu")
    flags |= F["SATFINITE"] * m.flag("satfinite")
    rounding = m.one(*TO_INTEGRAL, *ROUNDING)
    if "x2" in type_ or "x2" in source_type or type_ == "tf32":
        _cvt_packed(b, i, m, type_, source_type, flags, rounding)
        return
    if "tf32" in (source_type,) or flags & F["SATFINITE"] or rounding == "rna":
        m.refuse(f"{i.name}: modifiers")
    float_in, float_out = "f" in source_type, "f" in type_
    if float_in and not float_out and rounding not in TO_INTEGRAL:
        m.refuse(f"{i.name}: needs an integer rounding")
    if flags & F["RELU"] and type_ not in ("f16", "bf16"):
        m.refuse(f"{i.name}: .relu")
    if flags & F["FTZ"] and "f32" not in (type_, source_type):
        m.refuse(f"{i.name}: .ftz")
    if rounding is not None:
        flags |= TO_INTEGRAL[rounding] if rounding in TO_INTEGRAL else ROUNDING[rounding]
    out, source = i.operands
    value = _source(b, source, source_type)
    fast = {("f32", "s32"), ("f32", "f16"), ("f16", "f32"), ("bf16", "f32")}
    name = (
        f"cvt.fast.{type_}.{source_type}"
        if not flags and (type_, source_type) in fast
        else f"cvt.{type_}.{source_type}"
    )
    have, want = type_bytes(type_), b.register_bytes(out) if b.is_register(out) else 0
    if want <= have:
        b.emit(name, [b.dst(out, have), value], flags)
        return
    if float_out:
        b.refuse(f"{i.name}: destination {out} is wider than its type")
    temp = b.allocate(have)
    b.emit(name, [temp, value], flags)
    b.emit(f"resize.{'s' if type_[0] == 's' else 'u'}{8 * have}.b{8 * want}", [b.dst(out, want), temp])


def _cvt_packed(b, i, m, type_, source_type, flags, rounding):
    fp8 = ("e4m3x2", "e5m2x2")
    allowed = {
        **{(d, "f32"): ("rn", "rz") for d in ("f16x2", "bf16x2")},
        **{(d, s): ("rn",) for d in fp8 for s in ("f32", "f16x2")},
        **{("f16x2", s): ("rn",) for s in fp8},
        ("tf32", "f32"): ("rna", "rn", "rz"),
    }
    if rounding not in allowed.get((type_, source_type), ()) or flags & (F["FTZ"] | F["SAT"]):
        m.refuse(f"{i.name}: conversion")
    if type_ in fp8 and not flags & F["SATFINITE"]:
        m.refuse(f"{i.name}: needs .satfinite")
    flags |= ROUNDING[rounding]
    size, source_size = type_bytes(type_), type_bytes(source_type)
    name = (
        f"cvt.fast.{type_}.{source_type}"
        if not flags and type_ in ("f16x2", "bf16x2") and source_type == "f32"
        else f"cvt.{type_}.{source_type}"
    )
    b.emit(name, [b.dst(i.operands[0], size), *(b.src(o, source_size) for o in i.operands[1:])], flags)


def _compare(b, i, m, type_: str, first: int, second: int, sources: list[str], combined: str | None, how: str | None):
    comparison = m.one(*COMPARISONS, *UNSIGNED)
    if comparison is None:
        m.refuse(f"{i.name}: comparison")
    is_float = "f" in type_
    if (comparison in UNSIGNED and type_[0] not in "u") or (comparison in COMPARISONS[6:] and not is_float):
        m.refuse(f"{i.name}: .{comparison} on .{type_}")
    shape = COMPARISONS.index(UNSIGNED.get(comparison, comparison))
    flags = F["FTZ"] if type_ in ("f32", "f16", "f16x2") and m.flag("ftz") else 0
    size = type_bytes(type_)
    a, c = (b.src(s, size) for s in sources)
    extra = b.pred(combined) if combined else NO_REG
    kind = type_.replace("b", "u") if type_ in ("b16", "b32", "b64") else type_
    mode = {None: 0, "and": 1, "or": 2, "xor": 3}[how]
    b.emit(f"setp.{kind}", [first, second, a, c, extra], flags, imm=(mode, 0), shape=shape)


@opcode("setp")
def setp(b, i, m):
    type_ = m.type(*ALL, *HALVES)
    how = m.one("and", "or", "xor")
    out, *sources = i.operands
    combined = sources.pop() if how else None
    first, _, second = out.partition("|")
    second = second.strip() or "_"
    registers = [b.dst_pred(first.strip()), b.dst_pred(second)]
    _compare(b, i, m, type_, *registers, sources, combined, how)


@opcode("set")
def set_(b, i, m):
    source_type, type_ = m.type(*ALL, "f16", "bf16"), m.type("u32", "s32", "f32")
    how = m.one("and", "or", "xor")
    out, *sources = i.operands
    combined = sources.pop() if how else None
    temp = b.allocate(0)
    _compare(b, i, m, source_type, temp, NO_REG, sources, combined, how)
    yes = b.number(0x3F800000 if type_ == "f32" else -1, 4)
    b.emit("selp.b32", [b.dst(out, 4), yes, b.number(0, 4), temp])


@opcode("selp")
def selp(b, i, m):
    type_ = m.type(*ALL, "f16", "bf16")
    size = type_bytes(type_)
    out, yes, no, pred = i.operands
    b.emit(f"selp.{bits(type_)}", [b.dst(out, size), b.src(yes, size), b.src(no, size), b.pred(pred)])


@opcode("slct")
def slct(b, i, m):
    chooser, type_ = m.type("s32"), m.type("b32", "b64", *INTEGERS[2:], "f32", "f64")
    size = type_bytes(type_)
    out, yes, no, by = i.operands
    temp = b.allocate(0)
    b.emit(f"setp.{chooser}", [temp, NO_REG, b.src(by, 4), b.number(0, 4), NO_REG], shape=COMPARISONS.index("ge"))
    b.emit(f"selp.{bits(type_)}", [b.dst(out, size), b.src(yes, size), b.src(no, size), temp])
