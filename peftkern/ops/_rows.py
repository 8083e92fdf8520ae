"""What the CPU backends have in common: dtype codes of the C++ kernels, rows of unit stride, scratch that is kept."""

import threading

import torch

CODES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
HALF = (torch.bfloat16, torch.float16)

# Scratch for copies of a weight that a thread keeps: fresh pages for every call would cost more than filling them.
_KEPT_BYTES = 64 * 2**20
_kept = threading.local()
_empty_like = torch.empty_like


def rows(x, K):
    """x [..., K] as rows of unit inner stride, and the stride between them; copies only where there is no such view."""
    if x.is_contiguous():
        return x, K
    try:
        view = x.view(-1, K)
    except RuntimeError:
        return x.contiguous(), K
    stride_row, stride_col = view.stride()
    return (view, stride_row) if stride_col == 1 else (view.contiguous(), K)


def like_rows(x):
    """An empty contiguous tensor like x; empty_like alone is the quickest but copies other strides."""
    return _empty_like(x) if x.is_contiguous() else x.new_empty(x.shape)


def weight_scratch(count, width, dtype):
    """[count, width] of this thread's scratch; valid until its next call."""
    size = count * width
    if size * 2 > _KEPT_BYTES:
        return torch.empty(count, width, dtype=dtype)
    kept = getattr(_kept, "buffer", None)
    if kept is None or kept.numel() < size:
        kept = _kept.buffer = torch.empty(size, dtype=torch.int16)
    return kept[:size].view(dtype).view(count, width)
