"""Triton kernels of the `gram_schmidt` operations, float64 inside. Formulas: README.md; bytes and flops: costs.py.

    V, Q, dQ, dV [K, r] float32 or float64; B, T, dT [r, r] float64, B upper triangular; Q = V B

A factor is three launches (gram, factor, multiply) and three more that return at once where once is enough: Triton has
no barrier across programs, and B must be complete before the first row of Q.
"""

import triton
import triton.language as tl


@triton.jit
def _dot(b_a, b_b, b_acc):
    return tl.dot(b_a.to(tl.float64), b_b.to(tl.float64), b_acc, input_precision="ieee", out_dtype=tl.float64)


@triton.jit
def gram_kernel(
    p_v, p_out, p_again, rows, r, s_row, s_col, per_split,
    AGAIN: tl.constexpr, BL: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Partial sums [splits, r, r] of V^T V over ranges of rows; only tiles that meet the upper triangle.

    Launch: (splits, r / BR, r / BR). Bytes: V once per tile of BR columns. AGAIN: where the factor asked for it.
    """
    i_s, i_i, i_j = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if AGAIN:  # noqa: SIM102  (apart: a constant and a value)
        if tl.load(p_again) == 0:
            return
    if i_i > i_j:
        return
    o_i, o_j = (i_i * BR + tl.arange(0, BR))[None, :], (i_j * BR + tl.arange(0, BR))[None, :]
    b_g = tl.zeros((BR, BR), tl.float64)
    first = i_s * per_split
    last = tl.minimum(first + per_split, rows)
    for l in range(first, last, BL):
        o_l = (l + tl.arange(0, BL)).to(tl.int64)[:, None]
        b_a = tl.load(p_v + o_l * s_row + o_i * s_col, mask=(o_l < last) & (o_i < r), other=0.0)
        b_b = tl.load(p_v + o_l * s_row + o_j * s_col, mask=(o_l < last) & (o_j < r), other=0.0)
        b_g = _dot(tl.trans(b_a), b_b, b_g)
    o_row = (i_i * BR + tl.arange(0, BR))[:, None]
    tl.store(p_out + (i_s.to(tl.int64) * r + o_row) * r + o_j, b_g, mask=(o_row < r) & (o_j < r))


@triton.jit
def _root_of_inverse(b_x, b_zero):
    """1 / sqrt(x), 0 where b_zero; what is no number stays that."""
    return tl.where(b_zero, 0.0, 1.0 / tl.sqrt(tl.where(b_zero, 1.0, b_x)))


@triton.jit
def _eliminate(b_w, n, rounding, R: tl.constexpr):
    """L^-T of a symmetric [R, R] whose first n rows count; rows and columns of pivots up to `rounding` are zero.

    Column k gives pivot k and the multipliers of later columns; above the diagonal of W, where columns were, grows the
    transposed inverse of the unit triangle.
    """
    o_i, o_j = tl.arange(0, R)[:, None], tl.arange(0, R)[None, :]
    for k in range(0, n):
        b_row = tl.sum(tl.where(o_i == k, b_w, 0.0), 0)[None, :]
        b_column = tl.sum(tl.where(o_j == k, b_w, 0.0), 1)[:, None]
        pivot = tl.sum(tl.where(o_j == k, b_row, 0.0), 1)[:, None]
        b_f = tl.where((o_j > k) & ((pivot > rounding) | (pivot != pivot)), b_row / pivot, 0.0)
        b_column = tl.where(o_i == k, 1.0, b_column)
        b_w = tl.where(o_j > k, tl.where(o_i == k, 0.0, b_w) - b_column * b_f, b_w)
    b_pivot = tl.sum(tl.where(o_i == o_j, b_w, 0.0), 0)[None, :]
    b_root = _root_of_inverse(b_pivot, b_pivot <= rounding)
    return tl.where(o_i < o_j, b_w, tl.where(o_i == o_j, 1.0, 0.0)) * b_root


@triton.jit
def _block(p_g, i, j, r, H: tl.constexpr):
    """A block of a symmetric [r, r] of which the upper triangle is stored; zeros beyond r."""
    o_i, o_j = i + tl.arange(0, H)[:, None], j + tl.arange(0, H)[None, :]
    return tl.load(p_g + tl.minimum(o_i, o_j) * r + tl.maximum(o_i, o_j), mask=(o_i < r) & (o_j < r), other=0.0)


@triton.jit
def _store_block(p_out, b_x, i, j, r, H: tl.constexpr):
    o_i, o_j = i + tl.arange(0, H)[:, None], j + tl.arange(0, H)[None, :]
    tl.store(p_out + o_i * r + o_j, b_x, mask=(o_i < r) & (o_j < r))


@triton.jit
def _product(p_a, s_i, s_k, p_b, p_out, H: tl.constexpr):
    """out = a b, [H, H] each, a with strides; whatever was stored before is seen, and out by whatever comes after."""
    o_i, o_j = tl.arange(0, 32)[:, None], tl.arange(0, 32)[None, :]
    tl.debug_barrier()
    for i in range(0, H, 32):
        for j in range(0, H, 32):
            b_out = tl.zeros((32, 32), tl.float64)
            for k in range(0, H, 32):
                b_a = tl.load(p_a + (i + o_i) * s_i + (k + o_j) * s_k)
                b_out = _dot(b_a, tl.load(p_b + (k + o_i) * H + j + o_j), b_out)
            tl.store(p_out + (i + o_i) * H + j + o_j, b_out)
    tl.debug_barrier()


@triton.jit
def factor_kernel(
    p_part, p_b, p_t, p_again, p_work, r, splits, rounding, limit,
    AGAIN: tl.constexpr, R: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """B = D L^-T with L L^T = D G D, D = 1 / ||v||, from the partial sums of G; T = 2 I; 0 in dropped rows and columns.

    again: rounding ||L^-1||^2 exceeds the limit. Blocks of H stay in registers; R = 2 H goes by halves:
    U = B1^T C12, B2 from C22 - U^T U, B12 = -B1 U B2, with work [4, H, H] from L2.
    Launch: one program. Bytes: 4 splits r^2 + 16 r^2 read, 28 r^2 written, and work.
    """
    if AGAIN:  # noqa: SIM102  (apart: a constant and a value)
        if tl.load(p_again) == 0:
            return
    p_scale, p_blocks = p_work, p_work + R
    o_r, o_j = tl.arange(0, R), tl.arange(0, R)[None, :]
    b_square = tl.load(p_part + o_r * (r + 1), mask=o_r < r, other=0.0)
    for n in range(1, splits):
        b_square += tl.load(p_part + n * r * r + o_r * (r + 1), mask=o_r < r, other=0.0)
    tl.store(p_scale + o_r, _root_of_inverse(b_square, b_square == 0))
    tl.debug_barrier()
    # The cosines replace the first share. A few rows at a time, before and after: registers are for blocks of H.
    for i in range(0, R, 16):
        o_i = i + tl.arange(0, 16)[:, None]
        p_g = p_part + o_i * r + o_j
        upper = (o_i <= o_j) & (o_j < r)
        b_g = tl.load(p_g, mask=upper, other=0.0)
        for n in range(1, splits):
            b_g += tl.load(p_g + n * r * r, mask=upper, other=0.0)
        b_g = b_g * tl.load(p_scale + o_i + 0 * o_j) * tl.load(p_scale + o_j + 0 * o_i)
        tl.store(p_g, b_g, mask=upper)
    tl.debug_barrier()
    b_first = _eliminate(_block(p_part, 0, 0, r, H), tl.minimum(r, H), rounding, H)
    _store_block(p_b, b_first, 0, 0, r, H)
    if R > H:
        p_first, p_u, p_x, p_y = p_blocks, p_blocks + H * H, p_blocks + 2 * H * H, p_blocks + 3 * H * H
        o = tl.arange(0, H)[:, None] * H + tl.arange(0, H)[None, :]
        tl.store(p_first + o, b_first)
        tl.store(p_x + o, _block(p_part, 0, H, r, H))
        _product(p_first, 1, H, p_x, p_u, H)
        _product(p_u, 1, H, p_u, p_y, H)
        b_second = _eliminate(_block(p_part, H, H, r, H) - tl.load(p_y + o), r - H, rounding, H)
        _store_block(p_b, b_second, H, H, r, H)
        tl.store(p_x + o, b_second)
        _product(p_u, H, 1, p_x, p_y, H)
        _product(p_first, H, 1, p_y, p_x, H)
        _store_block(p_b, -tl.load(p_x + o), 0, H, r, H)
        _store_block(p_b, tl.zeros((H, H), tl.float64), H, 0, r, H)
    tl.debug_barrier()
    norm = tl.sum(tl.zeros((R,), tl.float64), 0)
    for i in range(0, R, 16):
        o_i = i + tl.arange(0, 16)[:, None]
        inside = (o_i < r) & (o_j < r)
        b_x = tl.load(p_b + o_i * r + o_j, mask=inside, other=0.0)
        norm += tl.sum(tl.sum(b_x * b_x, 1), 0)
        tl.store(p_b + o_i * r + o_j, b_x * tl.load(p_scale + o_i + 0 * o_j), mask=inside)
        tl.store(p_t + o_i * r + o_j, tl.where((o_i == o_j) & (b_x != 0), 2.0, 0.0), mask=inside)
    if not AGAIN:
        tl.store(p_again, tl.where(norm * rounding <= limit, 0, 1))


@triton.jit
def _multiply_rows(p_in, p_b, p_out, i, rows, r, s_row, s_col, BM: tl.constexpr, BR: tl.constexpr):
    """Rows i BM .. of in B, B upper triangular: columns from the right, so that out may be in."""
    o_m = (i * BM + tl.arange(0, BM)).to(tl.int64)[:, None]
    o_b, o_n = tl.arange(0, BR)[:, None], tl.arange(0, BR)[None, :]
    m_m = o_m < rows
    n = (r - 1) // BR * BR
    while n >= 0:
        b_out = tl.zeros((BM, BR), tl.float64)
        for k in range(0, n + BR, BR):
            b_in = tl.load(p_in + o_m * s_row + (k + o_n) * s_col, mask=m_m & (k + o_n < r), other=0.0)
            b_b = tl.load(p_b + (k + o_n) * r + n + o_b, mask=(k + o_n < r) & (n + o_b < r), other=0.0)
            b_out = _dot(b_in, tl.trans(b_b), b_out)
        tl.store(p_out + o_m * r + n + o_n, b_out.to(p_out.dtype.element_ty), mask=m_m & (n + o_n < r))
        n -= BR


@triton.jit
def multiply_kernel(
    p_in, p_b, p_out, p_first, p_again, rows, r, s_row, s_col,
    AGAIN: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Q = V B. AGAIN, where the factor asked for it: Q = Q B and first = first B in place.

    Launch: rows / BM programs, AGAIN r / BM more. Bytes: V r / BR times at most, of which once from beyond L1; B once
    per program, half of it; Q once.
    """
    i_m = tl.program_id(0)
    if AGAIN:
        if tl.load(p_again) == 0:
            return
        programs = tl.cdiv(rows, BM)
        if i_m >= programs:
            _multiply_rows(p_first, p_b, p_first, i_m - programs, r, r, r, 1, BM, BR)
            return
    _multiply_rows(p_in, p_b, p_out, i_m, rows, r, s_row, s_col, BM, BR)


@triton.jit
def core_gradient_kernel(p_dt, p_b, p_out, r, s_bi, s_bj, R: tl.constexpr, BI: tl.constexpr):
    """M = -2 (dT + dT^T) B^T [r, r]. Launch: R / BI programs, BI rows each. Bytes: dT twice, B once per program."""
    o_i = (tl.program_id(0) * BI + tl.arange(0, BI))[:, None]
    o_row, o_j = tl.arange(0, BI)[None, :], tl.arange(0, R)[:, None]
    b_m = tl.zeros((BI, R), tl.float64)
    for k in range(0, r, BI):
        o_k = k + o_row
        inside = (o_i < r) & (o_k < r)
        b_n = tl.load(p_dt + o_i * r + o_k, mask=inside, other=0.0) + tl.load(
            p_dt + o_k * r + o_i, mask=inside, other=0.0
        )
        b_b = tl.load(p_b + o_j * s_bi + o_k * s_bj, mask=(o_j < r) & (o_k < r), other=0.0)
        b_m = _dot(-2.0 * b_n, tl.trans(b_b), b_m)
    o_j = tl.arange(0, R)[None, :]
    tl.store(p_out + o_i * r + o_j, b_m, mask=(o_i < r) & (o_j < r))


@triton.jit
def gradient_kernel(
    p_dq, p_q, p_b, p_m, p_dv, K, r, s_dk, s_dr, s_qk, s_qr, s_bi, s_bj,
    BM: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """dV = dQ B^T + Q M, rounded once. Launch: (K / BM, r / BR). Bytes: dQ, Q per column tile, B, M per program."""
    o_m = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)[:, None]
    n = tl.program_id(1) * BR
    o_k, o_c = tl.arange(0, BR)[:, None], tl.arange(0, BR)[None, :]
    o_n = n + o_c
    m_m = o_m < K
    b_dv = tl.zeros((BM, BR), tl.float64)
    # B^T is lower triangular.
    for k in range(n, r, BR):
        b_dq = tl.load(p_dq + o_m * s_dk + (k + o_c) * s_dr, mask=m_m & (k + o_c < r), other=0.0)
        b_bt = tl.load(p_b + o_n * s_bi + (k + o_k) * s_bj, mask=(o_n < r) & (k + o_k < r), other=0.0)
        b_dv = _dot(b_dq, b_bt, b_dv)
    for k in range(0, r, BR):
        b_q = tl.load(p_q + o_m * s_qk + (k + o_c) * s_qr, mask=m_m & (k + o_c < r), other=0.0)
        b_m = tl.load(p_m + (k + o_c) * r + n + o_k, mask=(k + o_c < r) & (n + o_k < r), other=0.0)
        b_dv = _dot(b_q, tl.trans(b_m), b_dv)
    tl.store(p_dv + o_m * r + o_n, b_dv.to(p_dv.dtype.element_ty), mask=m_m & (o_n < r))
