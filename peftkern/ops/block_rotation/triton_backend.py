"""Triton backend of the `block_rotation` operations: NVIDIA, AMD and Intel devices, blocks of up to 64 or 128 columns.

Half-precision rows are read in place and rounded once; sums over rows are cut by the closed table of triton_tiles.py
and added in order, so that two calls give the same bits.
"""

import functools
import importlib

import torch

from peftkern.ops import _triton
from peftkern.ops._rows import like_rows, rows
from peftkern.ops.block_rotation import triton_tiles as tiles
from peftkern.ops.householder.triton_backend import _gathered as gathered


@functools.cache
def _kernels():
    return importlib.import_module("peftkern.ops.block_rotation.triton_kernels")


def available():
    return _triton.available()


def serves_columns(dtype, columns, *args):
    """`(ok, reason)` for the tensors of a call and the columns that meet in one product."""
    ok, reason = _triton.serves(*(t for t in args if isinstance(t, torch.Tensor)))
    if ok and columns > tiles.MAX_BLOCK[dtype]:
        return False, f"serves up to {tiles.MAX_BLOCK[dtype]} mixed columns of {dtype}; this call has {columns}"
    return ok, reason


def supports(name, *args):
    """`(ok, reason)` for one kind of call; b is bounded by the product of one tile."""
    return serves_columns(*_mixed[name](*args), *args)


# The dtype of a product of blocks, and b.
_mixed = {
    "block_rotate": lambda x, R, transpose: (x.dtype, R.shape[1]),
    "block_rotate_backward": lambda dz, x, R, *_: (x.dtype, R.shape[1]),
}


def _cdiv(a, b):
    return -(-a // b)


def _aligned(*numbers):
    """Whether rows may be read in accesses of 16 bytes."""
    return all(n % 8 == 0 for n in numbers)


def rotate_to(x, R, transpose, terms, z, stride, step=0):
    """z = x R in `terms` terms, `step` apart, its rows `stride` apart; R [K/b or 1, b, b]."""
    K, R = x.shape[-1], R.contiguous()
    M = x.numel() // K
    if M == 0:
        return z
    (x_rows, x_stride), family = rows(x, K), _triton.family()
    tile = tiles.tile(family, x.dtype, R.shape[1])
    panels = _cdiv(K, tile.width)
    splits, per_split = tiles.splits(family, panels, M, tile.rows, tiles.FORWARD)
    with _triton.guard(x):
        _kernels().rotate_kernel[(panels, splits)](
            x_rows, R, z, M, K, x_stride, stride, step, per_split, R.shape[1], tile.width, tile.panel, tile.rows,
            len(R) == 1, transpose, terms, _aligned(K, x_stride, stride), num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return z


def sums_of(x, R):
    """How partial sums of dR are cut: (tile, panels per program, programs, splits, rows per split)."""
    K, family, shared = x.shape[-1], _triton.family(), len(R) == 1
    tile = tiles.tile(family, x.dtype, R.shape[1])
    panels = _cdiv(K, tile.width)
    each = tiles.panels_per_program(panels) if shared else 1
    return (
        tile,
        each,
        _cdiv(panels, each),
        *tiles.splits(family, _cdiv(panels, each), x.numel() // K, tile.rows, tiles.BACKWARD),
    )


def rotate_backward(dz, x, R, transpose, output_mask):
    """dx, and dR as partial sums [count, *R.shape], each None where it is not wanted."""
    (want_dx, want_dR), K, R = output_mask, x.shape[-1], R.contiguous()
    (x_rows, x_stride), (dz_rows, dz_stride), M = rows(x, K), rows(dz, K), x.numel() // K
    tile, each, programs, splits, per_split = sums_of(x, R)
    dx, partial = like_rows(x) if want_dx else None, None
    if want_dR:
        count = splits * programs * (tile.width // R.shape[1]) if len(R) == 1 else splits
        partial = R.new_empty(count, *R.shape)
    with _triton.guard(x):
        _kernels().rotate_backward_kernel[(programs, splits)](
            dz_rows, x_rows, R, dx if want_dx else x_rows, partial if want_dR else R, M, K, dz_stride, x_stride,
            per_split, each, R.shape[1], tile.width, tile.panel, tile.rows, len(R) == 1, transpose, want_dx, want_dR,
            _aligned(K, dz_stride, x_stride), num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return dx, partial


def block_rotate(x, R, transpose):
    return rotate_to(x, R, transpose, 1, like_rows(x), x.shape[-1])


def block_rotate_backward(dz, x, R, transpose, output_mask):
    want_dx, want_dR = output_mask
    if x.numel() == 0 or not (want_dx or want_dR):
        return like_rows(x) if want_dx else x.new_empty(0), R.new_zeros(R.shape if want_dR else 0)
    dx, partial = rotate_backward(dz, x, R, transpose, output_mask)
    return dx if want_dx else x.new_empty(0), gathered(partial) if want_dR else R.new_empty(0)
