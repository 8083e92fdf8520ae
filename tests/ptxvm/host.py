"""Host launchers on the PTX machine: a library of .cu files whose `kernel<<<...>>>` calls run here on CPU tensors."""

from __future__ import annotations

import ctypes
import importlib.util
import re
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from . import build
from .cuda import CudaLibrary
from .errors import PtxError
from .launch import Launch, MemoryRange, Options, memory_range, run

SHIM = Path(__file__).with_name("shim") / "cudart.cpp"
_LAUNCH_FAILURE = 719
_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.POINTER(ctypes.c_uint),
    ctypes.POINTER(ctypes.c_void_p), ctypes.c_ulong,
)  # fmt: skip


class HostLibrary:
    """.cu files with their own launchers, and C++ files that bind them, linked against a runtime that launches here.

    sources: .cu and .cpp files; include: folders of their headers; flags: more options for nvcc.
    The launchers take raw pointers: `on_cpu` learns the bounds of a tensor when its `data_ptr()` is taken.
    """

    def __init__(self, sources: Sequence[str | Path], include: Sequence[str | Path] = (), flags: Sequence[str] = ()):
        self.sources = [Path(s).resolve() for s in sources]
        self.include = [Path(i).resolve() for i in include]
        self.flags = list(flags)

    @cached_property
    def folder(self) -> Path:
        """Compiled library and PTX, kept by content."""
        nvcc, cxx = build.nvcc(), build.compiler()
        if nvcc is None or cxx is None:
            raise RuntimeError("host launchers need nvcc and a C++ compiler")
        version = build.command(nvcc, "--version") + build.command(cxx, "--version")
        keys = {s: build.digest(version, *self.flags, *self._texts(s)) for s in (*self.sources, SHIM)}
        root = build.cache_dir()

        def compile_(source: Path) -> Path:
            target = root / f"host-{source.stem}-{keys[source]}"
            return build.keep(target, lambda made: self._compile(source, made, nvcc))

        def link(made: Path):
            made.mkdir()
            with ThreadPoolExecutor(2) as pool:
                units = list(pool.map(compile_, keys))
            for ptx in (p for unit in units for p in unit.glob("*.ptx")):
                shutil.copy(ptx, made / ptx.name)
            objects = [unit / "unit.o" for unit in units]
            build.command(nvcc, "-shared", "-cudart", "none", *objects, "-o", made / "library.so")

        return build.keep(root / f"host-{build.digest(*keys.values())}", link)

    def _texts(self, source: Path) -> list[str]:
        """What an object depends on: the source and the files that it includes in quotation marks, and so on."""
        texts, pending, seen = [], [source], set()
        while pending:
            file = pending.pop()
            if file in seen:
                continue
            seen.add(file)
            texts.append(file.name + "\n" + file.read_text())
            for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', texts[-1], re.M):
                found = (d / name for d in (file.parent, *self.include))
                pending += [next((f.resolve() for f in found if f.is_file()), file)]
        return texts

    def _compile(self, source: Path, made: Path, nvcc: str):
        """A folder with unit.o and, of a .cu file, its PTX."""
        made.mkdir()
        options = ["-arch=compute_80", "-code=compute_80", "-std=c++17", "-lineinfo", "-Xcompiler", "-fPIC"]
        options += [f"-I{i}" for i in self.include] + self.flags
        with tempfile.TemporaryDirectory() as steps:
            build.command(nvcc, *options, "--keep", "--keep-dir", steps, "-c", source, "-o", made / "unit.o")
            for ptx in Path(steps).glob("*.ptx"):
                shutil.copy(ptx, made / f"{source.stem}.ptx")

    @cached_property
    def kernels(self) -> dict[str, CudaLibrary]:
        """The PTX module of each entry symbol."""
        modules = [CudaLibrary(p.read_text()) for p in sorted(self.folder.glob("*.ptx"))]
        return {f.name: m for m in modules for f in m.module.functions.values() if f.entry}

    @cached_property
    def cdll(self) -> ctypes.CDLL:
        """The library for ctypes."""
        return ctypes.CDLL(str(self.folder / "library.so"))

    def python_module(self, name: str):
        """The library as the extension module `name` that its C++ files define."""
        self.cdll  # noqa: B018 (loaded before, so that the launcher can be set)
        spec = importlib.util.spec_from_file_location(name, self.folder / "library.so")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    @contextmanager
    def on_cpu(self, **options):
        """Within the context the library's launches run on CPU tensors; yields a HostMachine.

        A launch that fails returns cudaErrorLaunchFailure to its launcher; leaving the context raises what happened.
        """
        import torch

        machine = HostMachine(self, Options(**options))
        data_ptr = torch.Tensor.data_ptr

        def watched(tensor):
            machine.take(tensor)
            return data_ptr(tensor)

        callback = _CALLBACK(machine.launch)
        self.cdll.ptxvm_set_launcher(callback)
        torch.Tensor.data_ptr = watched
        try:
            yield machine
        except Exception as error:
            if machine.error is not None and error is not machine.error:
                raise machine.error from error
            raise
        finally:
            torch.Tensor.data_ptr = data_ptr
            self.cdll.ptxvm_set_launcher(_CALLBACK())
        if machine.error is not None:
            raise machine.error


class HostMachine:
    """Launches so far, and the tensors whose pointers were taken for the next one."""

    def __init__(self, library: HostLibrary, options: Options):
        self.library = library
        self.options = options
        self.launches: list[Launch] = []
        self.error: Exception | None = None
        self._taken: list[MemoryRange] = []
        self._launched = False

    def take(self, tensor):
        """The next launches may touch this tensor: those until a pointer is taken again after one of them."""
        if self._launched:
            self._taken, self._launched = [], False
        name = f"tensor {len(self._taken)} {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
        found = memory_range(_Untouched(tensor), name)
        if found is not None:
            self._taken.append(found)

    def launch(self, name, grid, block, args, shared) -> int:
        """The shim's callback: 0, or a CUDA error with `error` set."""
        try:
            module = self.library.kernels[name.decode()]
            program = module.program(name.decode())
            params = [ctypes.string_at(args[k], p.size) for k, p in enumerate(program.function.params)]
            self._launched = True
            self.launches.append(run(program, grid[:3], block[:3], params, self._taken, shared, self.options))
            return 0
        except (PtxError, KeyError, ValueError) as error:
            self.error = error
            return _LAUNCH_FAILURE


class _Untouched:
    """A tensor's layout without going through its watched data_ptr."""

    def __init__(self, tensor):
        self.shape = tensor.shape
        self._tensor = tensor

    def data_ptr(self):
        return self._tensor.untyped_storage().data_ptr() + self._tensor.storage_offset() * self._tensor.element_size()

    def element_size(self):
        return self._tensor.element_size()

    def stride(self):
        return self._tensor.stride()
