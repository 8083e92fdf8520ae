"""Reference backend of the `block_rotation` operations: plain torch, any device, differentiable when called directly.

    z_i = x_i R_i  for the blocks x_i [M, b] of x [M, K]       (README.md, eq. 1)

Half-precision rows are computed in R's dtype and rounded once, at the end.
"""

import torch
import torch.nn.functional as F

from peftkern.ops import _cayley
from peftkern.ops._transforms import without_autocast
from peftkern.ops.block_rotation.contract import block_size

_HALF = (torch.bfloat16, torch.float16)


def unpack(q):
    """q [S, b (b - 1) / 2] -> skew Q [S, b, b] with q in the strict upper triangle, row by row."""
    b = block_size(q.shape[1])
    row, column = torch.triu_indices(b, b, 1, device=q.device)
    upper = q.new_zeros(q.shape[0], b * b).index_copy(1, row * b + column, q).view(-1, b, b)
    return upper - upper.mT


def pack(dQ):
    """The gradient in q of a gradient in Q: the upper triangle of dQ - dQ^T."""
    b = dQ.shape[-1]
    row, column = torch.triu_indices(b, b, 1, device=dQ.device)
    return (dQ - dQ.mT)[:, row, column]


@without_autocast
def skew_polynomial(q, coefficients):
    """R = sum_k c_k Q^k [S, b, b]."""
    return _cayley.polynomial(unpack(q), coefficients)


@without_autocast
def skew_polynomial_backward(dR, q, coefficients):
    """dq [S, b (b - 1) / 2]; the powers are computed again."""
    return pack(_cayley.polynomial_backward(dR, unpack(q), coefficients))


@without_autocast
def skew_cayley(q):
    """R = (I - Q)(I + Q)^-1 [S, b, b]."""
    return _cayley.cayley(unpack(q))


@without_autocast
def skew_cayley_backward(dR, R):
    """dQ = -(I + R)^T dR (I + R)^T / 2, packed."""
    return pack(_cayley.cayley_backward(dR, R))


def _blocks(x, R):
    """x [..., K] as [K/b, M, b] in R's dtype."""
    b = R.shape[-1]
    return x.reshape(-1, x.shape[-1] // b, b).transpose(0, 1).to(R.dtype)


def _rows(blocks, shape):
    return blocks.transpose(0, 1).reshape(shape)


def _rotated(x, R, transpose):
    return _rows(_blocks(x, R) @ (R.mT if transpose else R), x.shape)


@without_autocast
def block_rotate(x, R, transpose):
    """z_i = x_i R_i (x_i R_i^T when transposed), like x."""
    return _rotated(x, R, transpose).to(x.dtype)


@without_autocast
def block_rotate_backward(dz, x, R, transpose, output_mask):
    """dx_i = dz_i R_i^T, dR_i = x_i^T dz_i (summed over the blocks where R is shared)."""
    want_dx, want_dR = output_mask
    dx, dR = x.new_empty(0), R.new_empty(0)
    if want_dx:
        dx = _rotated(dz, R, not transpose).to(x.dtype)
    if want_dR:
        left, right = (dz, x) if transpose else (x, dz)
        dR = _blocks(left, R).mT @ _blocks(right, R)
        dR = dR.sum(0, keepdim=True) if len(R) == 1 else dR
    return dx, dR


def linear_of_wide(z, weight, bias):
    """z W^T + b for float32 z over half-precision W: z as a sum of two half-precision terms, one accumulator."""
    if weight.dtype not in _HALF:
        return F.linear(z, weight, bias)
    high = z.to(weight.dtype)
    low = (z - high).to(weight.dtype)
    return F.linear(torch.cat((high, low), -1), torch.cat((weight, weight), 1), bias)


@without_autocast
def block_rotated_linear(x, weight, bias, R):
    """y = (x R) W^T + b with x R unrounded: one rounding, that of y."""
    return linear_of_wide(_rotated(x, R, False), weight, bias)


@without_autocast
def block_rotated_linear_backward(dy, x, weight, R, output_mask):
    """block_rotate_backward of dz = dy W."""
    return block_rotate_backward(dy.matmul(weight).to(x.dtype), x, R, False, output_mask)
