"""Triton backend of the `gram_schmidt` operations: NVIDIA, AMD and Intel devices, r up to 128.

Two calls give the same bits: sums over K are cut by a closed table and added in order.
"""

import functools
import importlib

import torch

from peftkern.ops import _triton
from peftkern.ops.householder import triton_tiles as tiles

MAX_RANK = 128
ROWS = 32  # of V, per program of a product

# Warps of the one program that factors blocks of 16, 32 or 64 columns in registers, at most 16 numbers a thread.
FACTOR_WARPS = {16: 1, 32: 2, 64: 8, 128: 8}


@functools.cache
def _kernels():
    return importlib.import_module("peftkern.ops.gram_schmidt.triton_kernels")


def available():
    return _triton.available()


def supports(name, *args):
    """`(ok, reason)` for one kind of call; r is bounded by what one program factors."""
    ok, reason = _triton.serves(*args)
    if ok and args[0].shape[1] > MAX_RANK:
        return False, f"serves up to {MAX_RANK} reflections; this call has {args[0].shape[1]}"
    return ok, reason


def _cdiv(a, b):
    return -(-a // b)


def column_tile(r):
    return min(tiles.rank(r), 32)


def gram_splits(family, K, r):
    """Ranges of rows whose Gram matrices are computed apart, and the rows of each."""
    side = _cdiv(r, column_tile(r))
    per_split = _cdiv(_cdiv(K, tiles.splits(family, side * side, K, 4 * tiles.GRAM_ROWS)), tiles.GRAM_ROWS)
    per_split *= tiles.GRAM_ROWS
    return _cdiv(K, per_split), per_split


def orthonormal_factor(V):
    (K, r), kernels = V.shape, _kernels()
    R, BR = tiles.rank(r), column_tile(r)
    splits, per_split = gram_splits(_triton.family(), K, r)
    side, programs = _cdiv(r, BR), _cdiv(K, ROWS)
    Q = V.new_empty(K, r)
    T, B, second, partial = (V.new_empty(*n, r, r, dtype=torch.float64) for n in ((), (), (), (splits,)))
    again = torch.empty(1, dtype=torch.int32, device=V.device)
    work = V.new_empty(R + (4 * 64 * 64 if R > 64 else 0), dtype=torch.float64)
    # README.md, "Twice is enough": never short in float64.
    rounding = 8 * K * 2.0**-52
    limit = 2.0**-27 if V.dtype is torch.float32 else -1.0
    # Or ptxas spills, to leave room for a second program that never comes.
    registers = {"maxnreg": 255} if _triton.family().startswith("sm") else {}
    with _triton.guard(V):
        for repeat, columns, core, rows in ((False, V, B, programs), (True, Q, second, programs + _cdiv(r, ROWS))):
            kernels.gram_kernel[(splits, side, side)](
                columns, partial, again, K, r, *columns.stride(), per_split, repeat, tiles.GRAM_ROWS, BR,
                num_warps=1 if BR == 16 else 4, num_stages=1,
            )  # fmt: skip
            # Fused, two lanes that hold the same sum would round it differently, and which of them writes it is a race.
            kernels.factor_kernel[(1,)](
                partial, core, T, again, work, r, splits, rounding, limit, repeat, R, min(R, 64),
                num_warps=FACTOR_WARPS[R], enable_fp_fusion=False, **registers,
            )  # fmt: skip
            kernels.multiply_kernel[(rows,)](
                columns, core, Q, B, again, K, r, *columns.stride(), repeat, ROWS, BR, num_warps=4, num_stages=1
            )
    return Q, T, B


def orthonormal_factor_backward(dQ, dT, Q, B):
    (K, r), kernels = Q.shape, _kernels()
    R, BR = tiles.rank(r), column_tile(r)
    dT, M, dV = dT.contiguous(), B.new_empty(r, r), Q.new_empty(K, r)
    with _triton.guard(Q):
        kernels.core_gradient_kernel[(R // 16,)](dT, B, M, r, *B.stride(), R, 16, num_warps=1 if R == 16 else 4)
        kernels.gradient_kernel[(_cdiv(K, ROWS), _cdiv(r, BR))](
            dQ, Q, B, M, dV, K, r, *dQ.stride(), *Q.stride(), *B.stride(), ROWS, BR, num_warps=4, num_stages=1
        )
    return dV
