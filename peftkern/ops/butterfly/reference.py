"""Reference backend of the `butterfly` operations: plain torch, any device, differentiable when called directly.

Stage s views the columns as [groups, 2, 2^s, b/2]: its block t of a group couples unit t of the first half with unit t
of the second (README.md, eq. 3). x R applies the stages f-1, ..., 0; x R^T the transposed blocks from 0 upwards.
Half-precision rows are computed in R's dtype, through all stages, and rounded once.
"""

import torch

from peftkern.ops import _cayley, _scratch
from peftkern.ops._transforms import without_autocast
from peftkern.ops.block_rotation.reference import linear_of_wide


def gather(x, s, b):
    """Columns of x [M, K] as the blocks of stage s: [K/b, M, b]."""
    M, K = x.shape
    if s == 0:
        return x.view(M, K // b, b).transpose(0, 1)
    units = x.view(M, K // (b << s), 2, 1 << s, b // 2).transpose(2, 3)
    return units.reshape(M, K // b, b).transpose(0, 1)


def scatter(blocks, s):
    """The inverse of `gather`."""
    n, M, b = blocks.shape
    x = blocks.transpose(0, 1)
    if s == 0:
        return x.reshape(M, n * b)
    return x.reshape(M, n >> s, 1 << s, 2, b // 2).transpose(2, 3).reshape(M, n * b)


def _order(R, transpose):
    """The stages in the order in which they are applied, each with its blocks."""
    f = len(R)
    return [(s, R[s].mT) for s in range(f)] if transpose else [(s, R[s]) for s in range(f - 1, -1, -1)]


def _stage_inputs(x, R, transpose):
    """The rows before each stage, and after the last; [M, K] in R's dtype."""
    inputs = [x.reshape(-1, x.shape[-1]).to(R.dtype)]
    for s, blocks in _order(R, transpose):
        inputs.append(scatter(gather(inputs[-1], s, R.shape[-1]) @ blocks, s))
    return inputs


@without_autocast
def dense_cayley(B):
    """R = (I - A)(I + A)^-1 of A = (B - B^T) / 2, block by block."""
    return _cayley.cayley(_cayley.skew_part(B))


@without_autocast
def dense_cayley_backward(dR, R):
    """dA = -(I + R)^T dR (I + R)^T / 2, dB = (dA - dA^T) / 2."""
    return _cayley.skew_part(_cayley.cayley_backward(dR, R))


@without_autocast
def butterfly_rotate(x, R, transpose):
    """z = x R (x R^T when transposed), like x."""
    return _stage_inputs(x, R, transpose)[-1].to(x.dtype).reshape(x.shape)


@without_autocast
def butterfly_rotate_weight(weight, scale, R):
    """s W R^T, one number s for each row of W, like W."""
    return (_stage_inputs(weight, R, True)[-1] * scale[:, None]).to(weight.dtype)


@without_autocast
def butterfly_rotate_backward(dz, x, R, transpose, output_mask):
    """The gradient through each stage, the last first: dR_s = u_s^T g, g <- g R_s^T, with u_s the input of stage s."""
    want_dx, want_dR = output_mask
    b = R.shape[-1]
    inputs = _stage_inputs(x, R, transpose)[:-1]
    g, dR = dz.reshape(inputs[0].shape).to(R.dtype), [None] * len(R)
    for (s, blocks), u in zip(reversed(_order(R, transpose)), reversed(inputs), strict=True):
        g_blocks = gather(g, s, b)
        d = gather(u, s, b).mT @ g_blocks
        dR[s] = d.mT if transpose else d
        g = scatter(g_blocks @ blocks.mT, s)
    dx = g.to(x.dtype).reshape(x.shape) if want_dx else x.new_empty(0)
    return dx, torch.stack(dR) if want_dR else R.new_empty(0)


@without_autocast
def scale_outputs(y, scale, bias):
    """(y - b) s + b in scale's dtype, rounded once."""
    if bias is None:
        return (y.to(scale.dtype) * scale).to(y.dtype)
    b = bias.to(scale.dtype)
    return ((y.to(scale.dtype) - b) * scale + b).to(y.dtype)


@without_autocast
def scale_outputs_backward(dy, y, scale, bias, output_mask):
    """The gradients in y, dy s, and in the scale, sum over rows of dy (y - b)."""
    want_dy, want_scale = output_mask
    wide = dy.to(scale.dtype)
    dscale = scale.new_empty(0)
    if want_scale:
        p = y.to(scale.dtype) if bias is None else y.to(scale.dtype) - bias.to(scale.dtype)
        dscale = (wide * p).reshape(-1, len(scale)).sum(0)
    return (wide * scale).to(y.dtype) if want_dy else y.new_empty(0), dscale


@without_autocast
def butterfly_rotated_linear(x, weight, bias, scale, R):
    """y = s (x R) W^T + b, x R unrounded, rounded once; and p = (x R) W^T where there is a scale (else empty)."""
    z = _stage_inputs(x, R, False)[-1].reshape(x.shape)
    if scale is None:
        return linear_of_wide(z, weight, bias), weight.new_empty(0)
    p = z @ weight.to(z.dtype).mT
    y = p * scale if bias is None else p * scale + bias.to(z.dtype)
    return y.to(weight.dtype), p.to(weight.dtype)


def linear_backward(scale_backward, rotated_backward, dy, x, weight, scale, p, R, output_mask):
    """`butterfly_rotated_linear_backward` from a backend's scale_outputs_backward and its
    rotated_backward(dy, x, weight, R, mask), butterfly_rotate_backward of dz = dy W."""
    want_dx, want_scale, want_dR = output_mask
    dscale = R.new_empty(0)
    if scale is not None:
        mask = want_dx or want_dR, want_scale
        dy, dscale = scale_backward(dy, p if want_scale else dy, scale, None, mask)
    if not want_dx and not want_dR:
        return x.new_empty(0), dscale, R.new_empty(0)
    dx, dR = rotated_backward(dy, x, weight, R, (want_dx, want_dR))
    if scale is not None:
        _scratch.give(dy)
    return dx, dscale, dR


def _rotated_backward(dy, x, weight, R, output_mask):
    return butterfly_rotate_backward(dy.matmul(weight).to(x.dtype), x, R, False, output_mask)


@without_autocast
def butterfly_rotated_linear_backward(dy, x, weight, scale, p, R, output_mask):
    """butterfly_rotate_backward of dz = (dy s) W, and dscale = sum over rows of dy p."""
    parts = scale_outputs_backward, _rotated_backward
    return linear_backward(*parts, dy, x, weight, scale, p, R, output_mask)
