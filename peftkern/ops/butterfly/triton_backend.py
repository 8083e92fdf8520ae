"""Triton backend of the `butterfly` operations: NVIDIA, AMD and Intel devices, groups of up to 512 columns.

The stages of a group are multiplied out, [G, G] per group, and rows are rotated by block_rotation's kernels with that
matrix as their block: x is read once and z written once whatever f is. Two calls give the same bits.
"""

import functools
import importlib

import torch
import torch.nn.functional as F

from peftkern.ops import _triton
from peftkern.ops._rows import HALF, like_rows, rows
from peftkern.ops.block_rotation import triton_backend as blocks
from peftkern.ops.block_rotation import triton_tiles as tiles
from peftkern.ops.block_rotation.triton_backend import _aligned, _cdiv
from peftkern.ops.butterfly import reference

COLUMNS = 64  # of two groups, at most, that a product of them takes


@functools.cache
def _kernels():
    return importlib.import_module("peftkern.ops.butterfly.triton_kernels")


def available():
    return _triton.available()


def supports(name, *args):
    """`(ok, reason)` for one kind of call; the group b 2^(f-1) is bounded, as block_rotation's block."""
    most = tiles.MAP_MOST if name.startswith("dense") else tiles.MOST
    return blocks.serves_columns(most, _columns[name](*args), *args)


def _group(R):
    f, _, b, _ = R.shape
    return b << (f - 1)


_columns = {
    "dense_cayley": lambda B: B.shape[-1],
    "dense_cayley_backward": lambda dR, R: R.shape[-1],
    "butterfly_rotate": lambda x, R, transpose: _group(R),
    "butterfly_rotate_backward": lambda dz, x, R, *_: _group(R),
    "butterfly_rotate_weight": lambda weight, scale, R: _group(R),
    "butterfly_rotated_linear": lambda x, weight, bias, scale, R: _group(R),
    "butterfly_rotated_linear_backward": lambda dy, x, weight, scale, p, R, *_: _group(R),
    "scale_outputs": lambda *_: 1,
    "scale_outputs_backward": lambda *_: 1,
}


def dense_cayley(B):
    f, n, b, _ = B.shape
    return blocks.cayley(B, f * n, b, True).view(B.shape)


def dense_cayley_backward(dR, R):
    b = R.shape[-1]
    return blocks.cayley_backward(dR.reshape(-1, b, b), R.reshape(-1, b, b), True).view(R.shape)


def _sizes(R):
    """(groups, F, B, G, G padded) of R [F, K/B, B, B]."""
    f, n, b, _ = R.shape
    G = _group(R)
    return n >> (f - 1), f, b, G, max(16, 1 << (G - 1).bit_length())


