"""Triton kernels of the `householder` operations. Formulas: README.md; bytes and flops of each: costs.py.

    x, z, dz [M, K], W [N, K], y, dy [M, N]; V [K, r]; P = x V, Q, S, R [M, r]; T, C [r, r] float64

Float32-class products run on half-precision tensor cores: a float32 number is the sum of three bfloat16 *terms* (8 bits
each, float32's exponents, so nothing overflows), and the product of two sums keeps the pairs whose indices add up to
less than the number of terms, the smallest first. bfloat16 is one term of itself, float16 two. float64 is one "term".
Rank-r operands are split once into padded arrays [terms, rows, R], R a power of two, so that hot loops load them
with 16-byte accesses and need no mask along r.

Tensor cores cut sums towards zero; over thousands of steps that is a bias. So a float32-class product starts a new sum
every tile and adds it to the accumulator outside (rounded to nearest).
"""

import triton
import triton.language as tl


@triton.jit
def _eights(n, ALIGNED: tl.constexpr):
    """n, which the caller knows to be a multiple of 8, in a form that shows it to the compiler."""
    if ALIGNED:
        return n // 8 * 8
    return n


@triton.jit
def _wide(b_x, p_term):
    """Float32 of a half-precision block, for its rests; float64 stays."""
    if p_term.dtype.element_ty == tl.float64:
        return b_x.to(tl.float64)
    return b_x.to(tl.float32)


@triton.jit
def _dot(b_a, b_b, b_acc):
    return tl.dot(b_a, b_b, b_acc, input_precision="ieee", out_dtype=b_acc.dtype)


@triton.jit
def _times_terms(b_a, p_b, m_b, step, b_acc, A: tl.constexpr, B: tl.constexpr):
    """acc + a b: b in B terms, `step` apart in memory; a is split here into A terms."""
    ty = p_b.dtype.element_ty
    b_b0 = tl.load(p_b, mask=m_b, other=0.0)
    b_a0 = b_a.to(ty)
    b_sum = tl.zeros(b_acc.shape, b_acc.dtype)
    if A > 1:
        b_rest = _wide(b_a, p_b) - b_a0.to(tl.float32)
        b_a1 = b_rest.to(ty)
    if B > 1:
        b_b1 = tl.load(p_b + step, mask=m_b, other=0.0)
    if B > 2:
        b_b2 = tl.load(p_b + 2 * step, mask=m_b, other=0.0)
    if A > 2:
        b_sum = _dot((b_rest - b_a1.to(tl.float32)).to(ty), b_b0, b_sum)
    if (A > 1) and (B > 2):
        b_sum = _dot(b_a1, b_b1, b_sum)
    if B > 2:
        b_sum = _dot(b_a0, b_b2, b_sum)
    if A > 1:
        b_sum = _dot(b_a1, b_b0, b_sum)
    if B > 1:
        b_sum = _dot(b_a0, b_b1, b_sum)
    return b_acc + _dot(b_a0, b_b0, b_sum)


@triton.jit
def _terms_times_terms(p_a, m_a, step_a, p_b, m_b, step_b, b_acc, TERMS: tl.constexpr):
    """acc + a b, both in memory as terms; continues the sum of acc."""
    b_a0, b_b0 = tl.load(p_a, mask=m_a, other=0.0), tl.load(p_b, mask=m_b, other=0.0)
    if TERMS > 1:
        b_a1 = tl.load(p_a + step_a, mask=m_a, other=0.0)
        b_b1 = tl.load(p_b + step_b, mask=m_b, other=0.0)
    if TERMS > 2:
        b_acc = _dot(tl.load(p_a + step_a + step_a, mask=m_a, other=0.0), b_b0, b_acc)
        b_acc = _dot(b_a1, b_b1, b_acc)
        b_acc = _dot(b_a0, tl.load(p_b + step_b + step_b, mask=m_b, other=0.0), b_acc)
    if TERMS > 1:
        b_acc = _dot(b_a1, b_b0, b_acc)
        b_acc = _dot(b_a0, b_b1, b_acc)
    return _dot(b_a0, b_b0, b_acc)


@triton.jit
def _store_terms(p_out, b_x, mask, step, TERMS: tl.constexpr):
    ty = p_out.dtype.element_ty
    for _ in tl.static_range(TERMS):
        b_term = b_x.to(ty)
        tl.store(p_out, b_term, mask=mask)
        b_x = b_x - b_term.to(b_x.dtype)
        p_out += step


