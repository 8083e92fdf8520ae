"""A kernel as the machine runs it: arrays of ops whose operands are byte offsets into a warp's register file."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np

from .errors import Refused
from .machine import ADDRESS_32, GENERIC, GLOBAL, LOCAL, NO_REG, OP, PARAM, SHARED, SPECIALS, handlers
from .parser import Function, Instruction, Label, Module, Variable, constant, type_bytes

_REGISTER_BASE = 1 << 30  # offsets of registers before the constants' size is known


@dataclass
class Program:
    """One entry function, ready to launch."""

    name: str
    function: Function
    module: Module
    ops: np.ndarray
    instructions: list[Instruction]  # per op
    flops: list[tuple[str, int] | None]  # per op: kind, and how many per lane
    constants: bytes
    register_bytes: int
    specials: np.ndarray
    local_bytes: int
    shared_bytes: int  # static; dynamic shared memory starts at the next multiple of 16
    param_offsets: list[int]
    param_bytes: int
    granule: dict[int, int]  # smallest access by space
    data: list[tuple[Variable, np.ndarray]] = field(default_factory=list)  # global and constant variables


class Memory:
    """Module variables in host memory; lives as long as the module's kernels."""

    def __init__(self, module: Module):
        self.buffers: dict[str, np.ndarray] = {}
        self.variables = {v.name: v for v in module.variables.values() if v.space in ("global", "const")}
        for name, variable in self.variables.items():
            raw = np.zeros(variable.size + 256, np.uint8)
            start = -raw.ctypes.data % 256
            self.buffers[name] = raw[start : start + variable.size]
            if variable.data is not None:
                self.buffers[name][: len(variable.data)] = np.frombuffer(variable.data, np.uint8)

    def address(self, name: str) -> int:
        return self.buffers[name].ctypes.data


@dataclass
class Frame:
    """One function being translated: the entry, or a device function inlined into it."""

    function: Function
    prefix: str = ""
    places: dict[str, tuple[int, int]] = field(default_factory=dict)  # variable -> (space, offset)
    params: dict[str, tuple[int, int]] = field(default_factory=dict)
    end: str | None = None  # label behind an inlined body


