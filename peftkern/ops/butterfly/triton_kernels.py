"""Triton kernels of the `butterfly` operations beside those of block_rotation, which rotate rows by whole groups.

    R [F, K/B, B, B]; a group of G = 2^(F-1) B columns; D [K/G, G, G], the product of a group's stages, float32
    V_s [K/G, G, G]: rows of the identity after the stages F-1, ..., s (V_0 = D, V_F = I)
    H_s: dD behind stage s, H_0 = dD, H_s = H_(s-1) R_(s-1)^T;  dR_s = the blocks of V_(s+1)^T H_s

Multiplied out, a group's stages are one product of 2 G flops per number on tensor cores, where stage by stage they are
2 F B on none and a shuffle each (b 8, f 4: 128 against 64). What is done once per group costs G^2 / M of that.
"""

import triton
import triton.language as tl

from peftkern.ops.block_rotation.triton_kernels import dot, row_tile
from peftkern.ops.householder.triton_kernels import _eights


@triton.jit
def _place(o_j, s, B: tl.constexpr):
    """Of column j of a group in stage s: its block, its place there, and where the block begins (README.md, eq. 3)."""
    half: tl.constexpr = B // 2
    apart = half << s
    o_r = o_j % (2 * apart)
    chunk, unit = o_j // (2 * apart), o_r % apart // half
    return (chunk << s) + unit, o_r // apart * half + o_r % half, chunk * 2 * apart + unit * half


@triton.jit
def _stage(p_in, p_r, s, o_j, B: tl.constexpr, TRANSPOSE: tl.constexpr, mask, b_out):
    """Rows of a group through stage s; p_in [BR, 1] points at the rows, p_r at the group's blocks of the stage."""
    half: tl.constexpr = B // 2
    o_b, o_c, o_first = _place(o_j, s, B)
    # A number of R for each of b_out: of one row, as many threads would load it as Triton's layout has of them.
    p_r = tl.broadcast_to(p_r + o_b * (B * B) + (o_c * B if TRANSPOSE else o_c), b_out.shape)
    for k in tl.range(0, B, loop_unroll_factor=8 if B % 8 == 0 else 2):
        o_k = o_first + k // half * (half << s) + k % half
        b_in = tl.load(p_in + o_k, mask=mask, other=0.0)
        b_out += b_in * tl.load(p_r + (k if TRANSPOSE else k * B), mask=mask, other=0.0)
    return b_out


@triton.jit
def stages_kernel(
    p_r, p_v, groups, F: tl.constexpr, B: tl.constexpr, G: tl.constexpr, P: tl.constexpr, BR: tl.constexpr
):
    """V_(F-1), ..., V_0 = D [F, K/G, G, G]: rows of the identity through the stages.

    Launch: (K / G, G / BR). Bytes: V written once, V and R read B times from L1. Flops: 2 F K G B.
    """
    i_g = tl.program_id(0).to(tl.int64)
    o_i, o_j = (tl.program_id(1) * BR + tl.arange(0, BR))[:, None], tl.arange(0, P)[None, :]
    mask = (o_i < G) & (o_j < G)
    # Beyond the group's columns the last one is computed again, and not stored.
    o_c = tl.minimum(o_j, G - 1)
    per_stage = groups * G * G
    p_v += i_g * (G * G) + o_i * G
    p_r += i_g * (G * B)
    o_b, o_to, _ = _place(o_c, F - 1, B)
    o_bi, o_from, _ = _place(tl.minimum(o_i, G - 1), F - 1, B)
    p_last = p_r + (F - 1) * groups * (G * B) + (o_b * B + o_from) * B + o_to
    b_v = tl.load(p_last, mask=mask & (o_b == o_bi), other=0.0)
    tl.store(p_v + (F - 1) * per_stage + o_j, b_v, mask=mask)
    for i in tl.static_range(2, F + 1):
        p_in, p_rs = p_v + (F - i + 1) * per_stage, p_r + (F - i) * groups * (G * B)
        tl.debug_barrier()
        b_v = tl.zeros((BR, P), p_v.dtype.element_ty)
        b_v = _stage(p_in, p_rs, F - i, o_c, B, False, mask, b_v)
        tl.store(p_v + (F - i) * per_stage + o_j, b_v, mask=mask)


@triton.jit
def stages_backward_kernel(
    p_r,
    p_part,
    p_h,
    groups,
    count,
    F: tl.constexpr,
    B: tl.constexpr,
    G: tl.constexpr,
    P: tl.constexpr,
    BR: tl.constexpr,
):
    """H_0 = dD from its `count` partial sums, in their order, and H_1, ..., H_(F-1) [F, K/G, G, G].

    Launch: (K / G, G / BR). Bytes: the partial sums once, H written once, H and R read B times from L1.
    """
    i_g = tl.program_id(0).to(tl.int64)
    o_i, o_j = (tl.program_id(1) * BR + tl.arange(0, BR))[:, None], tl.arange(0, P)[None, :]
    mask = (o_i < G) & (o_j < G)
    o_c = tl.minimum(o_j, G - 1)
    per_stage = groups * G * G
    p_part += i_g * (G * G) + o_i * G + o_j
    p_h += i_g * (G * G) + o_i * G
    p_r += i_g * (G * B)
    b_h = tl.load(p_part, mask=mask, other=0.0)
    for i in range(1, count):
        b_h += tl.load(p_part + i * per_stage, mask=mask, other=0.0)
    tl.store(p_h + o_j, b_h, mask=mask)
    for s in tl.static_range(1, F):
        tl.debug_barrier()
        b_h = tl.zeros((BR, P), p_h.dtype.element_ty)
        b_h = _stage(p_h + (s - 1) * per_stage, p_r + (s - 1) * groups * (G * B), s - 1, o_c, B, True, mask, b_h)
        tl.store(p_h + s * per_stage + o_j, b_h, mask=mask)


