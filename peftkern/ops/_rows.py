"""What the CPU backends have in common: dtype codes of the C++ kernels, rows of unit stride, sums with a product."""

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


def adds_in_one_accumulator(dtype):
    """Whether `add_product` rounds once: oneDNN adds u, x W^T and b in float32."""
    mkldnn = torch.ops.mkldnn
    supported = mkldnn._is_mkldnn_bf16_supported if dtype is torch.bfloat16 else mkldnn._is_mkldnn_fp16_supported
    return torch.backends.mkldnn.enabled and supported()


def add_product(u, x, weight, bias):
    """u + x W^T + b for x [M, K] and half precision, rounded once. May write into u."""
    if bias is None:
        return u.addmm_(x, weight.mT)
    # The binding reads the bias as if its numbers lay side by side.
    return torch.ops.mkldnn._linear_pointwise.binary(x, u, weight, bias.contiguous(), "add")
