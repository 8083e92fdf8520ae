"""What surrounds a call: functorch transforms, forward-mode AD, a backward that is differentiated, the compiler."""

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
