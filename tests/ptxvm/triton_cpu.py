"""Runs any `@triton.jit` launch on CPU tensors through its own compiled PTX."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import numpy as np

from .launch import Launch, MemoryRange, Options, memory_range, run
from .parser import parse
from .program import Memory, Program, translate

_SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}
_FIRST_DEVICE = 1 << 20  # device numbers of this machine: Triton keeps compiled kernels per device


class TritonMachine:
    """What `triton_on_cpu` hands out: `launches` so far, `options` of the next ones."""

    def __init__(self, arch: int, options: Options):
        self.arch = arch
        self.options = options
        self.launches: list[Launch] = []

    def set(self, **options):
        """Change options (see Options) for the launches that follow."""
        self.options = replace(self.options, **options)

    def launch(self, compiled, bound: dict, grid: Sequence[int]) -> Launch:
        metadata = compiled.metadata
        if getattr(metadata, "num_ctas", 1) != 1:
            raise NotImplementedError("clusters (num_ctas > 1) can't run here")
        program = _program(compiled.asm["ptx"], metadata.name)
        values: list[tuple[object, str]] = []
        for name, type_ in compiled.src.signature.items():
            _flatten(type_, bound.get(name), name, values)
        params = program.function.params
        scratch = []
        blocks = int(np.prod(grid))
        for kind in ("global_scratch_size", "profile_scratch_size")[: len(params) - len(values)]:
            size = (getattr(metadata, kind, 0) or 0) * getattr(metadata, "num_ctas", 1) * blocks
            scratch.append(np.zeros(size, np.uint8))
            values.append((scratch[-1], kind))
        ranges = [r for value, name in values if _is_tensor(value) and (r := memory_range(value, name))]
        packed = [_pack(value, param.size, name) for (value, name), param in zip(values, params, strict=True)]
        block = (32 * metadata.num_warps, 1, 1)
        done = run(program, grid, block, packed, _named(ranges), metadata.shared, self.options)
        self.launches.append(done)
        return done


@cache
def _program(ptx: str, name: str) -> Program:
    """Kept for the whole process: Triton's own cache keeps compiled kernels as long."""
    module = parse(ptx)
    return translate(module, name, Memory(module))


def _named(ranges: list[MemoryRange]) -> list[MemoryRange]:
    return [r for r in ranges if r.end > r.begin]


def _is_tensor(value) -> bool:
    return hasattr(value, "data_ptr") or isinstance(value, np.ndarray)


def _flatten(type_, value, name: str, out: list):
    """Triton's order of kernel parameters: tuples flattened, constants gone, a tensor descriptor spelled out."""
    if isinstance(type_, (tuple, list)):
        for k, (t, v) in enumerate(zip(type_, value, strict=True)):
            _flatten(t, v, f"{name}[{k}]", out)
    elif type_ == "constexpr":
        return
    elif str(type_).startswith("tensordesc"):
        out.append((value.base, name))
        out += [(int(x), name) for x in (*value.shape, *value.strides)]
        out.append((int(value.padding == "nan"), name))
        if hasattr(value, "round_f32_to_tf32"):
            out.append((int(value.round_f32_to_tf32), name))
        out += [(int(x), name) for x in (*value.shape, *value.strides)]
    else:
        out.append((value, name))


def _pack(value, size: int, name: str) -> bytes:
    if _is_tensor(value):
        pointer = value.data_ptr() if hasattr(value, "data_ptr") else value.ctypes.data
        return struct.pack("<Q", pointer)
    if value is None:
        return bytes(size)
    if isinstance(value, float):
        formats = {2: "<e", 4: "<f", 8: "<d"}
        return struct.pack(formats[size], value)
    return (int(value) & ((1 << (8 * size)) - 1)).to_bytes(size, "little")


def driver_for(target, device: int):
    """A stand-in with which Triton's front end compiles for a target; `device` is the number of its device."""
    import torch

    class Driver:
        """Just enough of a driver for that."""

        utils = None

        def get_current_target(self):
            return target

        def get_current_device(self):
            return device

        def get_current_stream(self, device=0):
            return 0

        def set_current_device(self, device):
            pass

        def get_active_torch_device(self):
            return torch.device("cpu")

        def get_device_interface(self):
            return torch.cpu

        def map_python_to_cpp_type(self, type_):
            return type_

        def get_benchmarker(self):
            def once(function, quantiles=None, **_):
                function()
                return [0.0] * len(quantiles or [0])

            return once

        def get_empty_cache_for_benchmark(self):
            return torch.empty(0)

        def clear_cache(self, cache):
            pass

    return Driver()


@contextmanager
def triton_on_cpu(arch: int = 80, **options):
    """Within the context `kernel[grid](...)` compiles for sm_<arch> and executes that PTX on CPU tensors.

    Options as in `Options`. Yields a TritonMachine; `launches[-1].counts` says what the last launch did.
    A kernel that uses instructions beyond this machine raises Refused at its launch.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    options.setdefault("shared_limit", _SHARED_LIMIT.get(arch, 99 * 1024))
    machine = TritonMachine(arch, Options(**options))
    compile_only = JITFunction.run
    before = driver._active

    def launch(self, *args, grid, warmup, **kwargs):
        compiled = compile_only(self, *args, grid=grid, warmup=True, **kwargs)
        if warmup or compiled is None:
            return compiled
        if hasattr(compiled, "result"):
            compiled = compiled.result()
        bound = dict(zip(self.arg_names, args, strict=False))
        bound |= {name: value for name, value in kwargs.items() if name in self.arg_names}
        for parameter in self.signature.parameters.values():
            if parameter.name not in bound and parameter.default is not parameter.empty:
                bound[parameter.name] = parameter.default
        shape = grid(bound) if callable(grid) else grid
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        shape = (*shape, 1, 1, 1)[:3]
        if min(shape) > 0:
            machine.launch(compiled, bound, shape)
        return compiled

    driver.set_active(driver_for(GPUTarget("cuda", arch, 32), _FIRST_DEVICE + arch))
    JITFunction.run = launch
    try:
        yield machine
    finally:
        JITFunction.run = compile_only
        driver._active = before
