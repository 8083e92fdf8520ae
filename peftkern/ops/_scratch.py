"""Large temporaries on the CPU, used again instead of freed.

The C library gives large blocks back to the system and gets them back page by page, which costs as much as a pass over
them. So the memory of a temporary that nobody else holds is kept for the next one: one block per thread, of up to MOST
bytes.
"""

import threading

import torch

LEAST, MOST = 1 << 18, 1 << 25

_kept = threading.local()


def take(x):
    """An empty contiguous tensor of x's shape and dtype, in the kept memory where that is large enough."""
    size = x.numel() * x.element_size()
    if size >= LEAST:
        storage, _kept.storage = getattr(_kept, "storage", None), None
        if storage is not None and storage.nbytes() >= size:
            return torch.empty(0, dtype=x.dtype).set_(storage, 0, x.shape)
    return x.new_empty(x.shape)


def give(temporary):
    """Keep the memory of a tensor that its caller made by `take` and will not use again.

    Not where a mode of torch has seen the tensor, where autograd records, or where something else holds it or a view.
    """
    if torch.compiler.is_compiling() or type(temporary) is not torch.Tensor or not temporary.is_cpu:
        return
    if torch.is_grad_enabled() or torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return
    storage = temporary.untyped_storage()
    # Of the memory the tensor and this object are two holders, of the tensor its Python object is one.
    if temporary._use_count() > 1:
        return
    if LEAST <= storage.nbytes() <= MOST and torch._C._storage_Use_Count(storage._cdata) == 2:
        _kept.storage = storage
