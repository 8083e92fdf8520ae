"""CUDA C++ backend of the `butterfly` operations: the kernels of block_rotation (csrc/cuda/block_*.cu) on stages that
were multiplied into one matrix per group of b 2^(f-1) columns, and the output scale (csrc/cuda/block_scale.cu).
"""

import torch
import torch.nn.functional as F

from peftkern.ops import _cuda
from peftkern.ops._rows import CODES, HALF, like_rows, rows
from peftkern.ops.block_rotation import cuda_backend as blocks
from peftkern.ops.butterfly import reference


def available():
    return _cuda.available()


def supports(name, *args):
    """`(ok, reason)` for one kind of call; a group of columns is bounded by the registers that hold its matrix."""
    ok, reason = _cuda.serves(*args)
    if not ok or name.startswith("scale_outputs"):
        return ok, reason
    R = args[_R_AT[name]]
    is_map = name.startswith("dense_cayley")
    f, b = 1 if is_map else R.shape[0], R.shape[-1]
    most = blocks.most_columns(None if is_map else args[1 if name.endswith("backward") else 0].dtype)
    if b << (f - 1) > most:
        group = f"blocks of {b}" if f == 1 else f"{b << (f - 1)}, {f} stages of blocks of {b}"
        return False, f"serves groups of up to {most} columns in this dtype; this call has {group}"
    return True, None


_R_AT = {
    "dense_cayley": 0,
    "dense_cayley_backward": 1,
    "butterfly_rotate": 1,
    "butterfly_rotate_backward": 2,
    "butterfly_rotate_weight": 2,
    "butterfly_rotated_linear": 4,
    "butterfly_rotated_linear_backward": 5,
}


def dense_cayley(B):
    B, (f, n, b, _) = B.contiguous(), B.shape
    return blocks.run_map(B, torch.empty_like(B), f * n, b, False)


def dense_cayley_backward(dR, R):
    R, (f, n, b, _) = R.contiguous(), R.shape
    return blocks.run_map(R, torch.empty_like(R), f * n, b, False, dR.contiguous())


def butterfly_rotate(x, R, transpose):
    return blocks.rotate(x, R, transpose)


def butterfly_rotate_backward(dz, x, R, transpose, output_mask):
    return blocks.rotate_backward(dz, x, R, transpose, output_mask)


def butterfly_rotate_weight(weight, scale, R):
    return blocks.rotate(weight, R, True, row_scale=scale)


def _pointer(tensor):
    return 0 if tensor is None else tensor.data_ptr()


# fmt: off
def _run_scale(like, y, scale, bias, z, dy=None, partial=None):
    """z = (y - b) s + b; where there is dy, z = dy s and partial sums of dy (y - b)."""
    N = len(scale)
    if like.numel() == 0:
        return
    (y_rows, y_stride), (dy_rows, dy_stride) = rows(y, N), (None, 0) if dy is None else rows(dy, N)
    scale, bias = scale.contiguous(), None if bias is None else bias.contiguous()
    with _cuda.guard(like):
        _cuda.library().scale_outputs(
            CODES[like.dtype], y_rows.data_ptr(), y_stride, scale.data_ptr(), _pointer(bias),
            _pointer(z), _pointer(dy_rows), dy_stride, _pointer(partial), like.numel() // N, N, _cuda.stream(like),
        )
# fmt: on


def scale_outputs(y, scale, bias):
    z = like_rows(y)
    _run_scale(y, y, scale, bias, z)
    return z


def scale_outputs_backward(dy, y, scale, bias, output_mask):
    (want_dy, want_scale), N, library = output_mask, len(scale), _cuda.library()
    dy0 = like_rows(y) if want_dy else None
    if not want_scale:
        if want_dy:
            _run_scale(y, dy, scale, None, dy0, dy)
        return y.new_empty(0) if dy0 is None else dy0, scale.new_empty(0)
    if y.numel() == 0:
        return y.new_empty(y.shape if want_dy else 0), torch.zeros_like(scale)
    partial = scale.new_empty(library.scale_chunks(CODES[y.dtype], y.numel() // N, N), N)
    _run_scale(y, y, scale, bias, dy0, dy, partial)
    dscale = scale.new_empty(N)
    with _cuda.guard(y):
        is_double = scale.dtype is torch.float64
        library.block_sum(is_double, partial.data_ptr(), dscale.data_ptr(), N, len(partial), _cuda.stream(y))
    return y.new_empty(0) if dy0 is None else dy0, dscale


def butterfly_rotated_linear(x, weight, bias, scale, R):
    if scale is None:
        return blocks.linear_of_rotated(x, weight, bias, R), weight.new_empty(0)
    shape = (*x.shape[:-1], len(weight))
    y = weight.new_empty(shape)
    if weight.dtype not in HALF:
        p = F.linear(blocks.rotate(x, R, False), weight)
        blocks.scale_product(p, None, scale, bias, y)
        return y, p
    high, low = blocks.rotated_terms(x, R, weight.dtype)
    p = weight.new_empty(shape)
    blocks.scale_product(blocks.product_f32(high, weight.mT), low.mm(weight.mT), scale, bias, y, p)
    return y, p


def butterfly_rotated_linear_backward(dy, x, weight, scale, p, R, output_mask):
    parts = scale_outputs_backward, blocks.block_rotated_linear_backward
    return reference.linear_backward(*parts, dy, x, weight, scale, p, R, output_mask)
