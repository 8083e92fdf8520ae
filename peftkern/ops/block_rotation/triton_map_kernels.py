"""Triton kernels that make rotations of parameters: packed skew matrices q [S, B (B - 1) / 2], or dense ones.

    R, dR [S, B, B]; Q skew, from q, or (A - A^T) / 2 of a dense A [S, B, B] (butterfly, where it is called B)

Blocks are taken a panel at a time, as one block-diagonal matrix [P, P] (triton_kernels.py); every power of it is
block-diagonal again. The exact map inverts in float64, blocks side by side.
"""

import triton
import triton.language as tl

from peftkern.ops.block_rotation.triton_kernels import _places, dot


@triton.jit
def _packed(o_i, o_j, B: tl.constexpr):
    """Where q has the entry above the diagonal of row i and column j."""
    o_low, o_high = tl.minimum(o_i, o_j), tl.maximum(o_i, o_j)
    return o_low * (2 * B - 1 - o_low) // 2 + o_high - o_low - 1


@triton.jit
def _skew(p_q, o_b, o_i, o_j, inside, B: tl.constexpr, DENSE: tl.constexpr):
    o_b = o_b.to(tl.int64)
    if DENSE:
        b_q = tl.load(p_q + (o_b * B + o_i) * B + o_j, mask=inside, other=0.0)
        return (b_q - tl.load(p_q + (o_b * B + o_j) * B + o_i, mask=inside, other=0.0)) * 0.5
    b_q = tl.load(p_q + o_b * (B * (B - 1) // 2) + _packed(o_i, o_j, B), mask=inside & (o_i != o_j), other=0.0)
    return tl.where(o_i < o_j, b_q, -b_q)


@triton.jit
def _store_skew(p_dq, b_dq, o_b, o_i, o_j, inside, B: tl.constexpr, DENSE: tl.constexpr):
    """The gradient in q or A of one in Q."""
    b_dq = b_dq - tl.trans(b_dq)
    o_b = o_b.to(tl.int64)
    if DENSE:
        tl.store(p_dq + (o_b * B + o_i) * B + o_j, b_dq * 0.5, mask=inside)
    else:
        tl.store(p_dq + o_b * (B * (B - 1) // 2) + _packed(o_i, o_j, B), b_dq, mask=inside & (o_i < o_j))


@triton.jit
def _coefficient(C: tl.constexpr, N: tl.constexpr, k):
    c = 0.0
    for i in tl.static_range(N):
        c = tl.where(k == i, C[i], c)
    return c


@triton.jit
def _identity(P: tl.constexpr, dtype: tl.constexpr):
    return tl.where(tl.arange(0, P)[:, None] == tl.arange(0, P)[None, :], 1.0, 0.0).to(dtype)


@triton.jit
def _strips(b_x, STRIP: tl.constexpr):
    """Rows in one strip or two, as a tuple."""
    P: tl.constexpr = b_x.shape[1]
    if STRIP < P:
        return tl.split(tl.permute(tl.reshape(b_x, (2, STRIP, P)), (1, 2, 0)))
    else:
        return (b_x,)


@triton.jit
def _joined(b_xs):
    P: tl.constexpr = b_xs[0].shape[1]
    if len(b_xs) == 2:
        return tl.reshape(tl.permute(tl.join(b_xs[0], b_xs[1]), (2, 0, 1)), (P, P))
    else:
        return b_xs[0]


@triton.jit
def _square(p_q, first, i, j, K, B: tl.constexpr, W: tl.constexpr, P: tl.constexpr):
    """A part [P, P] of -Q of the blocks from column `first` on: rows from i, columns from j on."""
    o_i, o_j = i + tl.arange(0, P)[:, None], j + tl.arange(0, P)[None, :]
    inside = (o_i // B == o_j // B) & (o_i < W) & (o_j < W) & (first + o_i < K)
    return -_skew(p_q, o_i // B + first // B, o_i % B, o_j % B, inside, B, False)


@triton.jit
def _squares(p_q, b_q, first, K, B: tl.constexpr, W: tl.constexpr, P: tl.constexpr, STRIP: tl.constexpr):
    """-Q whose strips are cut again, row by row: from memory, since pieces of b_q would stay in registers."""
    if STRIP < P:
        return (
            _square(p_q, first, 0, 0, K, B, W, STRIP),
            _square(p_q, first, 0, STRIP, K, B, W, STRIP),
            _square(p_q, first, STRIP, 0, K, B, W, STRIP),
            _square(p_q, first, STRIP, STRIP, K, B, W, STRIP),
        )
    else:
        return (b_q,)


@triton.jit
def _from_right(b_xs, b_a, b_plus):
    """x a + plus, strip by strip."""
    b_out = ()
    for n in tl.static_range(len(b_xs)):
        b_out = b_out + (dot(b_xs[n], b_a, b_plus[n]),)
    return b_out


@triton.jit
def _from_left(b_a, b_xs):
    """a x; a in squares."""
    N: tl.constexpr = len(b_xs)
    b_out = ()
    for n in tl.static_range(N):
        b_sum = tl.zeros(b_xs[n].shape, b_xs[n].dtype)
        for k in tl.static_range(N):
            b_sum = dot(b_a[n * N + k], b_xs[k], b_sum)
        b_out = b_out + (b_sum,)
    return b_out


@triton.jit
def _times(b_xs, c):
    b_out = ()
    for n in tl.static_range(len(b_xs)):
        b_out = b_out + (b_xs[n] * c,)
    return b_out


@triton.jit
def _plus(b_xs, b_ys):
    b_out = ()
    for n in tl.static_range(len(b_xs)):
        b_out = b_out + (b_xs[n] + b_ys[n],)
    return b_out


@triton.jit
def polynomial_kernel(
    p_q, p_r, K,
    C: tl.constexpr, D: tl.constexpr, B: tl.constexpr, W: tl.constexpr, P: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """R = C[0] I + C[1] Q + ... + C[D] Q^D by Horner's rule; K = S B. Launch: K / W. Flops: 12 (D - 1) K P."""
    first = tl.program_id(0) * W
    o_b, o_i, o_j, inside = _places(first, K, B, W, P)
    o_b += first // B
    b_q = _skew(p_q, o_b, o_i, o_j, inside, B, False)
    b_eye = _identity(P, b_q.dtype)
    b_r = _strips(b_eye * C[D], STRIP)
    if D > 0:
        b_r = _strips(b_eye * C[D - 1] + b_q * C[D], STRIP)
    b_eyes = _strips(b_eye, STRIP)
    for i in range(2, D + 1):
        b_r = _from_right(b_r, b_q, _times(b_eyes, _coefficient(C, D + 1, D - i).to(b_q.dtype)))
    tl.store(p_r + (o_b.to(tl.int64) * B + o_i) * B + o_j, _joined(b_r), mask=inside)


@triton.jit
def polynomial_backward_kernel(
    p_dr, p_q, p_dq, K,
    C: tl.constexpr, D: tl.constexpr, B: tl.constexpr, W: tl.constexpr, P: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """dQ = sum_j C[j] Y_j, Y_1 = dR, Y_(j+1) = L_j - Y_j Q, with L_j = (-Q)^j dR; then packed.

    Nothing of the forward is needed but Q. Launch: K / W. Flops: 24 (D - 1) K P. Bytes: q once more in strips.
    """
    first = tl.program_id(0) * W
    o_b, o_i, o_j, inside = _places(first, K, B, W, P)
    o_b += first // B
    b_q = -_skew(p_q, o_b, o_i, o_j, inside, B, False)
    b_squares = _squares(p_q, b_q, first, K, B, W, P, STRIP)
    b_l = _strips(tl.load(p_dr + (o_b.to(tl.int64) * B + o_i) * B + o_j, mask=inside, other=0.0), STRIP)
    b_y = b_l
    b_dq = _times(b_y, C[1] if D > 0 else 0.0)
    for j in range(2, D + 1):
        b_l = _from_left(b_squares, b_l)
        b_y = _from_right(b_y, b_q, b_l)
        b_dq = _plus(b_dq, _times(b_y, _coefficient(C, D + 1, j).to(b_q.dtype)))
    _store_skew(p_dq, _joined(b_dq), o_b, o_i, o_j, inside, B, False)


@triton.jit
def cayley_kernel(p_q, p_r, S, B: tl.constexpr, P: tl.constexpr, N: tl.constexpr, DENSE: tl.constexpr):
    """R = 2 (I + Q)^-1 - I by Gauss and Jordan in float64; no pivot is below 1 (README.md).

    Launch: S / N, N blocks side by side, each padded with the identity to P. Flops: 2 K P^2 of float64, K = S B.
    """
    o_b = tl.program_id(0) * N + tl.arange(0, N)[:, None, None]
    o_i, o_j = tl.arange(0, P)[None, :, None], tl.arange(0, P)[None, None, :]
    inside = (o_b < S) & (o_i < B) & (o_j < B)
    b_eye = tl.where(o_i == o_j, 1.0, 0.0).to(tl.float64)
    b_a = _skew(p_q, o_b, o_i, o_j, inside, B, DENSE).to(tl.float64) + b_eye
    for k in range(0, B):
        b_column = tl.sum(tl.where(o_j == k, b_a, 0.0), 2)[:, :, None]
        b_row = tl.sum(tl.where(o_i == k, b_a, 0.0), 1)[:, None, :]
        b_pivot = tl.sum(tl.where(o_j == k, b_row, 0.0), 2)[:, :, None]
        b_row = tl.where(o_j == k, 1.0, b_row) / b_pivot
        b_a = tl.where(o_i == k, b_row, tl.where(o_j == k, 0.0, b_a) - b_column * b_row)
    b_r = (2.0 * b_a - b_eye).to(p_r.dtype.element_ty)
    tl.store(p_r + (o_b.to(tl.int64) * B + o_i) * B + o_j, b_r, mask=inside)


@triton.jit
def cayley_backward_kernel(p_dr, p_r, p_dq, K, B: tl.constexpr, W: tl.constexpr, P: tl.constexpr, DENSE: tl.constexpr):
    """dQ = -(I + R)^T dR (I + R)^T / 2, packed or dense. Launch: K / W, K = S B. Flops: 24 K P."""
    first = tl.program_id(0) * W
    o_b, o_i, o_j, inside = _places(first, K, B, W, P)
    o_b += first // B
    o_block = o_b.to(tl.int64) * (B * B)
    b_s = tl.load(p_r + o_block + o_j * B + o_i, mask=inside, other=0.0)
    b_s += _identity(P, b_s.dtype)
    b_dr = tl.load(p_dr + o_block + o_i * B + o_j, mask=inside, other=0.0)
    # dR as a right factor would meet bank conflicts (row_tile).
    b_dq = dot(b_dr, b_s, tl.zeros((P, P), b_s.dtype))
    b_dq = dot(b_s, b_dq, tl.zeros((P, P), b_s.dtype))
    _store_skew(p_dq, b_dq * -0.5, o_b, o_i, o_j, inside, B, DENSE)