class Builder:
    """Collects ops. The translators in isa/ call `emit` with operands from `src`, `dst`, `pred` and `address`."""

    def __init__(self, module: Module, entry: str, memory: Memory):
        self.module, self.memory = module, memory
        self.ops: list[dict] = []
        self.instructions: list[Instruction] = []
        self.flops: list[tuple[str, int] | None] = []
        self.registers: dict[str, int] = {}
        self.register_end = 0
        self.constants: dict[tuple[bytes, int], int] = {}
        self.constant_data = bytearray()
        self.specials: dict[str, int] = {}
        self.labels: dict[str, int] = {}
        self.fixups: list[tuple[int, int | None, str]] = []  # op, operand (None: imm[0]), label
        self.local_end = self.shared_end = 0
        self.shared: dict[str, int] = {}
        self.granule = {GLOBAL: 16, SHARED: 16}
        self.inlined = 0
        self.frames = [Frame(module.functions[entry])]
        self.current: Instruction | None = None
        self.guard: tuple[int, int] = (NO_REG, 0)
        sized = [v for v in module.variables.values() if v.space == "shared" and v.size]
        for variable in [*sized, *(v for f in reachable(module, entry) for v in f.variables if v.space == "shared")]:
            self.place_shared(variable)

    @property
    def frame(self) -> Frame:
        return self.frames[-1]

    def refuse(self, what: str):
        where = f"line {self.current.line}: {self.current.text}" if self.current else self.frame.function.name
        raise Refused(f"{what} ({where})")

    # Memory of variables
    def place_shared(self, variable: Variable):
        self.shared_end = -(-self.shared_end // variable.align) * variable.align
        self.shared[variable.name] = self.shared_end
        self.shared_end += variable.size

    def place_local(self, variable_bytes: int, align: int) -> int:
        start = -(-self.local_end // max(align, 16)) * max(align, 16)
        self.local_end = start + variable_bytes
        return start

    def symbol(self, name: str) -> tuple[int, int] | None:
        """(space, address in it) of a variable or parameter; None if there's no such name."""
        frame = self.frame
        if name in frame.params:
            return frame.params[name]
        if name in frame.places:
            return frame.places[name]
        if name in self.shared:
            return SHARED, self.shared[name]
        if name in self.memory.buffers:
            return GLOBAL, self.memory.address(name)
        variable = self.module.variables.get(name)
        if variable is not None and variable.space == "shared":  # extern: behind everything static
            return SHARED, dynamic_shared_start(self.shared_end)
        return None

    # Operands
    def is_register(self, text: str) -> bool:
        return text in self.frame.function.registers

    def register_bytes(self, text: str) -> int:
        return type_bytes(self.frame.function.registers[text])

    def allocate(self, bytes_: int) -> int:
        offset = _REGISTER_BASE + self.register_end
        self.register_end += max(64, 32 * bytes_)
        return offset

    def register(self, text: str) -> int:
        key = self.frame.prefix + text
        if key not in self.registers:
            type_ = self.frame.function.registers[text]
            self.registers[key] = self.allocate(0 if type_ == "pred" else type_bytes(type_))
        return self.registers[key]

    def literal(self, data: bytes) -> int:
        """Offset of a register that holds the same constant in all lanes."""
        key = (data, len(data))
        if key not in self.constants:
            self.constants[key] = len(self.constant_data)
            image = data * 32 if len(data) > 1 else data * 64
            self.constant_data += image.ljust(64, b"\0")
        return self.constants[key]

    def number(self, value: int, bytes_: int) -> int:
        return self.literal((value & ((1 << (8 * bytes_)) - 1)).to_bytes(bytes_, "little"))

    def src(self, text: str, bytes_: int, narrow: bool = False, signed: bool = False) -> int:
        """A source operand of that size. `narrow`: a wider register gives its low bytes, a narrower one is extended."""
        if self.is_register(text):
            if self.frame.function.registers[text] == "pred":
                self.refuse(f"predicate {text} where a value is wanted")
            have = self.register_bytes(text)
            if have == bytes_:
                return self.register(text)
            if not narrow:
                self.refuse(f"{text} has {have} bytes where {bytes_} are wanted")
            return self.resized(self.register(text), have, bytes_, signed)
        if text in SPECIALS:
            if bytes_ != 4:
                value = self.special(text)
                return self.resized(value, 4, bytes_, False)
            return self.special(text)
        place = self.symbol(text.split("+")[0].strip()) if re.match(r"[%$_A-Za-z]", text) else None
        if place is not None:
            extra = int(text.partition("+")[2] or 0)
            return self.number(place[1] + extra, bytes_)
        try:
            data = constant(text, bytes_)
        except ValueError:
            self.refuse(f"operand {text}")
        if len(data) != bytes_:
            self.refuse(f"constant {text} where {bytes_} bytes are wanted")
        return self.literal(data)

    def special(self, name: str) -> int:
        if name not in self.specials:
            self.specials[name] = self.allocate(4)
        return self.specials[name]

    def resized(self, offset: int, have: int, want: int, signed: bool) -> int:
        if have == want:
            return offset
        temp = self.allocate(want)
        extend = "s" if signed and want > have else "u"
        self.emit(f"resize.{extend}{8 * have}.b{8 * want}", [temp, offset])
        return temp

    def dst(self, text: str, bytes_: int) -> int:
        """A destination register of exactly that size; `_` gives a scratch register."""
        if text == "_":
            return self.allocate(bytes_)
        if not self.is_register(text) or self.frame.function.registers[text] == "pred":
            self.refuse(f"destination {text}")
        if self.register_bytes(text) != bytes_:
            self.refuse(f"destination {text} has {self.register_bytes(text)} bytes where {bytes_} are wanted")
        return self.register(text)

    def pred(self, text: str) -> int:
        """A predicate source, with `!` allowed."""
        if text.startswith("!"):
            temp = self.allocate(0)
            self.emit("not.pred", [temp, self.pred(text[1:].strip())])
            return temp
        if self.is_register(text) and self.frame.function.registers[text] == "pred":
            return self.register(text)
        if text in ("0", "1", "-1", "true", "false"):
            return self.literal((0xFFFFFFFF if text in ("1", "-1", "true") else 0).to_bytes(4, "little"))
        self.refuse(f"predicate {text}")

    def dst_pred(self, text: str) -> int:
        if text == "_":
            return NO_REG
        if not self.is_register(text) or self.frame.function.registers[text] != "pred":
            self.refuse(f"predicate destination {text}")
        return self.register(text)

    def address(self, text: str, space: int) -> tuple[int, int, int]:
        """[register + offset], [variable + offset] or [number] -> (register or NO_REG, offset, shape bits)."""
        inside = text.strip()[1:-1].strip() if text.strip().startswith("[") else None
        match = re.fullmatch(r"([%$\w@.]+)\s*(?:\+\s*(-?\w+))?", inside or "")
        if match is None:
            self.refuse(f"address {text}")
        base, offset = match[1], int(match[2] or "0", 0)
        if self.is_register(base):
            bytes_ = self.register_bytes(base)
            if bytes_ not in (4, 8) or (bytes_ == 4 and space in (GLOBAL, GENERIC)):
                self.refuse(f"address register {base} of {bytes_} bytes")
            return self.register(base), offset, space | (ADDRESS_32 if bytes_ == 4 else 0)
        place = self.symbol(base)
        if place is not None:
            if space != GENERIC and place[0] != space and not (space == PARAM and place[0] == LOCAL):
                self.refuse(f"{base} is not in the instruction's state space")
            return NO_REG, place[1] + offset, place[0]
        if re.fullmatch(r"\d\w*", base):
            return NO_REG, int(base, 0) + offset, space
        self.refuse(f"address {text}")

    # Ops
    def emit(self, handler, a=(), flags=0, imm=(0, 0), n=0, shape=0, flops=None, guarded=True) -> int:
        """Append an op; its index. Raises Refused if the machine has no such handler."""
        index = handlers().get(handler)
        if index is None:
            self.refuse(f"{self.current.name}: the machine has no {handler}")
        guard, negated = self.guard if guarded else (NO_REG, 0)
        self.ops.append(
            {"handler": index, "guard": guard, "guard_negated": negated, "flags": flags, "a": list(a)}
            | {"imm": tuple(imm), "n": n, "shape": shape}
        )
        self.instructions.append(self.current)
        self.flops.append(flops)
        return len(self.ops) - 1

    def jump(self, label: str):
        self.fixups.append((self.emit("bra"), None, self.frame.prefix + label))

    def access(self, space: int, bytes_: int):
        """Remember the smallest access, which sets the grain of the shadow memory."""
        for each in (GLOBAL, SHARED) if space == GENERIC else (space,):
            if each in self.granule:
                self.granule[each] = min(self.granule[each], bytes_)

    def finish(self) -> Program:
        constants = len(self.constant_data)
        ops = np.zeros(len(self.ops), OP)
        ops["a"] = NO_REG
        for index, operand, label in self.fixups:
            if label not in self.labels:
                raise Refused(f"branch to {label}, which doesn't exist")
            if operand is None:
                self.ops[index]["imm"] = (self.labels[label], 0)
            else:
                self.ops[index]["a"][operand] = self.labels[label]
        for row, op in zip(ops, self.ops, strict=True):
            for key in ("handler", "guard", "guard_negated", "flags", "n", "shape"):
                row[key] = op[key]
            row["a"][: len(op["a"])] = op["a"]
            row["imm"] = op["imm"]

        def settle(x: np.ndarray) -> np.ndarray:
            moved = (x >= _REGISTER_BASE) & (x != NO_REG)
            return np.where(moved, x - _REGISTER_BASE + constants, x)

        ops["a"], ops["guard"] = settle(ops["a"]), settle(ops["guard"])
        specials = [(SPECIALS[name], offset - _REGISTER_BASE + constants) for name, offset in self.specials.items()]
        entry = self.frames[0].function
        offsets, end = param_layout(entry)
        return Program(
            entry.name, entry, self.module, ops, self.instructions, self.flops, bytes(self.constant_data),
            -(-(constants + self.register_end) // 64) * 64 + 64, np.array(specials, np.uint32).reshape(-1, 2),
            -(-self.local_end // 16) * 16, self.shared_end, offsets, end, dict(self.granule),
            [(self.memory.variables[name], buffer) for name, buffer in self.memory.buffers.items()],
        )  # fmt: skip


def reachable(module: Module, entry: str) -> list[Function]:
    """The entry and every function that it calls."""
    found, todo = [], [entry]
    while todo:
        function = module.functions.get(todo.pop())
        if function is None or function in found:
            continue
        found.append(function)
        for item in function.body:
            if isinstance(item, Instruction) and item.opcode == "call":
                todo += [o for o in item.operands if o in module.functions]
    return found


def dynamic_shared_start(static_bytes: int) -> int:
    return -(-static_bytes // 16) * 16


def param_layout(function: Function) -> tuple[list[int], int]:
    """Byte offsets of a function's parameters, and their total."""
    offsets, end = [], 0
    for param in function.params:
        end = -(-end // param.align) * param.align
        offsets.append(end)
        end += param.size
    return offsets, end


def translate(module: Module, entry: str, memory: Memory | None = None) -> Program:
    """Translate one entry of a module. Raises Refused naming everything in it that this machine doesn't execute."""
    from .isa import translate_instruction

    builder = Builder(module, entry, memory or Memory(module))
    function = module.functions[entry]
    for param, offset in zip(function.params, param_layout(function)[0], strict=True):
        builder.frame.params[param.name] = (PARAM, offset)
    refused: dict[str, str] = {}

    def body(frame: Frame):
        for variable in frame.function.variables:
            if variable.space in ("local", "param"):
                frame.places[variable.name] = (LOCAL, builder.place_local(variable.size, variable.align))
        for item in frame.function.body:
            if isinstance(item, Label):
                builder.labels[frame.prefix + item.name] = len(builder.ops)
                continue
            builder.current = item
            try:
                builder.guard = (NO_REG, 0)
                if item.guard is not None:
                    builder.guard = (builder.pred(item.guard), int(item.guard_negated))
                translate_instruction(builder, item, body)
            except Refused as error:
                refused.setdefault(item.name, str(error))

    body(builder.frame)
    builder.guard = (NO_REG, 0)
    builder.emit("exit")
    if refused:
        raise Refused(f"{entry}: " + "; ".join(refused.values()))
    return builder.finish()
