"""PTX text to a `Module`: variables, functions, and instructions with their line, opcode, modifiers and operands."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field

from .errors import Refused

_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.S)
_LABEL = re.compile(r"\s*([%$\w]+)\s*:(?!:)")
_REGISTER_RANGE = re.compile(r"([%$\w]+)<(\d+)>")


@dataclass
class Instruction:
    opcode: str  # without modifiers: "add"
    modifiers: list[str]  # ["rn", "f32"]
    operands: list[str]  # vectors keep their braces, addresses their brackets
    line: int
    text: str
    guard: str | None = None
    guard_negated: bool = False
    source: tuple[str, int] | None = None  # file and line of the kernel's own source

    @property
    def name(self) -> str:
        return ".".join([self.opcode, *self.modifiers])


@dataclass
class Label:
    name: str


@dataclass
class Variable:
    name: str
    space: str
    align: int
    size: int  # bytes; 0 for an unsized extern array
    data: bytes | None = None


@dataclass
class Param:
    name: str
    type: str
    size: int
    align: int
    pointer: bool = False


@dataclass
class Function:
    name: str
    entry: bool
    params: list[Param]
    returns: list[Param]
    registers: dict[str, str] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)  # shared, local, and .param space of calls
    body: list[Instruction | Label] = field(default_factory=list)
    branch_targets: dict[str, list[str]] = field(default_factory=dict)
    required_threads: tuple[int, ...] | None = None
    max_threads: tuple[int, ...] | None = None


@dataclass
class Module:
    target: str
    version: str
    variables: dict[str, Variable]
    functions: dict[str, Function]
    lines: list[str]


def type_bytes(type_: str) -> int:
    """Bytes of a fundamental type; 1 for a predicate."""
    known = {"pred": 1, "f16x2": 4, "bf16x2": 4, "bf16": 2, "e4m3x2": 2, "e5m2x2": 2, "tf32": 4}
    return known[type_] if type_ in known else int(re.sub(r"\D", "", type_)) // 8


def split_operands(text: str) -> list[str]:
    """Split at the commas outside brackets."""
    parts, depth, current = [], 0, ""
    for char in text:
        depth += char in "{[("
        depth -= char in "}])"
        if char == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += char
    return [*parts, current.strip()] if current.strip() else parts


def parse(text: str) -> Module:
    """Parse a PTX module. Raises Refused for a construct that it doesn't know."""
    return _Parser(text).module()