@triton.jit
def split_kernel(
    p_v, p_out, rows, r, s_row, s_col, step,
    R: tl.constexpr, BLOCK: tl.constexpr, TERMS: tl.constexpr, PAIR: tl.constexpr, UNPAIR: tl.constexpr,
    NEGATE: tl.constexpr,
):  # fmt: skip
    """V [rows, r] -> its terms [TERMS, rows, R], zero beyond r; PAIR: of the pair basis (README, eq. 9); UNPAIR: back.

    Launch: rows / BLOCK programs. Bytes: 4 rows r read, 2 TERMS rows R written: the least.
    """
    o_l = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[:, None].to(tl.int64)
    o_r = tl.arange(0, R)[None, :]
    mask = (o_l < rows) & (o_r < r)
    b_v = tl.load(p_v + o_l * s_row + o_r * s_col, mask=mask, other=0.0)
    if PAIR or UNPAIR:
        paired = (o_r ^ 1) < r
        b_w = tl.load(p_v + o_l * s_row + (o_r ^ 1) * s_col, mask=mask & paired, other=0.0)
        if PAIR:
            b_v = tl.where(paired, tl.where(o_r % 2 == 0, (b_v + b_w) * 0.5, b_w - b_v), b_v)
        else:
            b_v = tl.where(paired, tl.where(o_r % 2 == 0, b_v + b_w * 0.5, b_w - b_v * 0.5), b_v)
    if NEGATE:
        b_v = -b_v
    _store_terms(p_out + o_l * R + o_r, b_v, o_l < rows, step, TERMS)


