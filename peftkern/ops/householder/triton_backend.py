"""Triton backend of the `householder` operations: NVIDIA, AMD and Intel devices, r up to 128.

Half-precision rows are read in place; everything of rank r keeps float32 accuracy (float64 for products with T). Two
calls give the same bits: sums over rows and over K are cut by the closed table of triton_tiles.py and added in order.
"""

import functools
import importlib

import torch
import torch.nn.functional as F

from peftkern.ops import _triton
from peftkern.ops.householder import triton_tiles as tiles

MAX_RANK = 128
_MOST_OF_A_TERM = 1 << 30  # twice the distance between terms is a 32-bit number (64 bits spill on sm_100)

# The kernels that sum products over lanes run with enable_fp_fusion=False: fused, two lanes that hold the same sum
# round it differently, and which of them writes it is a race.

# How many bfloat16 terms hold a number of this dtype; float64 rows are taken as they are.
_TERMS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3, torch.float64: 1}


@functools.cache
def _kernels():
    return importlib.import_module("peftkern.ops.householder.triton_kernels")


def available():
    return _triton.available()


def supports(name, *args):
    """`(ok, reason)` for one kind of call; r is bounded by what one program inverts."""
    tensors = [t for t in args if isinstance(t, torch.Tensor)]
    ok, reason = _triton.serves(*tensors)
    if not ok:
        return ok, reason
    r = (args[_V_OF.get(name, 1)]).shape[1]
    if r > MAX_RANK:
        return False, f"serves up to {MAX_RANK} reflections; this call has {r}"
    return True, None


# Where V is among the arguments; 1 where not listed.
_V_OF = {
    "wy_factor": 0,
    "rotate_backward": 3,
    "rotated_linear": 3,
    "rotated_linear_backward": 5,
    "project_backward": 2,
    "orthogonality_penalty": 0,
}


