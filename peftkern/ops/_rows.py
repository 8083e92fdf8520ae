"""What the CPU backends have in common: dtype codes of the C++ kernels, rows of unit stride."""

import torch

CODES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
HALF = (torch.bfloat16, torch.float16)

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