@triton.jit
def project_kernel(
    p_x, p_v, p_out, M, K, r, s_x, step_v, per_split,
    A: tl.constexpr, B: tl.constexpr, R: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """P = x V, or its partial sums [splits, M, r] over ranges of K; V as terms [B, K, R].

    Launch: (M / BM, splits). Bytes: x once; V's terms once per row tile (M / BM times, from L2). One sum per tile of K.
    """
    i_s = tl.program_id(1)
    K, s_x = _eights(K, ALIGNED), _eights(s_x, ALIGNED)
    o_m = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    o_k, o_r = tl.arange(0, BK), tl.arange(0, R)
    m_m = o_m[:, None] < M
    first = i_s * per_split
    last = tl.minimum(first + per_split, K)
    p_x += o_m[:, None] * s_x + o_k[None, :]
    p_v += o_k[:, None] * R + o_r[None, :]
    b_p = tl.zeros((BM, R), p_out.dtype.element_ty)
    for k in range(first, last, BK):
        b_x = tl.load(p_x + k, mask=m_m & (k + o_k[None, :] < last), other=0.0)
        b_p = _times_terms(b_x, p_v + k * R, (k + o_k[:, None]) < last, step_v, b_p, A, B)
    p_out += (i_s.to(tl.int64) * M + o_m[:, None]) * r + o_r[None, :]
    tl.store(p_out, b_p, mask=m_m & (o_r[None, :] < r))


@triton.jit
def _core(p_c, o_i, o_j, r, s_i, s_j, PAIR: tl.constexpr):
    """A tile of C; PAIR: of C_p = E C E^T (README, eq. 9)."""
    mask = (o_i < r) & (o_j < r)
    b_c = tl.load(p_c + o_i * s_i + o_j * s_j, mask=mask, other=0.0)
    if PAIR:
        i2, j2 = o_i ^ 1, o_j ^ 1
        i_paired, j_paired = i2 < r, j2 < r
        b_right = tl.load(p_c + o_i * s_i + j2 * s_j, mask=mask & j_paired, other=0.0)
        b_below = tl.load(p_c + i2 * s_i + o_j * s_j, mask=mask & i_paired, other=0.0)
        b_across = tl.load(p_c + i2 * s_i + j2 * s_j, mask=mask & i_paired & j_paired, other=0.0)
        even_j, even_i = o_j % 2 == 0, o_i % 2 == 0
        b_c = tl.where(j_paired, tl.where(even_j, b_c + b_right, 0.5 * (b_right - b_c)), b_c)
        b_below = tl.where(j_paired, tl.where(even_j, b_below + b_across, 0.5 * (b_across - b_below)), b_below)
        b_c = tl.where(i_paired, tl.where(even_i, b_c + b_below, 0.5 * (b_below - b_c)), b_c)
    return b_c


@triton.jit
def core_kernel(
    p_p, p_c, p_sum, p_out, rows, r, s_row, s_col, s_i, s_j, step_p, step_out, splits,
    BM: tl.constexpr, BR: tl.constexpr, R: tl.constexpr, TERMS: tl.constexpr, PAIR: tl.constexpr,
    NEGATE: tl.constexpr, KEEP: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """S = P C in float64, for P [rows, r] given as `splits` partial sums; out: terms [TERMS, rows, R], or [rows, r].

    KEEP: writes P itself, too. PAIR: P is x V_p, C becomes C_p, and the P that is written is x V = (x V_p) E.
    Launch: (rows / BM, R / BR). Bytes: P once per column tile, C once per program; S: the least.
    """
    o_m = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)[:, None]
    o_n = tl.program_id(1) * BR + tl.arange(0, BR)
    o_j, o_k = o_n[None, :], tl.arange(0, BR)
    m_m = o_m < rows
    b_s = tl.zeros((BM, BR), tl.float64)
    for k in range(0, r, BR):
        o_i = k + o_k[None, :]
        b_p = tl.load(p_p + o_m * s_row + o_i * s_col, mask=m_m & (o_i < r), other=0.0)
        for i in range(1, splits):
            b_p += tl.load(p_p + i * step_p + o_m * s_row + o_i * s_col, mask=m_m & (o_i < r), other=0.0)
        # A right factor by way of its transpose: as it lies, Triton 3.6 reads it back with bank conflicts.
        b_c = tl.trans(_core(p_c, (k + o_k)[None, :], o_n[:, None], r, s_i, s_j, PAIR))
        b_s = _dot(b_p.to(tl.float64), b_c, b_s)
    if NEGATE:
        b_s = -b_s
    m_n = m_m & (o_j < r)
    if PADDED:
        b_s = b_s.to(p_p.dtype.element_ty)
        _store_terms(p_out + o_m * R + o_j, b_s, m_m & (o_j < R), step_out, TERMS)
    else:
        tl.store(p_out + o_m * r + o_j, b_s.to(p_out.dtype.element_ty), mask=m_n)
    if KEEP:
        b_p = tl.load(p_p + o_m * s_row + o_j * s_col, mask=m_n, other=0.0)
        for i in range(1, splits):
            b_p += tl.load(p_p + i * step_p + o_m * s_row + o_j * s_col, mask=m_n, other=0.0)
        if PAIR:
            o_j2 = o_j ^ 1
            paired = m_n & (o_j2 < r)
            b_q = tl.load(p_p + o_m * s_row + o_j2 * s_col, mask=paired, other=0.0)
            for i in range(1, splits):
                b_q += tl.load(p_p + i * step_p + o_m * s_row + o_j2 * s_col, mask=paired, other=0.0)
            b_p = tl.where(paired, tl.where(o_j % 2 == 0, b_p + 0.5 * b_q, b_q - 0.5 * b_p), b_p)
        tl.store(p_sum + o_m * r + o_j, b_p, mask=m_n)


@triton.jit
def _gradient_of_columns(b_x, p_s, m_s, step, b_dv, A: tl.constexpr, B: tl.constexpr):
    """dV + x^T S for one tile of rows, S as terms."""
    return _times_terms(tl.trans(b_x), p_s, m_s, step, b_dv, A, B)


@triton.jit
def update_kernel(
    p_y, p_x, p_s, p_r, p_v, p_z, p_dv, M, K, r, s_y, s_x, step_m, step_v, per_split,
    WITH_Y: tl.constexpr, WITH_S: tl.constexpr, WANT_Z: tl.constexpr, WANT_DV: tl.constexpr, A: tl.constexpr,
    B: tl.constexpr, Z_TERMS: tl.constexpr, R: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """z = y - R V^T and partial sums of dV = -(y^T S + x^T R) [splits, K, r] over ranges of rows. R, S, V as terms.

    Forward: y = x, R = x V C, no dV. Backward: y = dz. Without y: z = -R V^T; without S: dV = -x^T R.
    Launch: (K / BK, splits). Bytes: y, x, z once; R and S once per column tile, V once per split.
    """
    i_s = tl.program_id(1)
    K, s_y, s_x = _eights(K, ALIGNED), _eights(s_y, ALIGNED), _eights(s_x, ALIGNED)
    o_k = tl.program_id(0) * BK + tl.arange(0, BK)
    o_i, o_r = tl.arange(0, BM), tl.arange(0, R)
    m_k = o_k < K
    b_dv = tl.zeros((BK, R), p_dv.dtype.element_ty)
    first = i_s * per_split
    for m in range(first, tl.minimum(first + per_split, M), BM):
        o_m = (m + o_i).to(tl.int64)[:, None]
        m_m = o_m < M
        mask = m_m & m_k[None, :]
        if WITH_Y:
            b_y = tl.load(p_y + o_m * s_y + o_k[None, :], mask=mask, other=0.0)
        if WANT_Z:
            b_z = tl.zeros((BM, BK), p_dv.dtype.element_ty)
            p_vt = p_v + o_k[None, :] * R + o_r[:, None]
            b_z = _terms_times_terms(
                p_r + o_m * R + o_r[None, :], m_m, step_m, p_vt, m_k[None, :], step_v, b_z, Z_TERMS
            )
            if WITH_Y:
                b_z = b_y.to(b_z.dtype) - b_z
            else:
                b_z = -b_z
            tl.store(p_z + o_m * K + o_k[None, :], b_z.to(p_z.dtype.element_ty), mask=mask)
        if WANT_DV:
            b_x = tl.load(p_x + o_m * s_x + o_k[None, :], mask=mask, other=0.0)
            if WITH_S:
                b_dv = _gradient_of_columns(b_y, p_s + o_m * R + o_r[None, :], m_m, step_m, b_dv, A, B)
            b_dv = _gradient_of_columns(b_x, p_r + o_m * R + o_r[None, :], m_m, step_m, b_dv, A, B)
    if WANT_DV:
        o_v = (i_s.to(tl.int64) * K + o_k[:, None]) * r + o_r[None, :]
        tl.store(p_dv + o_v, -b_dv, mask=m_k[:, None] & (o_r[None, :] < r))


@triton.jit
def _tile(tiles_m, tiles_n, GROUP: tl.constexpr):
    """The tile of this program: GROUP row tiles share the columns they read while those are in L2."""
    i = tl.program_id(0)
    per_group = GROUP * tiles_n
    first = i // per_group * GROUP
    size = tl.minimum(tiles_m - first, GROUP)
    return first + i % per_group % size, i % per_group // size


@triton.jit
def linear_kernel(
    p_x, p_w, p_b, p_s, p_wv, p_y, M, N, K, s_x, s_w, s_b, step_s, step_wv,
    WITH_B: tl.constexpr, TERMS: tl.constexpr, R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, ALIGNED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y = x W^T + S (W V)^T + b with one accumulator, rounded once; -S and W V as terms (README, eq. 10).

    Launch: (M / BM)(N / BN) programs, grouped. Flops: 2MNK + 6MNR for two terms. Bytes: x N / BN times, W M / BM times
    (from L2), y once.
    """
    i_m, i_n = _tile(tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP)
    K, s_x, s_w = _eights(K, ALIGNED), _eights(s_x, ALIGNED), _eights(s_w, ALIGNED)
    o_m, o_n = (i_m * BM + tl.arange(0, BM)).to(tl.int64), (i_n * BN + tl.arange(0, BN)).to(tl.int64)
    o_k, o_r = tl.arange(0, BK), tl.arange(0, R)
    m_m, m_n = o_m[:, None] < M, o_n[None, :] < N
    p_xs, p_ws = p_x + o_m[:, None] * s_x + o_k[None, :], p_w + o_n[None, :] * s_w + o_k[:, None]
    b_y = tl.zeros((BM, BN), tl.float32)
    for k in tl.range(0, K, BK, num_stages=STAGES):
        b_x = tl.load(p_xs + k, mask=m_m & (k + o_k[None, :] < K), other=0.0)
        b_w = tl.load(p_ws + k, mask=(k + o_k[:, None] < K) & m_n, other=0.0)
        b_y = _dot(b_x, b_w, b_y)
    p_ss, p_wvs = p_s + o_m[:, None] * R + o_r[None, :], p_wv + o_n[None, :] * R + o_r[:, None]
    b_y = _terms_times_terms(p_ss, m_m, step_s, p_wvs, m_n, step_wv, b_y, TERMS)
    if WITH_B:
        b_y += tl.load(p_b + o_n * s_b, mask=o_n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(p_y + o_m[:, None] * N + o_n[None, :], b_y.to(p_y.dtype.element_ty), mask=m_m & m_n)


@triton.jit
def _backward_tail(
    b_dz, p_x, p_s, p_r, p_v, p_dx, b_dv, o_m, o_k, M, K, s_x, step_m, step_v,
    WANT_DX: tl.constexpr, WANT_DV: tl.constexpr, A: tl.constexpr, B: tl.constexpr, DX_TERMS: tl.constexpr,
    R: tl.constexpr,
):  # fmt: skip
    """dx and the sum of dV from some columns of dz."""
    o_r = tl.arange(0, R)
    m_m, m_k = o_m < M, o_k[None, :] < K
    p_rs = p_r + o_m * R + o_r[None, :]
    if WANT_DV:
        b_dv = _gradient_of_columns(b_dz, p_s + o_m * R + o_r[None, :], m_m, step_m, b_dv, 3, B)
        b_x = tl.load(p_x + o_m * s_x + o_k[None, :], mask=m_m & m_k, other=0.0)
        b_dv = _gradient_of_columns(b_x, p_rs, m_m, step_m, b_dv, A, B)
    if WANT_DX:
        p_vt = p_v + o_k[None, :] * R + o_r[:, None]
        b_dz = _terms_times_terms(p_rs, m_m, step_m, p_vt, m_k, step_v, b_dz, DX_TERMS)
        tl.store(p_dx + o_m * K + o_k[None, :], b_dz.to(p_dx.dtype.element_ty), mask=m_m & m_k)
    return b_dv


@triton.jit
def linear_backward_kernel(
    p_dy, p_w, p_x, p_s, p_r, p_v, p_dx, p_dv, M, N, K, r, s_dy, s_w, s_x, step_m, step_v,
    WANT_DX: tl.constexpr, WANT_DV: tl.constexpr, A: tl.constexpr, B: tl.constexpr, DX_TERMS: tl.constexpr,
    R: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr,
    ALIGNED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dz = dy W stays in registers: dx = dz + R V^T, and partial sums of dV = dz^T S + x^T R; R and S come negated.

    Launch: (M / BM)(K / BK) programs, grouped; each writes one partial sum [BK, r]. Flops: 2MNK, + 2 or 6 MKR for dx,
    + 12MKR + 6MKR for dV (A = 1). Bytes: dy K / BK times, W M / BM times (from L2), x and dx once.
    """
    i_m, i_k = _tile(tl.cdiv(M, BM), tl.cdiv(K, BK), GROUP)
    N, s_dy, s_w = _eights(N, ALIGNED), _eights(s_dy, ALIGNED), _eights(s_w, ALIGNED)
    K, s_x = _eights(K, ALIGNED), _eights(s_x, ALIGNED)
    o_i, o_k, o_n, o_r = tl.arange(0, BM), i_k * BK + tl.arange(0, BK), tl.arange(0, BN), tl.arange(0, R)
    p_ws = p_w + o_n[:, None].to(tl.int64) * s_w + o_k[None, :]
    o_m = (i_m * BM + o_i).to(tl.int64)[:, None]
    p_dys = p_dy + o_m * s_dy + o_n[None, :]
    b_dz = tl.zeros((BM, BK), tl.float32)
    for n in tl.range(0, N, BN, num_stages=STAGES):
        m_n = n + o_n < N
        b_dy = tl.load(p_dys + n, mask=(o_m < M) & m_n[None, :], other=0.0)
        b_w = tl.load(p_ws + tl.cast(n, tl.int64) * s_w, mask=m_n[:, None] & (o_k[None, :] < K), other=0.0)
        b_dz = _dot(b_dy, b_w, b_dz)
    b_dv = _backward_tail(
        b_dz, p_x, p_s, p_r, p_v, p_dx, tl.zeros((BK, R), tl.float32), o_m, o_k, M, K, s_x, step_m, step_v,
        WANT_DX, WANT_DV, A, B, DX_TERMS, R,
    )  # fmt: skip
    if WANT_DV:
        p_dv += i_m.to(tl.int64) * K * r + o_r[None, :]
        tl.store(p_dv + o_k[:, None] * r, b_dv, mask=(o_k[:, None] < K) & (o_r[None, :] < r))


@triton.jit
def reduce_kernel(p_part, p_out, n, splits, NEGATE: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of `splits` arrays of n numbers, in their order. Launch: n / BLOCK programs. Bytes: the least."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_sum = tl.load(p_part + o, mask=o < n, other=0.0)
    for i in range(1, splits):
        b_sum += tl.load(p_part + tl.cast(i, tl.int64) * n + o, mask=o < n, other=0.0)
    tl.store(p_out + o, (-b_sum if NEGATE else b_sum).to(p_out.dtype.element_ty), mask=o < n)


@triton.jit
def gram_kernel(
    p_a, p_b, p_out, rows, r, s_ai, s_aj, s_bi, s_bj, per_split,
    BL: tl.constexpr, BR: tl.constexpr, UPPER: tl.constexpr,
):  # fmt: skip
    """Partial sums [splits, r, r] of a^T b in float64 over ranges of rows; UPPER: only tiles that meet the triangle.

    Launch: (splits, r / BR, r / BR). Bytes: a and b once per tile of BR columns.
    """
    i_s, i_i, i_j = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if UPPER and i_i > i_j:
        return
    _partial_gram(p_a, p_b, p_out, rows, r, s_ai, s_aj, s_bi, s_bj, per_split, i_s, i_i, i_j, BL, BR)


@triton.jit
def _partial_gram(
    p_a, p_b, p_out, rows, r, s_ai, s_aj, s_bi, s_bj, per_split, i_s, i_i, i_j, BL: tl.constexpr, BR: tl.constexpr
):
    o_i, o_j = (i_i * BR + tl.arange(0, BR))[None, :], (i_j * BR + tl.arange(0, BR))[None, :]
    b_g = tl.zeros((BR, BR), tl.float64)
    first = i_s * per_split
    last = tl.minimum(first + per_split, rows)
    for i in range(first, last, BL):
        o_l = (i + tl.arange(0, BL)).to(tl.int64)[:, None]
        b_a = tl.load(p_a + o_l * s_ai + o_i * s_aj, mask=(o_l < last) & (o_i < r), other=0.0)
        b_b = tl.load(p_b + o_l * s_bi + o_j * s_bj, mask=(o_l < last) & (o_j < r), other=0.0)
        b_g = _dot(tl.trans(b_a.to(tl.float64)), b_b.to(tl.float64), b_g)
    o_row = (i_i * BR + tl.arange(0, BR))[:, None]
    tl.store(p_out + (i_s.to(tl.int64) * r + o_row) * r + o_j, b_g, mask=(o_row < r) & (o_j < r))


@triton.jit
def _gram_tile(p_part, o_i, o_j, r, splits):
    """A tile of the Gram matrix from the partial sums of its upper triangle, in their order."""
    mask = (o_i < r) & (o_j < r)
    o = tl.minimum(o_i, o_j) * r + tl.maximum(o_i, o_j)
    b_g = tl.load(p_part + o, mask=mask, other=0.0)
    for i in range(1, splits):
        b_g += tl.load(p_part + i * r * r + o, mask=mask, other=0.0)
    return b_g


@triton.jit
def _merge(p_a, p_t, R: tl.constexpr, B: tl.constexpr):
    """The upper right blocks of the inverse of twice the size: T12 = -T11 A12 T22."""
    o = tl.arange(0, B)
    o_block = o[:, None] * R + o[None, :]
    for i in range(0, R, 2 * B):
        corner = i * R + i
        b_t11 = tl.load(p_t + corner + o_block)
        b_a12 = tl.load(p_a + corner + B + o_block)
        b_t22 = tl.load(p_t + corner + B * R + B + o_block)
        b_m = _dot(b_t11, b_a12, tl.zeros((B, B), tl.float64))
        tl.store(p_t + corner + B + o_block, -_dot(b_m, b_t22, tl.zeros((B, B), tl.float64)))
    tl.debug_barrier()


@triton.jit
def _of_layer(values, layer):
    """values[layer] of a tuple, of a layer that only the program knows."""
    value = values[0]
    for k in tl.static_range(1, len(values)):
        value = tl.where(layer == k, values[k], value)
    return value


@triton.jit(do_not_specialize=["most"])
def wy_factor_kernel(
    p_vs, p_ts, rows, s_i, s_j, per_split, p_part, p_work, p_count, most, r, tiles,
    BL: tl.constexpr, BR: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """T = A^-1, A = striu(G) + diag(G) / 2 of G = V^T V: partial sums of G, which the last program adds and inverts.

    Tuples have an entry for each layer. Launch: (layers most, r / BR, r / BR), `most` the greatest number of splits;
    `tiles` programs of a split meet the triangle. count [layers] int32 is zero before and after. Bytes of a layer: V
    once per tile of BR columns, 8 splits r^2 written and read, 8 r^2 written, besides work.
    """
    layer, i_s = tl.program_id(0) // most, tl.program_id(0) % most
    i_i, i_j = tl.program_id(1), tl.program_id(2)
    n, length = _of_layer(rows, layer), _of_layer(per_split, layer)
    splits = tl.cdiv(n, length)
    if i_i > i_j or i_s >= splits:
        return
    p_v, s_i, s_j = _of_layer(p_vs, layer), _of_layer(s_i, layer), _of_layer(s_j, layer)
    p_part += (layer * most).to(tl.int64) * (r * r)
    _partial_gram(p_v, p_v, p_part, n, r, s_i, s_j, s_i, s_j, length, i_s, i_i, i_j, BL, BR)
    tl.debug_barrier()
    before = tl.atomic_add(p_count + layer, 1, sem="acq_rel")
    if before == splits * tiles - 1:
        tl.store(p_count + layer, 0)
        _invert(p_part, p_work + layer * (2 * R * R), _of_layer(p_ts, layer), r, splits, R)


@triton.jit
def _invert(p_part, p_work, p_t, r, splits, R: tl.constexpr):
    """From the partial sums of G; r padded to R with the identity.

    Blocks of 16 on the diagonal by substitution, all at once; then blocks of 16, 32, 64 merge in pairs. Every entry
    of every inverse is bounded (README, error bounds), so nothing grows on the way. work [2, R, R] stays in L2.
    """
    p_inv = p_work + R * R
    o_16, o_cols = tl.arange(0, 16), tl.arange(0, R)[None, :]
    for i in range(0, R, 16):
        o_rows = i + o_16[:, None]
        b_g = _gram_tile(p_part, o_rows, tl.maximum(o_rows, o_cols), r, splits)
        # A zero column has 1 on the diagonal of A, marked by its sign: no other diagonal entry is negative.
        b_diagonal = tl.where(o_rows < r, tl.where(b_g == 0, -1.0, b_g * 0.5), 1.0)
        b_a = tl.where(o_rows == o_cols, b_diagonal, tl.where(o_rows < o_cols, b_g, 0.0))
        tl.store(p_work + o_rows * R + o_cols, b_a)
        tl.store(p_inv + o_rows * R + o_cols, tl.zeros((16, R), tl.float64))
    tl.debug_barrier()
    o_b = tl.arange(0, R // 16)[:, None, None] * 16
    o_k, o_j = o_16[None, :, None], o_16[None, None, :]
    b_at = tl.load(p_work + (o_b + o_j) * R + o_b + o_k)
    b_t = tl.zeros((R // 16, 16, 16), tl.float64)
    for n in range(16):
        i = 15 - n
        b_row = tl.sum(tl.where(o_j == i, b_at, 0.0), 2)[:, :, None]
        b_pivot = tl.sum(tl.where(o_k == i, b_row, 0.0), 1)[:, None, :]
        b_rest = tl.sum(tl.where(o_k > i, b_row * b_t, 0.0), 1)[:, None, :]
        b_t = tl.where(o_k == i, (tl.where(o_j == i, 1.0, 0.0) - b_rest) / b_pivot, b_t)
    tl.store(p_inv + (o_b + o_k) * R + o_b + o_j, b_t)
    tl.debug_barrier()
    if R > 16:
        _merge(p_work, p_inv, R, 16)
    if R > 32:
        _merge(p_work, p_inv, R, 32)
    if R > 64:
        _merge(p_work, p_inv, R, 64)
    for i in range(0, R, 16):
        o_rows = i + o_16[:, None]
        b_out = tl.load(p_inv + o_rows * R + o_cols)
        b_out = tl.where((o_rows == o_cols) & (b_out < 0), 0.0, b_out)
        tl.store(p_t + o_rows * r + o_cols, b_out, mask=(o_rows < r) & (o_cols < r))


@triton.jit
def gram_gradient_kernel(p_dt, p_t, p_dg, r, R: tl.constexpr, BI: tl.constexpr):
    """dA = -T^T dT T^T on the upper triangle; dG = dA + striu(dA)^T [r, r] float64 (README, eq. 6).

    Launch: R / BI programs, BI rows each. Bytes: dT and T once or twice per program, from L2.
    """
    o_i = (tl.program_id(0) * BI + tl.arange(0, BI))[None, :]
    o_b, o_cols = tl.arange(0, BI), tl.arange(0, R)[:, None]
    b_e = tl.zeros((BI, R), tl.float64)
    for k in range(0, r, BI):
        o_k, o_kt = (k + o_b)[:, None], (k + o_b)[None, :]
        b_t = tl.load(p_t + o_k * r + o_i, mask=(o_k < r) & (o_i < r), other=0.0)
        # Right factors by way of their transposes, as in core_kernel.
        b_dt = tl.load(p_dt + o_kt * r + o_cols, mask=(o_kt < r) & (o_cols < r), other=0.0)
        b_e = _dot(tl.trans(b_t), tl.trans(b_dt), b_e)
    o_row = (tl.program_id(0) * BI + o_b)[:, None]
    for j in range(0, r, BI):
        o_jt, o_k = (j + o_b)[:, None], tl.arange(0, R)[None, :]
        b_t = tl.load(p_t + o_jt * r + o_k, mask=(o_k < r) & (o_jt < r), other=0.0)
        b_da = -_dot(b_e, tl.trans(b_t), tl.zeros((BI, BI), tl.float64))
        o_j = (j + o_b)[None, :]
        tl.store(p_dg + o_row * r + o_j, b_da, mask=(o_row <= o_j) & (o_j < r))
        tl.store(p_dg + o_jt * r + o_i, tl.trans(b_da), mask=(o_i < o_jt) & (o_jt < r))


@triton.jit
def _cosine_rows(p_part, b_scale, i, r, splits, R: tl.constexpr):
    """Rows i .. i + 15 of the off-diagonal cosines, and the scale 1 / ||v|| of those rows."""
    o_rows, o_cols = i + tl.arange(0, 16)[:, None], tl.arange(0, R)[None, :]
    b_g = _gram_tile(p_part, o_rows, o_cols, r, splits)
    b_own = tl.sum(tl.where(o_rows == o_cols, b_scale[None, :], 0.0), 1)[:, None]
    return tl.where(o_rows == o_cols, 0.0, b_g * b_own * b_scale[None, :]), b_own


@triton.jit
def penalty_kernel(
    p_part, p_grad, p_out, r, splits,
    SQUARED: tl.constexpr, BACKWARD: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """f = sum of the squared off-diagonal cosines, or its root (README, eq. 12), from the partial sums of V^T V;
    BACKWARD: the matrix [r, r] that V is multiplied with (eq. 13). Launch: one program.
    """
    o_cols = tl.arange(0, R)
    b_norm = tl.load(p_part + o_cols * (r + 1), mask=o_cols < r, other=0.0)
    for i in range(1, splits):
        b_norm += tl.load(p_part + i * r * r + o_cols * (r + 1), mask=o_cols < r, other=0.0)
    # "not above 0" and not "at most 0": a NaN must not pass for a zero column.
    b_scale = tl.where(b_norm == 0, 0.0, 1.0 / tl.sqrt(tl.where(b_norm == 0, 1.0, b_norm)))
    total = tl.sum(b_scale, 0) * 0.0
    if (not BACKWARD) or (not SQUARED):
        for i in range(0, R, 16):
            b_c, _ = _cosine_rows(p_part, b_scale, i, r, splits, R)
            total += tl.sum(tl.sum(b_c * b_c, 1), 0)
    if not BACKWARD:
        if not SQUARED:
            total = tl.sqrt(total)
        tl.store(p_out, total.to(p_out.dtype.element_ty))
    else:
        factor = 4.0 * tl.load(p_grad).to(tl.float64)
        if not SQUARED:
            factor = tl.where(total == 0, 0.0, factor / (2.0 * tl.sqrt(tl.where(total == 0, 1.0, total))))
        for i in range(0, R, 16):
            b_c, b_own = _cosine_rows(p_part, b_scale, i, r, splits, R)
            o_rows = i + tl.arange(0, 16)[:, None]
            b_squares = tl.sum(b_c * b_c, 1)[:, None]
            b_m = tl.where(o_rows == o_cols[None, :], -b_squares, b_c) * b_own * b_scale[None, :]
            mask = (o_rows < r) & (o_cols[None, :] < r)
            tl.store(p_out + o_rows * r + o_cols[None, :], b_m * factor, mask=mask)
