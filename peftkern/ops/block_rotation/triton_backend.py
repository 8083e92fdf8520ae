"""Triton backend of the `block_rotation` operations: NVIDIA, AMD and Intel devices, blocks of up to 512 columns.

Half-precision rows are read in place and rounded once; sums over rows are cut by the closed table of triton_tiles.py
and added in order, so that two calls give the same bits.
"""

import functools
import importlib

import torch
import torch.nn.functional as F

from peftkern.ops import _triton
from peftkern.ops._rows import HALF, like_rows, rows
from peftkern.ops.block_rotation import triton_tiles as tiles
from peftkern.ops.block_rotation.contract import block_size
from peftkern.ops.householder import triton_tiles
from peftkern.ops.householder.triton_backend import _gathered as gathered


@functools.cache
def _kernels():
    return importlib.import_module("peftkern.ops.block_rotation.triton_kernels")


def available():
    return _triton.available()


def serves_columns(most, columns, *args):
    """`(ok, reason)` for the tensors of a call and the columns that mix."""
    ok, reason = _triton.serves(*(t for t in args if isinstance(t, torch.Tensor)))
    if ok and columns > most:
        return False, f"serves up to {most} columns that mix; this call has {columns}"
    return ok, reason


def supports(name, *args):
    """`(ok, reason)` for one kind of call; b is bounded, of blocks that are made by the product of one tile."""
    return serves_columns(tiles.MAP_MOST if name.startswith("skew") else tiles.MOST, _columns[name](*args), *args)


_columns = {
    "skew_polynomial": lambda q, coefficients: block_size(q.shape[1]),
    "skew_polynomial_backward": lambda dR, q, coefficients: dR.shape[1],
    "skew_cayley": lambda q: block_size(q.shape[1]),
    "skew_cayley_backward": lambda dR, R: R.shape[1],
    "block_rotate": lambda x, R, transpose: R.shape[1],
    "block_rotate_backward": lambda dz, x, R, *_: R.shape[1],
    "block_rotated_linear": lambda x, weight, bias, R: R.shape[1],
    "block_rotated_linear_backward": lambda dy, x, weight, R, output_mask: R.shape[1],
}


