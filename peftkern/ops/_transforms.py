"""What surrounds a call: functorch transforms, forward-mode AD, a backward that is differentiated, the compiler."""

import contextlib
import functools

import torch


def differentiating_twice():
    """True inside a backward that runs under create_graph=True: its own result must be differentiable."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def needs_reference():
    """True under vmap, torch.func or forward-mode AD: the native functions have no rule there, the formulas do."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def working_dtype(*tensors):
    """float64 if any tensor is float64, else float32: the dtype of parameters inside the operations."""
    return torch.float64 if any(t.dtype is torch.float64 for t in tensors) else torch.float32


def no_autocast(device_type):
    """Context in which autocast casts nothing; free where it is off."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def without_autocast(formula):
    """The formula, computed in the dtypes it is given: it also runs outside of an operation, which sees to that."""

    @functools.wraps(formula)
    def run(*args, **kwargs):
        with no_autocast(args[0].device.type):
            return formula(*args, **kwargs)

    return run
