"""Kernels compiled by nvcc: a .cu file or PTX text to kernels that are launched by name with tensors."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from . import build
from .errors import Refused
from .launch import Launch, MemoryRange, Options, memory_range, run
from .parser import Module, Param, parse
from .program import Memory, Program, translate


def compile_cuda(source: str | Path, arch: int = 80, flags: Sequence[str] = ()) -> str:
    """PTX of a .cu file (a path, or the text itself), kept by content. `flags`: more options for nvcc."""
    nvcc = build.nvcc()
    if nvcc is None:
        raise RuntimeError("compiling CUDA C++ needs nvcc: install the CUDA toolkit, or set NVCC or CUDA_HOME")
    path = Path(source) if "\n" not in str(source) else None
    text = path.read_text() if path else str(source)
    options = ["-ptx", f"-arch=compute_{arch}", "-lineinfo", "-std=c++17", *flags]
    include = ["-I", str(path.resolve().parent)] if path else []
    # Headers next to the file may matter: they are part of the key.
    headers = [h for d in (Path(f[2:]) for f in flags if f.startswith("-I")) for h in sorted(d.glob("*.*h"))]
    headers += sorted(path.parent.glob("*.*h")) if path else []
    key = build.digest(build.command(nvcc, "--version"), text, *options, *(h.read_text() for h in headers))

    def produce(made: Path):
        unit = path
        if unit is None:
            unit = made.with_suffix(".cu")
            unit.write_text(text)
        build.command(nvcc, *options, *include, unit, "-o", made)

    return build.keep(build.cache_dir() / f"{path.stem if path else 'inline'}-{key}.ptx", produce).read_text()


class CudaLibrary:
    """The kernels of one PTX module.

    source: a .cu file, CUDA C++ text, or PTX text (recognised by its .version line).

    >>> lib = CudaLibrary("axpy.cu")                                              # doctest: +SKIP
    >>> lib["axpy"](grid=4, block=128, args=[x, y, 2.0, x.numel()], seed=1)        # doctest: +SKIP
    """

    def __init__(self, source: str | Path, arch: int = 80, flags: Sequence[str] = ()):
        text = str(source)
        is_ptx = re.search(r"^\s*\.version\s", text, re.M) is not None
        self.ptx = text if is_ptx else compile_cuda(source, arch, flags)
        self.module: Module = parse(self.ptx)
        self.memory = Memory(self.module)
        self.launches: list[Launch] = []
        self._programs: dict[str, Program] = {}

    @cached_property
    def names(self) -> dict[str, str]:
        """Entry symbols, by themselves and by their C++ names without parameters ("gemm<64, 64>")."""
        entries = [f.name for f in self.module.functions.values() if f.entry]
        names = {}
        for entry, plain in zip(entries, demangle(entries), strict=True):
            short = re.sub(r"^void ", "", re.sub(r"\(anonymous namespace\)::", "", plain))
            depth, cut = 0, len(short)
            for k, char in enumerate(short):
                depth += (char == "<") - (char == ">")
                if char == "(" and depth == 0:
                    cut = k
                    break
            names[short[:cut]] = entry
        return names | {e: e for e in entries}

    def program(self, name: str) -> Program:
        """The translated entry; `name` as in `names`, or the part before its template arguments if only one fits."""
        entry = self.names.get(name)
        if entry is None:
            fits = {e for n, e in self.names.items() if n.partition("<")[0] == name}
            if len(fits) != 1:
                raise KeyError(f"no single kernel {name!r}; there are: {', '.join(sorted(self.names))}")
            entry = fits.pop()
        if entry not in self._programs:
            self._programs[entry] = translate(self.module, entry, self.memory)
        return self._programs[entry]

    def __getitem__(self, name: str):
        program = self.program(name)

        def launch(grid, block, args, shared: int = 0, also: Sequence = (), **options) -> Launch:
            """Launch with tensors and numbers. `also`: tensors that the kernel reaches through pointers in structs."""
            values, ranges = bind(program, args)
            ranges += [r for k, t in enumerate(also) if (r := memory_range(t, f"also[{k}]"))]
            done = run(program, grid, block, values, ranges, shared, Options(**options))
            self.launches.append(done)
            return done

        return launch


def bind(program: Program, args: Sequence) -> tuple[list[bytes], list[MemoryRange]]:
    """Arguments as bytes of the parameters' types, and the memory of the tensors among them.

    A tensor or None goes to a pointer, a number to a number, bytes to a struct passed by value.
    """
    params = program.function.params
    if len(args) != len(params):
        raise TypeError(f"{program.name} takes {len(params)} arguments, {len(args)} given")
    values, ranges = [], []
    for k, (param, arg) in enumerate(zip(params, args, strict=True)):
        if hasattr(arg, "data_ptr") or hasattr(arg, "ctypes"):
            if param.size != 8:
                raise TypeError(f"{program.name}: argument {k} is a tensor, the parameter has {param.size} bytes")
            found = memory_range(arg, f"argument {k}")
            values.append(struct.pack("<Q", found.begin if found else 0))
            ranges += [found] if found else []
        else:
            values.append(number(param, arg, f"{program.name}: argument {k}"))
    return values, ranges


def number(param: Param, value, what: str) -> bytes:
    """A Python number as the bytes of a parameter. An untyped 4-byte parameter takes a float as fp32."""
    if isinstance(value, (bytes, bytearray)):
        return bytes(value)
    if value is None:
        return bytes(param.size)
    floating = param.type in ("f32", "f64") or (isinstance(value, float) and param.type in ("b32", "b64"))
    if floating:
        return struct.pack("<f" if param.size == 4 else "<d", value)
    if isinstance(value, float):
        raise TypeError(f"{what} is a float, the parameter is .{param.type}")
    return (int(value) & ((1 << (8 * param.size)) - 1)).to_bytes(param.size, "little")


def demangle(symbols: Sequence[str]) -> list[str]:
    """C++ names of symbols, by c++filt where there is one."""
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if tool is None or not symbols:
        return list(symbols)
    done = subprocess.run([tool], input="\n".join(symbols), capture_output=True, text=True)
    found = done.stdout.splitlines()
    if done.returncode or len(found) != len(symbols):
        raise Refused(f"{tool} failed on {symbols}")
    return found