class _Parser:
    def __init__(self, text: str):
        self.lines = text.split("\n")
        self.text = _COMMENT.sub(lambda m: "\n" * m.group().count("\n") + " ", text).replace("\x00", " ")
        self.pos = 0
        self.files: dict[int, str] = {}
        self.source: tuple[int, int] | None = None

    def line(self) -> int:
        return self.text.count("\n", 0, self.pos) + 1

    def skip(self):
        match = re.compile(r"\s*").match(self.text, self.pos)
        self.pos = match.end()

    def until(self, stops: str) -> str:
        """Text up to the first of `stops` outside quotes; the position moves beyond it."""
        start, quoted = self.pos, False
        while self.pos < len(self.text):
            char = self.text[self.pos]
            quoted ^= char == '"'
            self.pos += 1
            if char in stops and not quoted:
                return self.text[start : self.pos - 1]
        return self.text[start:]

    def module(self) -> Module:
        module = Module("", "", {}, {}, self.lines)
        while True:
            self.skip()
            if self.pos >= len(self.text):
                self.name_sources(module)
                return module
            rest = self.text[self.pos : self.pos + 16]
            if rest.startswith((".version", ".target", ".address_size")):
                word, _, value = self.until("\n").strip().partition(" ")
                if word != ".address_size":
                    setattr(module, word[1:], value.strip())
            elif rest.startswith(".file"):
                self.file(self.until("\n"))
            elif rest.startswith(".section"):
                self.until("{")
                self.until("}")
            elif rest.startswith((".loc ", ".loc\t", "@@DWARF")):
                self.until("\n")
            else:
                self.declaration(module)

    def name_sources(self, module: Module):
        """The .file table may stand behind the code: put names in only now."""
        for function in module.functions.values():
            for item in function.body:
                if isinstance(item, Instruction) and item.source is not None:
                    item.source = (self.files.get(item.source[0], "?"), item.source[1])

    def file(self, text: str):
        match = re.match(r'\s*\.file\s+(\d+)\s+(?:"[^"]*"\s+)?"([^"]*)"', text)
        if match:
            self.files[int(match[1])] = match[2]

    def declaration(self, module: Module):
        start = self.pos
        head = re.compile(r"[^;{=]*").match(self.text, self.pos).group()
        if re.search(r"\.(entry|func)\b", head):
            self.function(module)
            return
        statement = self.until(";")
        if statement.strip().startswith((".pragma", ".alias", ".common")):
            raise Refused(f"line {self.line()}: {statement.strip()[:60]}")
        self.pos = start
        line = self.line()
        self.until(";")
        variable = _variable(statement, line)
        if variable.name not in module.variables or variable.data is not None:
            module.variables[variable.name] = variable

    def function(self, module: Module):
        start = self.pos
        head = self.until("{;")
        declared_only = self.text[self.pos - 1] == ";"
        match = re.search(r"\.(entry|func)\s*(\(.*?\))?\s*([\w$.%]+)\s*(\((.*?)\))?(.*)$", head, re.S)
        if match is None:
            raise Refused(f"line {self.line()}: {head.strip()[:60]}")
        params = [_param(p) for p in split_operands(match[5] or "")]
        returns = [_param(p) for p in split_operands((match[2] or "()")[1:-1])]
        function = Function(match[3], match[1] == "entry", params, returns)
        for directive, count in re.findall(r"\.(reqntid|maxntid)\s+([\d,\s]+)", match[6]):
            threads = tuple(int(n) for n in count.split(","))
            if directive == "reqntid":
                function.required_threads = threads
            else:
                function.max_threads = threads
        unknown = set(re.findall(r"\.(\w+)", match[6])) - {
            "reqntid", "maxntid", "minnctapersm", "maxnreg", "noreturn", "abi_preserve",
            "abi_preserve_control",
        }  # fmt: skip
        if unknown:
            raise Refused(f"{function.name}: directive " + ", ".join("." + u for u in sorted(unknown)))
        if declared_only:
            module.functions.setdefault(function.name, function)
            return
        module.functions[function.name] = function
        self.source = None
        self.body(function, start)

    def body(self, function: Function, start: int):
        scopes: list[dict[str, str]] = [{}]
        unique = 0
        line, counted = self.text.count("\n", 0, self.pos) + 1, self.pos
        while True:
            self.skip()
            line += self.text.count("\n", counted, self.pos)
            counted = self.pos
            char = self.text[self.pos : self.pos + 1]
            if char == "":
                raise Refused(f"{function.name}: text ends inside the function")
            if char == "{":
                scopes.append({})
                self.pos += 1
                continue
            if char == "}":
                self.pos += 1
                scopes.pop()
                if not scopes:
                    return
                continue
            label = _LABEL.match(self.text, self.pos)
            if label:
                self.pos = label.end()
                self.skip()
                if self.text.startswith(".branchtargets", self.pos):
                    targets = self.until(";").split(None, 1)[1]
                    function.branch_targets[label[1]] = [t.strip() for t in targets.split(",")]
                elif self.text.startswith((".callprototype", ".calltargets"), self.pos):
                    raise Refused(f"line {line}: {self.until(';').split()[0]} (indirect calls)")
                else:
                    function.body.append(Label(label[1]))
                continue
            if self.text.startswith((".loc ", ".loc\t", ".file"), self.pos):
                self.location(self.until("\n"))
                continue
            statement = " ".join(self.until(";").split())
            if not statement or statement.startswith(".pragma"):
                continue
            if statement.startswith(".reg"):
                unique += 1
                self.registers(function, statement, scopes, unique)
            elif statement.startswith("."):
                variable = _variable(statement, line)
                if len(scopes) > 1:
                    unique += 1
                    scopes[-1][variable.name] = f"{variable.name}@{unique}"
                    variable.name = f"{variable.name}@{unique}"
                function.variables.append(variable)
            else:
                function.body.append(self.instruction(statement, line, scopes))

    def location(self, text: str):
        match = re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", text)
        if match:
            caller = re.search(r"inlined_at\s+(\d+)\s+(\d+)", text)  # code from a header: the line that uses it
            match = caller or match
            self.source = (int(match[1]), int(match[2]))
        else:
            self.file(text)

    def registers(self, function: Function, statement: str, scopes: list[dict[str, str]], unique: int):
        match = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", statement)
        if match is None:
            raise Refused(f"declaration {statement[:60]}")
        for name in split_operands(match[2]):
            ranged = _REGISTER_RANGE.fullmatch(name)
            names = [ranged[1] + str(i) for i in range(int(ranged[2]))] if ranged else [name]
            for each in names:
                own = each
                if len(scopes) > 1:
                    own = f"{each}@{unique}"
                    scopes[-1][each] = own
                function.registers[own] = match[1]

    def instruction(self, statement: str, line: int, scopes: list[dict[str, str]]) -> Instruction:
        text = statement
        guard, negated = None, False
        if statement.startswith("@"):
            guard, _, statement = statement[1:].partition(" ")
            negated = guard.startswith("!")
            guard = guard.lstrip("!")
        opcode, _, rest = statement.strip().partition(" ")
        renamed = {name: own for scope in scopes for name, own in scope.items()}
        if renamed:
            swap = lambda m: renamed.get(m.group(), m.group())  # noqa: E731
            rest = re.sub(r"[%$\w]+", swap, rest)
            guard = renamed.get(guard, guard)
        name, *modifiers = opcode.replace("::", "\0").split(".")
        modifiers = [m.replace("\0", "::") for m in modifiers]
        return Instruction(name, modifiers, split_operands(rest), line, text, guard, negated, self.source)


