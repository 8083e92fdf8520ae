"""A driver of a device that is not there: Triton compiles for it and launches nothing."""

from contextlib import contextmanager
from dataclasses import dataclass

import pytest

TARGETS = {
    "sm80": ("cuda", 80, 32),
    "sm90": ("cuda", 90, 32),
    "sm100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel, Triton's own description of it, and its code in all stages."""

    kernel: str
    metadata: object
    asm: dict

    @property
    def shared(self):
        return self.metadata.shared


@contextmanager
def compiling(target):
    """Within the context launches compile for a target of TARGETS and are collected; they execute nothing."""
    from ptxvm.triton_cpu import driver_for
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from peftkern.ops import _triton

    launches, run = [], JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled = compiled.result() if hasattr(compiled, "result") else compiled
        launches.append(Launch(compiled.metadata.name, compiled.metadata, dict(compiled.asm)))
        return compiled

    before = driver._active
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_triton, "SIMULATED", True)
        patch.setattr(JITFunction, "run", compile_only)
        driver.set_active(driver_for(GPUTarget(*TARGETS[target]), 1000 + list(TARGETS).index(target)))
        try:
            yield launches
        finally:
            driver._active = before