def _cdiv(a, b):
    return -(-a // b)


def _rows(x, K):
    """x [..., K] as rows of unit inner stride, and the stride between them; copies only where there is no such view."""
    if x.is_contiguous():
        return x, K
    try:
        rows = x.view(-1, K)
    except RuntimeError:
        return x.contiguous(), K
    stride_row, stride_col = rows.stride()
    return (rows, stride_row) if stride_col == 1 else (rows.contiguous(), K)


def _aligned(*numbers):
    """Whether rows may be read in accesses of 16 bytes."""
    return all(n % 8 == 0 for n in numbers)


def _like_rows(x):
    return x.new_empty(x.shape)


def _split(v, strides, terms, pair=False, unpair=False, negate=False):
    """The terms [terms, rows, R] of a matrix [rows, r], of its pairs, or of the columns whose pairs it has."""
    rows, r = v.shape
    R = tiles.rank(r)
    dtype = torch.float64 if v.dtype is torch.float64 else torch.bfloat16
    out = v.new_empty(terms, rows, R, dtype=dtype)
    block = tiles.SPLIT_ROWS[R]
    _kernels().split_kernel[(_cdiv(rows, block),)](
        v, out, rows, r, *strides, rows * R, R, block, terms, pair, unpair, negate, num_warps=4
    )
    return out


def _terms_of(dtype):
    """Terms of a rank-r operand that must keep all of V's precision."""
    return 1 if dtype is torch.float64 else 3


def _project(rows, stride, M, K, r, terms, dtype):
    """Partial sums [splits, M, r] of rows V."""
    family, R = _triton.family(), terms.shape[2]
    tile = tiles.project(family, rows.dtype, M, R)
    programs = _cdiv(M, tile.rows)
    splits = tiles.splits(family, programs, K, 8 * tile.depth)
    per_split = _cdiv(_cdiv(K, splits), tile.depth) * tile.depth
    splits = _cdiv(K, per_split)
    P = rows.new_empty(splits, M, r, dtype=dtype)
    _kernels().project_kernel[(programs, splits)](
        rows, terms, P, M, K, r, stride, terms.stride(0), per_split, _TERMS[rows.dtype], terms.shape[0], R,
        tile.rows, tile.depth, _aligned(K, stride), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return P


def _reduce(partial, out, negate=False):
    """The sum over the first dimension of partial, into out."""
    n = out.numel()
    block = tiles.reduce(n)
    _kernels().reduce_kernel[(_cdiv(n, block),)](
        partial, out, n, partial.shape[0], negate, block, num_warps=block // 128 or 1
    )
    return out


def _gathered(P):
    """P [splits, M, r] as one sum."""
    return P[0] if P.shape[0] == 1 else _reduce(P, torch.empty_like(P[0]))


def _core(P, C, terms, pair=False, negate=False, keep=False):
    """Terms of S = P C (float64 inside) for partial sums P [splits, M, r]; with `keep` also their sum, x V."""
    splits, M, r = P.shape
    R = tiles.rank(r)
    if M * R >= _MOST_OF_A_TERM:
        raise ValueError(f"triton serves up to {_MOST_OF_A_TERM // R - 1} rows for {r} reflections; this call has {M}")
    BR = min(R, 32)
    S = P.new_empty(terms, M, R, dtype=torch.float64 if P.dtype is torch.float64 else torch.bfloat16)
    total = P.new_empty(M, r) if keep else P
    _kernels().core_kernel[(_cdiv(M, tiles.CORE_ROWS), R // BR)](
        P, C, total, S, M, r, *P.stride()[1:], *C.stride(), P.stride(0), M * R, splits,
        tiles.CORE_ROWS, BR, R, terms, pair, negate, keep, True, num_warps=4, num_stages=1,
    )  # fmt: skip
    return (S, total) if keep else S


def _times(V, C):
    """V C in V's dtype, float64 inside."""
    K, r = V.shape
    BR = min(tiles.rank(r), 32)
    out = V.new_empty(K, r)
    _kernels().core_kernel[(_cdiv(K, tiles.CORE_ROWS), _cdiv(r, BR))](
        V, C, V, out, K, r, *V.stride(), *C.stride(), 0, 0, 1,
        tiles.CORE_ROWS, BR, tiles.rank(r), 1, False, False, False, False, num_warps=4, num_stages=1,
    )  # fmt: skip
    return out


def _gram_splits(rows, r):
    """(programs along one side of [r, r], splits of the rows, rows of one)."""
    side = _cdiv(r, min(tiles.rank(r), 32))
    splits = tiles.splits(_triton.family(), side * side, rows, 4 * tiles.GRAM_ROWS)
    per_split = _cdiv(_cdiv(rows, splits), tiles.GRAM_ROWS) * tiles.GRAM_ROWS
    return side, _cdiv(rows, per_split), per_split


def _gram(A, B, upper):
    """Partial sums [splits, r, r] of A^T B, float64."""
    rows, r = A.shape
    side, splits, per_split = _gram_splits(rows, r)
    out = A.new_empty(splits, r, r, dtype=torch.float64)
    _kernels().gram_kernel[(splits, side, side)](
        A, B, out, rows, r, *A.stride(), *B.stride(), per_split, tiles.GRAM_ROWS, min(tiles.rank(r), 32), upper,
        num_warps=4, num_stages=1,
    )  # fmt: skip
    return out


def _gradient_of_factor(P, Q, reverse):
    """dT = -Q^T P (-P^T Q when reversed), float64."""
    left, right = (P, Q) if reverse else (Q, P)
    dT = P.new_empty(P.shape[1], P.shape[1], dtype=torch.float64)
    return _reduce(_gram(left, right, False), dT, negate=True)


def _update(y, x, S, R_terms, V_terms, z, partial, per_split, tile):
    """z = y - R V^T if there is a z, and partial sums of -(y^T S + x^T R) if there is a place for them; y, S or None.

    y and x are (rows, stride).
    """
    (y_rows, y_stride), (rows, stride) = y or x, x
    M, K = R_terms.shape[1], V_terms.shape[1]
    if partial is None:
        per_split *= _cdiv(M, per_split * tiles.MOST_PROGRAMS)
    out = z if z is not None else rows
    dV = partial if partial is not None else V_terms.new_empty(0, dtype=_sum_dtype(rows.dtype))
    _kernels().update_kernel[(_cdiv(K, tile.cols), _cdiv(M, per_split))](
        y_rows, rows, S if S is not None else R_terms, R_terms, V_terms, out, dV, M, K,
        partial.shape[2] if partial is not None else 1, y_stride, stride, R_terms.stride(0), V_terms.stride(0),
        per_split, y is not None, S is not None, z is not None, partial is not None, _TERMS[rows.dtype],
        R_terms.shape[0], _z_terms(rows.dtype), R_terms.shape[2], tile.rows, tile.cols,
        _aligned(K, y_stride, stride), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _sum_dtype(dtype):
    return torch.float64 if dtype is torch.float64 else torch.float32


def _z_terms(dtype):
    """Terms of both factors of an update that is rounded to this dtype."""
    return {torch.float64: 1, torch.float32: 3}.get(dtype, 2)


def factor_many(Vs):
    """T of each V [K, r], one dtype and r, K and strides as they come: one launch for every 64 layers."""
    Ts = [V.new_empty(V.shape[1], V.shape[1], dtype=torch.float64) for V in Vs]
    most = tiles.LAYERS[-1]
    for i in range(0, len(Vs), most):
        _factor(Vs[i : i + most], Ts[i : i + most])
    return Ts


def _factor(Vs, Ts):
    V, r, count = Vs[0], Vs[0].shape[1], len(Vs)
    R, missing = tiles.rank(r), tiles.layers(count) - count
    cuts = [_gram_splits(len(V), r) for V in Vs]
    side, most = cuts[0][0], max(splits for _, splits, _ in cuts)
    partial = V.new_empty(count, most, r, r, dtype=torch.float64)
    work = V.new_empty(count, 2, R, R, dtype=torch.float64)
    layers = [(V, T, len(V), *V.stride(), per_split) for V, T, (_, _, per_split) in zip(Vs, Ts, cuts, strict=True)]
    # The last layer stands for those that are missing: no program comes to them.
    columns = zip(*layers, *layers[-1:] * missing, strict=True)
    with _triton.guard(V):
        _kernels().wy_factor_kernel[(count * most, side, side)](
            *columns, partial, work, _triton.counters(V, count + missing), most, r, side * (side + 1) // 2,
            tiles.GRAM_ROWS, min(R, 32), R, num_warps=4, num_stages=1, enable_fp_fusion=False,
        )  # fmt: skip


def wy_factor(V):
    return factor_many([V])[0]


def wy_factor_backward(dT, V, T):
    dT, T, r = dT.contiguous(), T.contiguous(), V.shape[1]
    R, dG = tiles.rank(r), torch.empty_like(T)
    with _triton.guard(V):
        _kernels().gram_gradient_kernel[(_cdiv(r, 16),)](dT, T, dG, r, R, 16, num_warps=4, num_stages=1)
        return _times(V, dG)


def rotate(x, V, T, reverse):
    K, r = V.shape
    M = x.numel() // K
    z, P = _like_rows(x), V.new_empty(M, r)
    if M == 0:
        return z, P
    rows, stride = _rows(x, K)
    terms = _terms_of(V.dtype)
    z_terms = _z_terms(x.dtype)
    with _triton.guard(x):
        V_terms = _split(V, V.stride(), terms)
        partial = _project(rows, stride, M, K, r, V_terms, V.dtype)
        S, P = _core(partial, T if reverse else T.mT, z_terms, keep=True)
        tile = tiles.update(_triton.family(), x.dtype, V_terms.shape[2])
        _update((rows, stride), (rows, stride), None, S, V_terms, z, None, tile.rows, tile)
    return z, P


def _row_splits(family, M, K, tile):
    """Rows per program of an update that also sums over rows."""
    splits = tiles.splits(family, _cdiv(K, tile.cols), M, 2 * tile.rows)
    return _cdiv(_cdiv(M, splits), tile.rows) * tile.rows


def _empty_gradients(dx, V, want_dV):
    """What a call without rows returns."""
    r = V.shape[1]
    if not want_dV:
        return dx, V.new_empty(0), V.new_empty(0, dtype=torch.float64)
    return dx, V.new_zeros(V.shape), V.new_zeros(r, r, dtype=torch.float64)


def rotate_backward(dz, x, P, V, T, reverse, output_mask):
    (K, r), (want_dx, want_dV) = V.shape, output_mask
    M = x.numel() // K
    dx = _like_rows(dz) if want_dx else dz.new_empty(0)
    if M == 0 or not (want_dx or want_dV):
        return _empty_gradients(dx, V, want_dV)
    rows, dz_rows, P = _rows(x, K), _rows(dz, K), P.contiguous()
    family, terms = _triton.family(), _terms_of(V.dtype)
    C = T if reverse else T.mT
    with _triton.guard(x):
        V_terms = _split(V, V.stride(), terms)
        tile = tiles.update(family, x.dtype, V_terms.shape[2])
        per_split = _row_splits(family, M, K, tile) if want_dV else tile.rows
        Q = _project(*dz_rows, M, K, r, V_terms, V.dtype)
        R_terms, Q = _core(Q, C.mT, terms, keep=True)
        S = _core(P[None], C, terms) if want_dV else None
        partial = V.new_empty(_cdiv(M, per_split), K, r) if want_dV else None
        _update(dz_rows, rows, S, R_terms, V_terms, dx if want_dx else None, partial, per_split, tile)
        if not want_dV:
            return dx, V.new_empty(0), T.new_empty(0)
        return dx, _reduce(partial, V.new_empty(K, r)), _gradient_of_factor(P, Q, reverse)


def rotated_linear(x, weight, bias, V, T, keep):
    if x.dtype not in tiles.HALF:
        z, P = rotate(x, V, T, False)
        return F.linear(z, weight, bias), P, V.new_empty(0, V.shape[1])
    (K, r), N = V.shape, weight.shape[0]
    M = x.numel() // K
    y, P = x.new_empty(*x.shape[:-1], N), V.new_empty(M, r)
    (rows, stride), (W, W_stride) = _rows(x, K), _rows(weight, K)
    with _triton.guard(x):
        V_terms = _split(V, V.stride(), 3, pair=True)
        R = V_terms.shape[2]
        WV = _gathered(_project(W, W_stride, N, K, r, V_terms, V.dtype))
        kept = WV if keep else V.new_empty(0, r)
        if M == 0:
            return y, P, kept
        WV_terms = _split(WV, WV.stride(), 2)
        partial = _project(rows, stride, M, K, r, V_terms, V.dtype)
        tile = tiles.linear(_triton.family(), M, R, bias is not None)
        S, P = _core(partial, T.mT, 2, pair=True, negate=tile is not None, keep=True)
        if tile is None:
            # S (W V)^T is rounded alone, and the library adds the product to it in its accumulator.
            step = tiles.update(_triton.family(), x.dtype, R)
            _update(None, (y.view(M, N), N), None, S, WV_terms, y, None, step.rows, step)
            return y.view(M, N).addmm_(rows.reshape(M, K), W.mT).view(y.shape), P, kept
        _kernels().linear_kernel[(_cdiv(M, tile.rows) * _cdiv(N, tile.cols),)](
            rows, W, bias if bias is not None else rows, S, WV_terms, y, M, N, K, stride, W_stride,
            0 if bias is None else bias.stride(0), S.stride(0), WV_terms.stride(0), bias is not None, 2, R,
            tile.rows, tile.cols, tile.depth, tiles.GROUP, _aligned(K, stride, W_stride), tile.stages,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return y, P, kept


def rotated_linear_backward(dy, x, weight, P, B, V, T, output_mask):
    if B.shape[0] == 0:
        return rotate_backward(dy.matmul(weight), x, P, V, T, False, output_mask)
    (K, r), (want_dx, want_dV), N = V.shape, output_mask, weight.shape[0]
    M = x.numel() // K
    dx = _like_rows(x) if want_dx else x.new_empty(0)
    if M == 0 or not (want_dx or want_dV):
        return _empty_gradients(dx, V, want_dV)
    rows, dy_rows, W, P = _rows(x, K), _rows(dy, N), _rows(weight, K), P.contiguous()
    tile = tiles.linear_backward(_triton.family(), M, tiles.rank(r))
    with _triton.guard(x):
        V_terms = _split(V, V.stride(), 3)
        Q = _project(*dy_rows, M, N, r, _split(B, B.stride(), 3, unpair=True), V.dtype)
        R_terms, Q = _core(Q, T, 3, negate=tile is not None, keep=True)
        S = _core(P[None], T.mT, 3, negate=tile is not None) if want_dV else None
        fused = _linear_backward if tile is not None else _linear_backward_in_steps
        partial = fused(dy_rows, W, rows, S, R_terms, V_terms, dx if want_dx else None, r, tile)
        if not want_dV:
            return dx, V.new_empty(0), T.new_empty(0)
        return dx, _reduce(partial, V.new_empty(K, r)), _gradient_of_factor(P, Q, False)


def _linear_backward(dy, W, x, S, R_terms, V_terms, dx, r, tile):
    """Partial sums of dV, and dx: dz = dy W does not leave the registers. S and R_terms are negated."""
    (dy_rows, dy_stride), (W_rows, W_stride), (rows, stride) = dy, W, x
    M, (N, K), R = R_terms.shape[1], W_rows.shape, R_terms.shape[2]
    tiles_m, columns = _cdiv(M, tile.rows), _cdiv(K, tile.cols)
    partial = rows.new_empty(tiles_m, K, r, dtype=torch.float32) if S is not None else None
    _kernels().linear_backward_kernel[(tiles_m * columns,)](
        dy_rows, W_rows, rows, S if S is not None else R_terms, R_terms, V_terms, dx if dx is not None else rows,
        partial if partial is not None else R_terms, M, N, K, r, dy_stride, W_stride, stride, R_terms.stride(0),
        V_terms.stride(0), dx is not None, S is not None, _TERMS[rows.dtype], 3,
        tiles.dx_terms(rows.dtype, K, r), R, tile.rows, tile.cols, tile.depth, tiles.GROUP,
        _aligned(K, N, stride, dy_stride, W_stride), tile.stages, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return partial


def _linear_backward_in_steps(dy, W, x, S, R_terms, V_terms, dx, r, _):
    """dx = -R V^T + dy W by the library, dV = -W^T (dy^T S) - x^T R: where the fused product has no good tile."""
    (dy_rows, _), (W_rows, _), (rows, _) = dy, W, x
    (N, K), M, family = W_rows.shape, R_terms.shape[1], _triton.family()
    tile = tiles.update(family, rows.dtype, R_terms.shape[2])
    per_x = _row_splits(family, M, K, tile) if S is not None else tile.rows
    per_w, per_y = _row_splits(family, N, K, tile), _row_splits(family, M, N, tile)
    splits_x, partial = _cdiv(M, per_x), None
    if S is not None:
        partial = rows.new_empty(splits_x + _cdiv(N, per_w), K, r, dtype=torch.float32)
    _update(None, x, None, R_terms, V_terms, dx, partial[:splits_x] if S is not None else None, per_x, tile)
    if dx is not None:
        dx.view(M, K).addmm_(dy_rows.reshape(M, N), W_rows)
    if S is not None:
        minus_dyS = rows.new_empty(_cdiv(M, per_y), N, r, dtype=torch.float32)
        _update(None, dy, None, S, S.new_empty(3, N, 0), None, minus_dyS, per_y, tile)
        minus_dyS = _gathered(minus_dyS)
        _update(None, W, None, _split(minus_dyS, minus_dyS.stride(), 3, negate=True), V_terms, None,
                partial[splits_x:], per_w, tile)  # fmt: skip
    return partial


def project(x, V):
    K, r = V.shape
    M = x.numel() // K
    if M == 0:
        return V.new_empty(M, r)
    rows, stride = _rows(x, K)
    with _triton.guard(x):
        return _gathered(_project(rows, stride, M, K, r, _split(V, V.stride(), _terms_of(V.dtype)), V.dtype))


def project_backward(dP, x, V, output_mask):
    (K, r), (want_dx, want_dV) = V.shape, output_mask
    M = x.numel() // K
    dx = _like_rows(x) if want_dx else x.new_empty(0)
    if M == 0 or not (want_dx or want_dV):
        return _empty_gradients(dx, V, want_dV)[:2]
    rows, family, terms = _rows(x, K), _triton.family(), _terms_of(V.dtype)
    with _triton.guard(x):
        V_terms = _split(V, V.stride(), terms)
        minus_dP = _split(dP, dP.stride(), terms, negate=True)
        tile = tiles.update(family, x.dtype, V_terms.shape[2])
        per_split = _row_splits(family, M, K, tile) if want_dV else tile.rows
        partial = V.new_empty(_cdiv(M, per_split), K, r) if want_dV else None
        _update(None, rows, None, minus_dP, V_terms, dx if want_dx else None, partial, per_split, tile)
        return dx, _reduce(partial, V.new_empty(K, r)) if want_dV else V.new_empty(0)


def orthogonality_penalty(V, squared):
    total = V.new_empty(())
    with _triton.guard(V):
        partial = _gram(V, V, True)
        _kernels().penalty_kernel[(1,)](
            partial, partial, total, V.shape[1], partial.shape[0], squared, False, tiles.rank(V.shape[1]), num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip
    return total


def orthogonality_penalty_backward(grad, V, squared):
    r = V.shape[1]
    M = V.new_empty(r, r, dtype=torch.float64)
    with _triton.guard(V):
        partial = _gram(V, V, True)
        _kernels().penalty_kernel[(1,)](
            partial, grad, M, r, partial.shape[0], squared, True, tiles.rank(r), num_warps=4, enable_fp_fusion=False
        )
        return _times(V, M)