def _param(text: str) -> Param:
    match = re.fullmatch(
        r"\.(?:param|reg)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)((?:\s+\.ptr)?(?:\s+\.(?:global|shared|const|local|generic))?)"
        r"(?:\s+\.align\s+\d+)?\s+([%$\w]+)(?:\[(\d*)\])?",
        text.strip(),
    )
    if match is None:
        raise Refused(f"parameter {text.strip()[:60]}")
    bytes_ = type_bytes(match[2])
    size = bytes_ * int(match[5]) if match[5] else bytes_
    return Param(match[4], match[2], size, int(match[1] or bytes_), ".ptr" in match[3])


def _variable(statement: str, line: int) -> Variable:
    declared, _, initial = statement.partition("=")
    match = re.fullmatch(
        r"(?:\.(?:extern|visible|weak|attribute\(\w+\))\s+)*\.(global|const|shared|local|param)\s+"
        r"(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([%$\w]+)((?:\[\d*\])*)",
        " ".join(declared.split()),
    )
    if match is None:
        raise Refused(f"line {line}: declaration {' '.join(declared.split())[:80]}")
    space, align, type_, name, dims = match.groups()
    width = type_bytes(type_)
    count = 1
    for dim in re.findall(r"\[(\d*)\]", dims):
        count *= int(dim or 0)
    data = None
    if initial.strip():
        words = [w.strip() for w in initial.replace("{", " ").replace("}", " ").split(",")]
        try:
            data = b"".join(constant(w, width) for w in words if w)
        except ValueError:
            raise Refused(f"line {line}: initial value of {name}: {initial.strip()[:60]}") from None
    return Variable(name, space, int(align or width), width * count, data)


def constant(text: str, width: int) -> bytes:
    """The little-endian bytes of a PTX constant: integers, 0f and 0d. ValueError for anything else."""
    text = text.strip()
    negative = text.startswith("-")
    body = text.lstrip("+-")
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", body):
        bits, size = int(body[2:], 16), 4
        if negative:
            bits ^= 1 << 31
    elif re.fullmatch(r"0[dD][0-9a-fA-F]{16}", body):
        bits, size = int(body[2:], 16), 8
        if negative:
            bits ^= 1 << 63
    elif re.fullmatch(r"\d+\.\d*([eE][+-]?\d+)?", body):
        return struct.pack("<d" if width == 8 else "<f", float(text))
    elif body == "WARP_SZ":
        bits, size = 32, width
    else:
        body = body.rstrip("U")
        if re.fullmatch(r"0[0-7]+", body):
            body = "0o" + body
        value = int(body, 0)
        bits, size = (-value if negative else value), width
    return (bits & ((1 << (8 * size)) - 1)).to_bytes(size, "little")