def rows_of_group(P):
    """Rows of a group, padded to P columns, that one program takes through the stages: eight numbers a thread."""
    return min(16, 1024 // P)


def warps(P):
    """Of a product [P, P] of two groups."""
    return 4 if P < 64 else 8


def _stages(R):
    """V [F, K/G, G, G]: V[0] are the groups, multiplied out."""
    R, (groups, f, b, G, P) = R.contiguous(), _sizes(R)
    if f == 1:
        return R
    V = R.new_empty(f, groups, G, G)
    _kernels().stages_kernel[(groups, _cdiv(G, rows_of_group(P)))](
        R, V, groups, f, b, G, P, rows_of_group(P), num_warps=4, num_stages=1
    )
    return V


def _gradient_of_blocks(partial, V, R):
    """dR from the partial sums [count, K/G, G, G] of the gradient in the groups."""
    R, (groups, f, b, G, P) = R.contiguous(), _sizes(R)
    if f == 1:
        return blocks.gathered(partial)[None]
    H, dR = torch.empty_like(V), torch.empty_like(R)
    _kernels().stages_backward_kernel[(groups, _cdiv(G, rows_of_group(P)))](
        R, partial, H, groups, len(partial), f, b, G, P, rows_of_group(P), num_warps=4, num_stages=1
    )
    columns = min(P, COLUMNS)
    _kernels().blocks_gradient_kernel[(groups, f, _cdiv(G, columns) ** 2)](
        V, H, dR, groups, f, b, G, columns, min(P, 32), num_warps=warps(columns), num_stages=1
    )
    return dR


def rotate_to(x, R, transpose, terms, z, stride, step=0, scale=None):
    """z = x R in `terms` terms, as block_rotation's."""
    with _triton.guard(x):
        return blocks.rotate_to(x, _stages(R)[0], transpose, terms, z, stride, step, scale)


def butterfly_rotate(x, R, transpose):
    return rotate_to(x, R, transpose, 1, like_rows(x), x.shape[-1])


def butterfly_rotate_weight(weight, scale, R):
    return rotate_to(weight, R, True, 1, like_rows(weight), weight.shape[1], scale=scale)


def butterfly_rotate_backward(dz, x, R, transpose, output_mask):
    want_dx, want_dR = output_mask
    if x.numel() == 0 or not (want_dx or want_dR):
        return like_rows(x) if want_dx else x.new_empty(0), R.new_zeros(R.shape if want_dR else 0)
    with _triton.guard(x):
        V = _stages(R)
        dx, partial = blocks.rotate_backward(dz, x, V[0], transpose, output_mask)
        dR = _gradient_of_blocks(partial, V, R) if want_dR else R.new_empty(0)
    return dx if want_dx else x.new_empty(0), dR


def _scale_grid(M, N):
    panels = _cdiv(N, tiles.SCALE.width)
    splits, per_split = tiles.splits(_triton.family(), tiles.SCALE.programs, tiles.SCALE.rows, panels, M)
    return (panels, splits), per_split


def scale_outputs(y, scale, bias):
    N, scale, z = len(scale), scale.contiguous(), like_rows(y)
    (y_rows, stride), M = rows(y, N), y.numel() // N
    if M == 0:
        return z
    grid, per_split = _scale_grid(M, N)
    with _triton.guard(y):
        _kernels().scale_kernel[grid](
            y_rows, scale, scale if bias is None else bias.contiguous(), z, M, N, stride, per_split, bias is not None,
            tiles.SCALE.rows, tiles.SCALE.width, _aligned(N, stride), num_warps=4,
        )  # fmt: skip
    return z


def scale_outputs_backward(dy, y, scale, bias, output_mask):
    (want_dy, want_scale), N, scale = output_mask, len(scale), scale.contiguous()
    (dy_rows, dy_stride), (y_rows, stride), M = rows(dy, N), rows(y, N), y.numel() // N
    dp = like_rows(y) if want_dy else y.new_empty(0)
    if M == 0 or not (want_dy or want_scale):
        return dp, scale.new_zeros(N if want_scale else 0)
    grid, per_split = _scale_grid(M, N)
    partial = scale.new_empty(grid[1], N) if want_scale else scale
    with _triton.guard(y):
        _kernels().scale_backward_kernel[grid](
            dy_rows, y_rows, scale, scale if bias is None else bias.contiguous(), dp if want_dy else dy_rows, partial,
            M, N, dy_stride, stride, per_split, bias is not None, want_dy, want_scale, tiles.SCALE.rows,
            tiles.SCALE.width, _aligned(N, dy_stride, stride), num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        return dp, blocks.gathered(partial) if want_scale else scale.new_empty(0)


def butterfly_rotated_linear(x, weight, bias, scale, R):
    (N, K), M = weight.shape, x.numel() // weight.shape[1]
    if weight.dtype in HALF:
        with _triton.guard(x):
            z = rotate_to(x, R, False, 2, weight.new_empty(2, M, K), K, M * K)
            y, p = blocks.linear_of_terms(z, weight, bias, scale)
        shape = (*x.shape[:-1], N)
        return y.view(shape), weight.new_empty(0) if p is None else p.view(shape)
    p = F.linear(butterfly_rotate(x, R, False), weight, bias if scale is None else None)
    if scale is None:
        return p, weight.new_empty(0)
    y = scale_outputs(p, scale, None)
    return y if bias is None else y.add_(bias), p


def _rotated_backward(dy, x, weight, R, output_mask):
    return butterfly_rotate_backward(dy.matmul(weight).to(x.dtype), x, R, False, output_mask)


def butterfly_rotated_linear_backward(dy, x, weight, scale, p, R, output_mask):
    parts = scale_outputs_backward, _rotated_backward
    return reference.linear_backward(*parts, dy, x, weight, scale, p, R, output_mask)
