"""Branches, exits and calls. A device function is inlined at each call."""

from __future__ import annotations

from ..machine import LOCAL
from ..parser import split_operands
from ..program import Frame
from . import opcode


@opcode("bra")
def bra(b, i, m):
    m.flag("uni")
    b.jump(i.operands[0])


@opcode("brx")
def brx(b, i, m):
    m.need("idx")
    m.flag("uni")
    index, table = i.operands
    targets = b.frame.function.branch_targets.get(table)
    if targets is None or len(targets) > 15:
        b.refuse(f"{i.name}: table {table} of {len(targets or [])} labels (15 at most)")
    op = b.emit("brx", [b.src(index, 4), *[0] * len(targets)], n=len(targets))
    b.fixups += [(op, 1 + k, b.frame.prefix + t) for k, t in enumerate(targets)]


@opcode("ret", "exit")
def ret(b, i, m):
    m.flag("uni")
    if i.opcode == "ret" and b.frame.end is not None:
        b.jump(b.frame.end)
    else:
        b.emit("exit")


@opcode("trap", "brkpt")
def trap(b, i, m):
    b.emit("trap")


@opcode("nanosleep")
def nanosleep(b, i, m):
    m.type("u32")
    b.emit("nop")


def call(b, i, body):
    """call{.uni} (returned), function, (params)."""
    if [x for x in i.modifiers if x != "uni"]:
        b.refuse(f"{i.name}: unknown modifier")
    operands = list(i.operands)
    returned = split_operands(operands.pop(0)[1:-1]) if operands[0].startswith("(") else []
    name = operands.pop(0)
    passed = split_operands(operands.pop(0)[1:-1]) if operands else []
    if operands:
        b.refuse("indirect call")
    if name == "__assertfail":
        b.emit("trap")
        return
    function = b.module.functions.get(name)
    if function is None or not function.body:
        b.refuse(f"call of {name}, which has no body here")
    if any(f.function is function for f in b.frames):
        b.refuse(f"call of {name}: recursion")
    b.inlined += 1
    frame = Frame(function, prefix=f"{name}#{b.inlined}:", end="#end")
    for param, argument in zip([*function.params, *function.returns], [*passed, *returned], strict=True):
        place = b.symbol(argument)
        if place is None or place[0] != LOCAL:
            b.refuse(f"call of {name}: argument {argument}")
        frame.params[param.name] = place
    guard, current = b.guard, b.current
    skip = None
    if i.guard is not None:
        skip = f"{frame.prefix}skip"
        b.guard = (guard[0], 1 - guard[1])
        b.fixups.append((b.emit("bra"), None, skip))
    b.frames.append(frame)
    body(frame)
    b.frames.pop()
    b.labels[frame.prefix + frame.end] = len(b.ops)
    if skip:
        b.labels[skip] = len(b.ops)
    b.guard, b.current = guard, current