@triton.jit
def blocks_gradient_kernel(
    p_v, p_h, p_dr, groups,
    F: tl.constexpr, B: tl.constexpr, G: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """dR_s [F, K/B, B, B] = the blocks of V_(s+1)^T H_s, of BC columns of each.

    Launch: (K / G, F, (G / BC)^2). Bytes: V and H G / BC times, dR once.
    """
    i_g, s = tl.program_id(0).to(tl.int64), tl.program_id(1)
    chunks: tl.constexpr = (G + BC - 1) // BC
    o_i = tl.program_id(2) // chunks * BC + tl.arange(0, BC)[:, None]
    o_l = tl.program_id(2) // chunks * BC + tl.arange(0, BC)[None, :]
    o_j = tl.program_id(2) % chunks * BC + tl.arange(0, BC)
    o_r = tl.arange(0, BR)
    per_stage = groups * G * G
    p_v += (s + 1) * per_stage + i_g * (G * G) + o_l
    p_h += s * per_stage + i_g * (G * G)
    b_dr = tl.zeros((BC, BC), p_dr.dtype.element_ty)
    stored = tl.where(s + 1 < F, G, 0)  # rows of V_(s+1): V_F, the identity, is not
    for k in range(0, G, BR):
        b_h = row_tile(p_h, k + o_r, o_j, o_j < G, G, G, p_h.dtype.element_ty == tl.float32)
        o_k = (k + o_r)[:, None]
        b_v = tl.load(p_v + o_k * G, mask=(o_k < stored) & (o_l < G), other=0.0)
        b_v = tl.where((o_k == o_l) & (o_k >= stored), 1.0, b_v).to(b_h.dtype)
        b_dr += dot(b_v, b_h, tl.zeros((BC, BC), b_dr.dtype), True)
    o_bi, o_from, _ = _place(o_i, s, B)
    o_j = o_j[None, :]
    o_bj, o_to, _ = _place(o_j, s, B)
    p_dr += (s * groups + i_g) * (G * B) + (o_bi * B + o_from) * B + o_to
    tl.store(p_dr, b_dr, mask=(o_bi == o_bj) & (o_i < G) & (o_j < G))


@triton.jit
def scale_kernel(
    p_y, p_s, p_b, p_z, M, N, s_y, per_split,
    WITH_B: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """z = (y - b) s + b [M, N]. Launch: (N / BN, row splits). Bytes: y and z once."""
    N, s_y = _eights(N, ALIGNED), _eights(s_y, ALIGNED)
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    m_n = o_n < N
    b_s = tl.load(p_s + o_n, mask=m_n, other=0.0)[None, :]
    b_b = b_s * 0
    if WITH_B:
        b_b = tl.load(p_b + o_n, mask=m_n, other=0.0)[None, :].to(b_s.dtype)
    begin = tl.program_id(1) * per_split
    for m in range(begin, tl.minimum(begin + per_split, M), BM):
        o_m = (m + tl.arange(0, BM)).to(tl.int64)[:, None]
        mask = (o_m < M) & m_n[None, :]
        b_y = tl.load(p_y + o_m * s_y + o_n[None, :], mask=mask, other=0.0).to(b_s.dtype)
        b_z = (b_y - b_b) * b_s + b_b if WITH_B else b_y * b_s
        tl.store(p_z + o_m * N + o_n[None, :], b_z.to(p_z.dtype.element_ty), mask=mask)


@triton.jit
def scale_backward_kernel(
    p_dy, p_y, p_s, p_b, p_dp, p_ds, M, N, s_dy, s_y, per_split,
    WITH_B: tl.constexpr, WANT_DY: tl.constexpr, WANT_DS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """dy s, and partial sums [splits, N] of ds = sum over rows of dy (y - b).

    Launch: (N / BN, row splits). Bytes: dy, y and dy s once.
    """
    N, s_dy, s_y = _eights(N, ALIGNED), _eights(s_dy, ALIGNED), _eights(s_y, ALIGNED)
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    m_n = o_n < N
    b_s = tl.load(p_s + o_n, mask=m_n, other=0.0)[None, :]
    b_b = b_s * 0
    if WITH_B:
        b_b = tl.load(p_b + o_n, mask=m_n, other=0.0)[None, :].to(b_s.dtype)
    b_ds = tl.zeros((BM, BN), p_s.dtype.element_ty)
    begin = tl.program_id(1) * per_split
    for m in range(begin, tl.minimum(begin + per_split, M), BM):
        o_m = (m + tl.arange(0, BM)).to(tl.int64)[:, None]
        mask = (o_m < M) & m_n[None, :]
        b_dy = tl.load(p_dy + o_m * s_dy + o_n[None, :], mask=mask, other=0.0).to(b_s.dtype)
        if WANT_DS:
            b_y = tl.load(p_y + o_m * s_y + o_n[None, :], mask=mask, other=0.0).to(b_s.dtype)
            b_ds += b_dy * (b_y - b_b)
        if WANT_DY:
            tl.store(p_dp + o_m * N + o_n[None, :], (b_dy * b_s).to(p_dp.dtype.element_ty), mask=mask)
    if WANT_DS:
        tl.store(p_ds + tl.program_id(1) * N + o_n, tl.sum(b_ds, 0), mask=m_n)
