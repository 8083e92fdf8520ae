"""Triton kernels of the `block_rotation` operations, and of `butterfly`'s rotations. Bytes and flops: costs_triton.py.

    x, z, dz, dx [M, K]; R [K/B, B, B], or one for all; z_i = x_i R_i

A tile of rows meets a *panel*: W = (P // B) B columns, whole blocks, padded to P. The blocks of one panel form one
block-diagonal matrix, so that every product has the sizes that tensor cores take. R is read once per program and stays
in registers while rows stream past. Half-precision rows are one exact term, R two terms of the same dtype; a float32
product is six of bfloat16 terms. Tensor cores cut sums towards zero, so the gradient in R starts a
new sum every tile and adds it to the accumulator outside (rounded to nearest).
"""

import triton
import triton.language as tl

from peftkern.ops.householder.triton_kernels import _eights, _tile


@triton.jit
def _terms(b_x):
    """A float32 number as the sum of three of bfloat16."""
    b_0 = b_x.to(tl.bfloat16)
    b_x = b_x - b_0.to(tl.float32)
    b_1 = b_x.to(tl.bfloat16)
    return b_0, b_1, (b_x - b_1.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def dot(b_a, b_b, b_acc, TRANSPOSE: tl.constexpr = False):
    """acc + a b (a^T b); of float32 the six products of terms that float32 can see, the smallest first."""
    if b_a.dtype == tl.float32:
        b_a0, b_a1, b_a2 = _terms(b_a)
        b_b0, b_b1, b_b2 = _terms(b_b)
        if TRANSPOSE:
            b_a0, b_a1, b_a2 = tl.trans(b_a0), tl.trans(b_a1), tl.trans(b_a2)
        b_sum = tl.dot(b_a2, b_b0, tl.zeros(b_acc.shape, tl.float32))
        b_sum = tl.dot(b_a1, b_b1, b_sum)
        b_sum = tl.dot(b_a0, b_b2, b_sum)
        b_sum = tl.dot(b_a1, b_b0, b_sum)
        b_sum = tl.dot(b_a0, b_b1, b_sum)
        return b_acc + tl.dot(b_a0, b_b0, b_sum)
    if TRANSPOSE:
        b_a = tl.trans(b_a)
    return tl.dot(b_a, b_b, b_acc, input_precision="ieee", out_dtype=b_acc.dtype)


@triton.jit
def _places(first, K, B: tl.constexpr, W: tl.constexpr, P: tl.constexpr):
    """Of each place of a panel's block-diagonal matrix: its block, its row and column there, and whether it has one."""
    o_i, o_j = tl.arange(0, P)[:, None], tl.arange(0, P)[None, :]
    inside = (o_i // B == o_j // B) & (o_i < W) & (o_j < W) & (first + o_i < K)
    return o_i // B, o_i % B, o_j % B, inside


@triton.jit
def _rotation(
    p_r, first, K, B: tl.constexpr, W: tl.constexpr, P: tl.constexpr, SHARED: tl.constexpr, TRANSPOSE: tl.constexpr
):  # fmt: skip
    """The block-diagonal matrix [P, P] of the R (or R^T) of W columns from `first` on."""
    o_b, o_i, o_j, inside = _places(first, K, B, W, P)
    o_b = o_b * 0 if SHARED else o_b + first // B
    o = o_j * B + o_i if TRANSPOSE else o_i * B + o_j
    return tl.load(p_r + o_b.to(tl.int64) * (B * B) + o, mask=inside, other=0.0)


@triton.jit
def row_tile(p_x, o_m, o_k, m_k, M, s_x, TURNED: tl.constexpr):
    """Rows o_m and columns o_k of x; TURNED: loaded as the transpose, by the same accesses.

    A right factor whose float32 numbers are split into terms meets two lanes in a bank on its way to the tensor cores:
    Triton lays it out in shared memory as if it were of half precision. A transpose it passes on without such a layout.
    """
    if TURNED:
        b_x = tl.load(p_x + o_m[None, :] * s_x + o_k[:, None], mask=(o_m[None, :] < M) & m_k[:, None], other=0.0)
        return tl.trans(b_x)
    return tl.load(p_x + o_m[:, None] * s_x + o_k[None, :], mask=(o_m[:, None] < M) & m_k[None, :], other=0.0)


@triton.jit
def _product(b_x, b_r):
    """x R in R's dtype; under half-precision x, R is two terms."""
    b_z = tl.zeros(b_x.shape, b_r.dtype)
    if b_x.dtype == b_r.dtype:
        return dot(b_x, b_r, b_z)
    b_high = b_r.to(b_x.dtype)
    return dot(b_x, b_high, dot(b_x, (b_r - b_high.to(b_r.dtype)).to(b_x.dtype), b_z))


@triton.jit
def _rotated(b_x, b_r, B: tl.constexpr, W: tl.constexpr, P: tl.constexpr):
    """x R; a number that is not finite spoils its own block, not those packed beside it."""
    if W == B:
        return _product(b_x, b_r)
    b_bad = (b_x != b_x) | (tl.abs(b_x) == float("inf"))
    o_i, o_j = tl.arange(0, P)[:, None], tl.arange(0, P)[None, :]
    b_block = tl.where(o_i // B == o_j // B, 1.0, 0.0).to(tl.bfloat16)
    b_bad_block = tl.dot(tl.where(b_bad, 1.0, 0.0).to(tl.bfloat16), b_block)
    return tl.where(b_bad_block > 0, float("nan"), _product(tl.where(b_bad, 0.0, b_x).to(b_x.dtype), b_r))


@triton.jit
def rotate_kernel(
    p_x, p_r, p_z, p_s, M, K, s_x, s_z, step_z, per_split,
    B: tl.constexpr, W: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, SHARED: tl.constexpr, TRANSPOSE: tl.constexpr,
    TERMS: tl.constexpr, SCALE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """z = x R (x R^T), in TERMS terms of z's dtype, `step_z` apart; SCALE: times a number s [M] of each row.

    Launch: (K / W, row splits). Bytes: x and z once, R once per split. Flops: 2 MKP, twice that for half precision.
    """
    K, s_x, s_z = _eights(K, ALIGNED), _eights(s_x, ALIGNED), _eights(s_z, ALIGNED)
    first = tl.program_id(0) * W
    b_r = _rotation(p_r, first, K, B, W, P, SHARED, TRANSPOSE)
    o_c, o_i = tl.arange(0, P), tl.arange(0, BM)
    m_k = (o_c < W) & (first + o_c < K)
    begin = tl.program_id(1) * per_split
    for m in range(begin, tl.minimum(begin + per_split, M), BM):
        o_m = (m + o_i).to(tl.int64)[:, None]
        mask = (o_m < M) & m_k[None, :]
        b_x = tl.load(p_x + o_m * s_x + first + o_c[None, :], mask=mask, other=0.0)
        b_z = _rotated(b_x, b_r, B, W, P)
        if SCALE:
            b_z *= tl.load(p_s + m + o_i, mask=m + o_i < M, other=0.0)[:, None]
        p_zs = p_z + o_m * s_z + first + o_c[None, :]
        b_high = b_z.to(p_z.dtype.element_ty)
        tl.store(p_zs, b_high, mask=mask)
        if TERMS > 1:
            tl.store(p_zs + step_z, (b_z - b_high.to(b_z.dtype)).to(b_high.dtype), mask=mask)


@triton.jit
def rotate_backward_kernel(
    p_dz, p_x, p_r, p_dx, p_dr, M, K, s_dz, s_x, per_split, panels,
    B: tl.constexpr, W: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, SHARED: tl.constexpr, TRANSPOSE: tl.constexpr,
    WANT_DX: tl.constexpr, WANT_DR: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """dx = dz R^T and partial sums of dR = x^T dz over a range of rows; TRANSPOSE: dx = dz R, dR = dz^T x.

    Partial sums [splits, K/B, B, B]; SHARED: a program goes on through `panels` panels with one sum for each place
    of a block in a panel, [splits, programs, W/B, B, B].
    Launch: (K / W / panels, row splits). Bytes: dz, x, dx once, R once per program. Flops: 2 MKP for dx (twice for
    half precision), 2 MKP for dR.
    """
    K, s_dz, s_x = _eights(K, ALIGNED), _eights(s_dz, ALIGNED), _eights(s_x, ALIGNED)
    i_p, i_s = tl.program_id(0), tl.program_id(1)
    o_c, o_i = tl.arange(0, P), tl.arange(0, BM)
    TURNED: tl.constexpr = WANT_DR and p_x.dtype.element_ty == tl.float32
    start = i_p * panels * W
    if WANT_DX:
        b_r = _rotation(p_r, 0 if SHARED else start, W if SHARED else K, B, W, P, SHARED, not TRANSPOSE)
    b_dr = tl.zeros((P, P), p_dr.dtype.element_ty)
    begin = i_s * per_split
    tiles = tl.cdiv(tl.minimum(per_split, M - begin), BM)
    for i in range(0, tiles * panels):
        first, m = start, begin + i * BM
        if SHARED:
            first, m = start + i // tiles * W, begin + i % tiles * BM
        o_k, o_m = first + o_c, (m + o_i).to(tl.int64)
        m_k = (o_c < W) & (o_k < K)
        b_dz = row_tile(p_dz, o_m, o_k, m_k, M, s_dz, TURNED and not TRANSPOSE)
        if WANT_DR:
            b_x = row_tile(p_x, o_m, o_k, m_k, M, s_x, TURNED and TRANSPOSE)
            if TRANSPOSE:
                b_dr += dot(b_dz, b_x, tl.zeros((P, P), b_dr.dtype), True)
            else:
                b_dr += dot(b_x, b_dz, tl.zeros((P, P), b_dr.dtype), True)
        if WANT_DX:
            b_dx = _rotated(b_dz, b_r, B, W, P).to(p_dx.dtype.element_ty)
            tl.store(p_dx + o_m[:, None] * K + o_k[None, :], b_dx, mask=(o_m[:, None] < M) & m_k[None, :])
    if WANT_DR:
        o_b, o_i, o_j, inside = _places(0 if SHARED else start, W if SHARED else K, B, W, P)
        if SHARED:
            o_b += (i_s * tl.num_programs(0) + i_p) * (W // B)
        else:
            o_b += i_s * (K // B) + start // B
        tl.store(p_dr + (o_b.to(tl.int64) * B + o_i) * B + o_j, b_dr, mask=inside)


@triton.jit
def wide_rotate_kernel(
    p_x, p_r, p_z, p_s, M, K, s_x, s_z, step_z,
    B: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, SHARED: tl.constexpr, TRANSPOSE: tl.constexpr,
    TERMS: tl.constexpr, SCALE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """rotate_kernel for blocks that no panel holds: BC columns of z per program, from all columns of their block.

    Launch: (M / BM, K / B * B / BC). Bytes: x B / BC times, R M / BM times (from L2), z once. Flops: those of a panel.
    """
    K, s_x, s_z = _eights(K, ALIGNED), _eights(s_x, ALIGNED), _eights(s_z, ALIGNED)
    chunks: tl.constexpr = (B + BC - 1) // BC
    i_b = tl.program_id(1) // chunks
    o_m = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)[:, None]
    o_j = tl.program_id(1) % chunks * BC + tl.arange(0, BC)
    p_r += 0 if SHARED else i_b.to(tl.int64) * (B * B)
    p_x += o_m * s_x + i_b * B
    b_z = tl.zeros((BM, BC), p_r.dtype.element_ty)
    for k in range(0, B, BC):
        o_k = k + tl.arange(0, BC)
        b_x = tl.load(p_x + o_k[None, :], mask=(o_m < M) & (o_k[None, :] < B), other=0.0)
        if TRANSPOSE:
            b_r = tl.trans(row_tile(p_r, o_j, o_k, o_k < B, B, B, False))
        else:
            b_r = row_tile(p_r, o_k, o_j, o_j < B, B, B, p_r.dtype.element_ty == tl.float32)
        b_z += _product(b_x, b_r)
    mask = (o_m < M) & (o_j[None, :] < B)
    p_zs = p_z + o_m * s_z + i_b * B + o_j[None, :]
    if SCALE:
        o_i = tl.program_id(0) * BM + tl.arange(0, BM)
        b_z *= tl.load(p_s + o_i, mask=o_i < M, other=0.0)[:, None]
    b_high = b_z.to(p_z.dtype.element_ty)
    tl.store(p_zs, b_high, mask=mask)
    if TERMS > 1:
        tl.store(p_zs + step_z, (b_z - b_high.to(b_z.dtype)).to(b_high.dtype), mask=mask)


@triton.jit
def wide_sums_kernel(
    p_a, p_b, p_dr, M, K, s_a, s_b, per_split,
    B: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Partial sums [splits, K/B, B, B] of a^T b, block by block, [BC, BC] per program.

    Launch: (K / B * (B / BC)^2, splits). Bytes: a and b B / BC times. Flops: 2 MKB.
    """
    K, s_a, s_b = _eights(K, ALIGNED), _eights(s_a, ALIGNED), _eights(s_b, ALIGNED)
    chunks: tl.constexpr = (B + BC - 1) // BC
    TURNED: tl.constexpr = p_b.dtype.element_ty == tl.float32
    i_b, i_c = tl.program_id(0) // (chunks * chunks), tl.program_id(0) % (chunks * chunks)
    o_i, o_j = i_c // chunks * BC + tl.arange(0, BC), i_c % chunks * BC + tl.arange(0, BC)
    b_dr = tl.zeros((BC, BC), p_dr.dtype.element_ty)
    begin = tl.program_id(1) * per_split
    for m in range(begin, tl.minimum(begin + per_split, M), BM):
        o_m = (m + tl.arange(0, BM)).to(tl.int64)
        b_a = row_tile(p_a, o_m, i_b * B + o_i, o_i < B, M, s_a, False)
        b_b = row_tile(p_b, o_m, i_b * B + o_j, o_j < B, M, s_b, TURNED)
        b_dr += dot(b_a, b_b, tl.zeros((BC, BC), b_dr.dtype), True)
    p_dr += (tl.program_id(1) * (K // B) + i_b).to(tl.int64) * (B * B) + o_i[:, None] * B + o_j[None, :]
    tl.store(p_dr, b_dr, mask=(o_i[:, None] < B) & (o_j[None, :] < B))


@triton.jit
def linear_kernel(
    p_z, p_w, p_s, p_b, p_y, p_p, M, N, K, s_w, step_z,
    WITH_S: tl.constexpr, WITH_B: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, ALIGNED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """p = (z_h + z_l) W^T in one accumulator, y = s p + b, each rounded once; p only where there is a scale.

    Launch: (M / BM)(N / BN) programs, grouped. Flops: 4 MNK. Bytes: z_h, z_l N / BN times, W M / BM times (from L2),
    y and p once.
    """
    i_m, i_n = _tile(tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP)
    K, s_w = _eights(K, ALIGNED), _eights(s_w, ALIGNED)
    o_m, o_n = (i_m * BM + tl.arange(0, BM)).to(tl.int64), (i_n * BN + tl.arange(0, BN)).to(tl.int64)
    o_k = tl.arange(0, BK)
    m_m, m_n = o_m[:, None] < M, o_n[None, :] < N
    p_zs, p_ws = p_z + o_m[:, None] * K + o_k[None, :], p_w + o_n[None, :] * s_w + o_k[:, None]
    b_y = tl.zeros((BM, BN), tl.float32)
    for k in tl.range(0, K, BK, num_stages=STAGES):
        m_z = m_m & (k + o_k[None, :] < K)
        b_w = tl.load(p_ws + k, mask=(k + o_k[:, None] < K) & m_n, other=0.0)
        b_y = dot(tl.load(p_zs + step_z + k, mask=m_z, other=0.0), b_w, b_y)
        b_y = dot(tl.load(p_zs + k, mask=m_z, other=0.0), b_w, b_y)
    o_y, mask = o_m[:, None] * N + o_n[None, :], m_m & m_n
    if WITH_S:
        tl.store(p_p + o_y, b_y.to(p_p.dtype.element_ty), mask=mask)
        b_y *= tl.load(p_s + o_n, mask=o_n < N, other=0.0)[None, :]
    if WITH_B:
        b_y += tl.load(p_b + o_n, mask=o_n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(p_y + o_y, b_y.to(p_y.dtype.element_ty), mask=mask)
