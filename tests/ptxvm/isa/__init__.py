"""PTX instructions by group. A translator takes the modifiers that it knows; one left over refuses the instruction."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import Refused
from ..parser import Instruction

TRANSLATORS: dict[str, Callable] = {}


def opcode(*names: str):
    """Register a translator f(builder, instruction, modifiers) for these opcodes."""

    def register(function):
        for name in names:
            TRANSLATORS[name] = function
        return function

    return register


class Modifiers:
    """The modifiers of an instruction that nobody has taken yet."""

    def __init__(self, instruction: Instruction):
        self.instruction = instruction
        self.left = list(instruction.modifiers)

    def refuse(self, why: str):
        raise Refused(f"{why} (line {self.instruction.line}: {self.instruction.text})")

    def flag(self, name: str) -> bool:
        """Take the modifier if it's there."""
        if name in self.left:
            self.left.remove(name)
            return True
        return False

    def one(self, *names: str, default: str | None = None) -> str | None:
        """Take the first of these modifiers that is there."""
        for name in names:
            if self.flag(name):
                return name
        return default

    def need(self, *names: str) -> str:
        """The same, where one of them must be there."""
        taken = self.one(*names)
        if taken is None:
            self.refuse(f"{self.instruction.name}: needs one of " + " ".join("." + n for n in names))
        return taken

    def type(self, *types: str) -> str:
        """Take the last modifier, which must be one of these types."""
        if not self.left or self.left[-1] not in types:
            self.refuse(f"{self.instruction.name}: type {'.' + self.left[-1] if self.left else 'missing'}")
        return self.left.pop()

    def done(self):
        """Refuse what is left."""
        if self.left:
            self.refuse(f"{self.instruction.name}: unknown " + " ".join("." + m for m in self.left))


def translate_instruction(builder, instruction: Instruction, body):
    """Append the ops of one instruction. `body` translates an inlined function."""
    if instruction.opcode == "call":
        control.call(builder, instruction, body)
        return
    translator = TRANSLATORS.get(instruction.opcode)
    if translator is None:
        builder.refuse(f"{instruction.name}: unknown instruction")
    modifiers = Modifiers(instruction)
    translator(builder, instruction, modifiers)
    modifiers.done()


from . import arithmetic, control, convert, memory, warp  # noqa: E402, F401
