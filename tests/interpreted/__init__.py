"""Triton's interpreter, made right for bfloat16 and made to watch memory: level 2 of the tests.

In a process started with TRITON_INTERPRET=1, Triton runs every `@triton.jit` function as Python on numpy arrays, one
program after the other.

    with interpreted():
        y = my_op(x)  # x, y: CPU tensors

Within the block an access outside the tensors of a launch raises OutOfBounds, two programs that touch one element,
one of them writing, raise Race, and so does a program that reads back what it stored without a barrier, or stores one
element twice at once. bfloat16, which the interpreters of Triton 3.6 to 3.9 treat as integers in most places, is
widened to float32 and rounded to nearest even after each operation. Products are plain float32: tf32 and the tensor
cores' own arithmetic are level 4's.
"""

from contextlib import contextmanager

from .memory import InterpreterFault, Memory, OutOfBounds, Race

__all__ = ["InterpreterFault", "OutOfBounds", "Race", "interpreted"]


@contextmanager
def interpreted():
    """Launches of jit functions in the block run in the repaired and watched interpreter."""
    import numpy as np
    import pytest
    from triton.runtime import interpreter as triton_interpreter

    from .builder import Builder, reduced

    builder, executor = triton_interpreter.interpreter_builder, triton_interpreter.GridExecutor
    patch_tensor, call = triton_interpreter._patch_lang_tensor, executor.__call__

    def patch_lang_tensor(tensor, scope):
        # numpy 2.4 makes no int of an array with one element, which Triton 3.6 relies on.
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def watched_call(self, *args, **kwargs):
        builder.memory = Memory(self.fn.__name__, [*args, *kwargs.values()])
        with np.errstate(all="ignore"):
            return call(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "__class__", Builder)
        patch.setattr(triton_interpreter, "_patch_lang_tensor", patch_lang_tensor)
        patch.setattr(executor, "__call__", watched_call)
        for operations in (triton_interpreter.ReduceOps, triton_interpreter.ScanOps):
            patch.setattr(operations, "apply_impl", reduced(operations.apply_impl))
        yield