def _cdiv(a, b):
    return -(-a // b)


def _aligned(*numbers):
    """Whether rows may be read in accesses of 16 bytes."""
    return all(n % 8 == 0 for n in numbers)


@functools.cache
def _maps():
    return importlib.import_module("peftkern.ops.block_rotation.triton_map_kernels")


def _map_panels(S, b):
    """(panels, columns in all, panel sizes, rows of a strip, warps) of blocks that no rows meet."""
    panel, width, strip, warps = tiles.map_panel(_triton.family(), b)
    return _cdiv(S * b, width), S * b, (b, width, panel), strip, warps


def skew_polynomial(q, coefficients):
    q, S, b = q.contiguous(), q.shape[0], block_size(q.shape[1])
    R, (panels, K, sizes, strip, warps) = q.new_empty(S, b, b), _map_panels(S, b)
    with _triton.guard(q):
        _maps().polynomial_kernel[(panels,)](
            q, R, K, tuple(coefficients), len(coefficients) - 1, *sizes, strip, num_warps=warps, num_stages=1
        )
    return R


def skew_polynomial_backward(dR, q, coefficients):
    dR, q, S, b = dR.contiguous(), q.contiguous(), q.shape[0], dR.shape[1]
    dq, (panels, K, sizes, strip, warps) = torch.empty_like(q), _map_panels(S, b)
    if dq.numel():
        with _triton.guard(q):
            _maps().polynomial_backward_kernel[(panels,)](
                dR, q, dq, K, tuple(coefficients), len(coefficients) - 1, *sizes, strip, num_warps=warps, num_stages=1
            )
    return dq


def cayley(A, S, b, dense):
    """R [S, b, b] of packed skew matrices, or of the skew parts of dense ones."""
    A, R, (size, side, warps) = A.contiguous(), A.new_empty(S, b, b), tiles.inverses(b)
    with _triton.guard(A):
        _maps().cayley_kernel[(_cdiv(S, side),)](A, R, S, b, size, side, dense, num_warps=warps, num_stages=1)
    return R


def cayley_backward(dR, R, dense):
    """The gradient in packed numbers [S, b (b - 1) / 2], or in dense matrices [S, b, b], of R [S, b, b]."""
    dR, R, (S, b, _) = dR.contiguous(), R.contiguous(), R.shape
    dA, (panels, K, sizes, _, warps) = R.new_empty(R.shape if dense else (S, b * (b - 1) // 2)), _map_panels(S, b)
    if dA.numel():
        with _triton.guard(R):
            _maps().cayley_backward_kernel[(panels,)](dR, R, dA, K, *sizes, dense, num_warps=warps, num_stages=1)
    return dA


def skew_cayley(q):
    return cayley(q, q.shape[0], block_size(q.shape[1]), False)


def skew_cayley_backward(dR, R):
    return cayley_backward(dR, R, False)


def rotate_to(x, R, transpose, terms, z, stride, step=0, scale=None):
    """z = x R in `terms` terms, `step` apart, its rows `stride` apart, times scale [M]; R [K/b or 1, b, b]."""
    K, R = x.shape[-1], R.contiguous()
    s, scales = (R, False) if scale is None else (scale.contiguous(), True)
    M = x.numel() // K
    if M == 0:
        return z
    (x_rows, x_stride), family, b = rows(x, K), _triton.family(), R.shape[1]
    if b > tiles.PANEL_MOST[x.dtype]:
        BM, BC, warps = tiles.wide(family, x.dtype)
        with _triton.guard(x):
            _kernels().wide_rotate_kernel[(_cdiv(M, BM), K // b * _cdiv(b, BC))](
                x_rows, R, z, s, M, K, x_stride, stride, step, b, BM, BC, len(R) == 1, transpose, terms, scales,
                _aligned(K, x_stride, stride), num_warps=warps, num_stages=1,
            )  # fmt: skip
        return z
    tile = tiles.tile(family, x.dtype, b)
    panels = _cdiv(K, tile.width)
    splits, per_split = tiles.splits(family, tile.programs, tile.rows, panels, M)
    with _triton.guard(x):
        _kernels().rotate_kernel[(panels, splits)](
            x_rows, R, z, s, M, K, x_stride, stride, step, per_split, R.shape[1], tile.width, tile.panel, tile.rows,
            len(R) == 1, transpose, terms, scales, _aligned(K, x_stride, stride), num_warps=tile.warps,
            num_stages=tile.stages,
        )  # fmt: skip
    return z


def rotate_backward(dz, x, R, transpose, output_mask):
    """dx, and dR as partial sums [count, *R.shape], each None where it is not wanted."""
    (want_dx, want_dR), K, R = output_mask, x.shape[-1], R.contiguous()
    if R.shape[1] > tiles.PANEL_MOST[x.dtype]:
        dx = rotate_to(dz, R, not transpose, 1, like_rows(x), K) if want_dx else None
        return dx, _wide_sums(*((dz, x) if transpose else (x, dz)), R) if want_dR else None
    (x_rows, x_stride), (dz_rows, dz_stride), M = rows(x, K), rows(dz, K), x.numel() // K
    tile, shared = tiles.tile(_triton.family(), x.dtype, R.shape[1]), len(R) == 1
    panels = _cdiv(K, tile.width)
    each = tiles.panels_per_program(panels) if shared else 1
    programs = _cdiv(panels, each)
    splits, per_split = tiles.splits(_triton.family(), tile.programs, tile.rows, programs, M)
    dx, partial = like_rows(x) if want_dx else None, None
    if want_dR:
        count = splits * programs * (tile.width // R.shape[1]) if shared else splits
        partial = R.new_empty(count, *R.shape)
    with _triton.guard(x):
        _kernels().rotate_backward_kernel[(programs, splits)](
            dz_rows, x_rows, R, dx if want_dx else x_rows, partial if want_dR else R, M, K, dz_stride, x_stride,
            per_split, each, R.shape[1], tile.width, tile.panel, tile.rows, shared, transpose, want_dx, want_dR,
            _aligned(K, dz_stride, x_stride), num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return dx, partial


def _wide_sums(left, right, R):
    """Partial sums [count, *R.shape] of left^T right, block by block."""
    K, b = left.shape[-1], R.shape[1]
    (a, a_stride), (c, c_stride), M = rows(left, K), rows(right, K), left.numel() // K
    BM, BC, _ = tiles.wide(_triton.family(), left.dtype)
    programs = K // b * _cdiv(b, BC) ** 2
    splits, per_split = tiles.splits(_triton.family(), 2, BM, programs, M)
    partial = R.new_empty(splits * (K // b) // len(R), *R.shape)
    with _triton.guard(left):
        _kernels().wide_sums_kernel[(programs, splits)](
            a, c, partial, M, K, a_stride, c_stride, per_split, b, BM, BC, _aligned(K, a_stride, c_stride),
            num_warps=4, num_stages=1,
        )  # fmt: skip
    return partial


def block_rotate(x, R, transpose):
    return rotate_to(x, R, transpose, 1, like_rows(x), x.shape[-1])


def block_rotate_backward(dz, x, R, transpose, output_mask):
    want_dx, want_dR = output_mask
    if x.numel() == 0 or not (want_dx or want_dR):
        return like_rows(x) if want_dx else x.new_empty(0), R.new_zeros(R.shape if want_dR else 0)
    dx, partial = rotate_backward(dz, x, R, transpose, output_mask)
    return dx if want_dx else x.new_empty(0), gathered(partial) if want_dR else R.new_empty(0)


def linear_of_terms(z, weight, bias, scale):
    """y = s (z_h + z_l) W^T + b and p, the same without s and b (y itself where there is neither), [M, N]."""
    (W, W_stride), (_, M, K), N = rows(weight, weight.shape[1]), z.shape, weight.shape[0]
    if scale is None and bias is None:
        # The rounding of z_l W^T is 2^-9 of 2^-9: the library may add to it in its accumulator.
        y = z[1] @ weight.mT
        return y.addmm_(z[0], weight.mT), None
    family = _triton.family()
    tile, y = tiles.linear(family, M), z.new_empty(M, N)
    p = z.new_empty(M, N) if scale is not None else None
    if M:
        _kernels().linear_kernel[(_cdiv(M, tile.rows) * _cdiv(N, tile.cols),)](
            z, W, W if scale is None else scale.contiguous(), W if bias is None else bias.contiguous(), y,
            y if p is None else p, M, N, K, W_stride, M * K, scale is not None, bias is not None, tile.rows, tile.cols,
            tile.depth, triton_tiles.GROUP, _aligned(K, W_stride), tile.stages, num_warps=tile.warps,
            num_stages=tile.stages,
        )  # fmt: skip
    return y, p


def block_rotated_linear(x, weight, bias, R):
    if weight.dtype not in HALF:
        return F.linear(block_rotate(x, R, False), weight, bias)
    (N, K), M = weight.shape, x.numel() // weight.shape[1]
    with _triton.guard(x):
        z = rotate_to(x, R, False, 2, weight.new_empty(2, M, K), K, M * K)
        return linear_of_terms(z, weight, bias, None)[0].view(*x.shape[:-1], N)


def block_rotated_linear_backward(dy, x, weight, R, output_mask):
    return block_rotate_backward(dy.matmul(weight).to(x.dtype), x, R, False, output_mask)
