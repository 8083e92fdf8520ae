"""Differentiable forms of the `block_rotation` operations.

Forward and backward are operations of `torch.ops.peftkern`. When a backward is itself differentiated (create_graph)
it is taken from the reference formulas, which torch can differentiate again; nothing is dropped.
"""

import torch
import torch.nn.functional as F

from peftkern.dispatch import direct as _ops
from peftkern.dispatch import unchecked as _unchecked
from peftkern.ops import _scratch, _transforms
from peftkern.ops.block_rotation import reference


def rotates_weight(x_size, weight_size):
    """Whether `fast` rotates the rows of W rather than those of x, (x R) W^T = x (W R^T)^T: wherever they are fewer.

    A rotation reads and writes its rows once, 2 N K numbers against 2 M K, and a scale of the outputs multiplied into
    the weight on the way spares 2 M N more. Sizes in rows, or in numbers: both have K columns.
    """
    return weight_size < x_size


def fast_linear(rotate, x, weight, bias, R):
    """y = (x R) W^T + b with x R or W R^T rounded once; rotate: the operation of R's family. Not differentiable."""
    of_weight = rotates_weight(x.numel(), weight.numel())
    rotated = rotate(weight, R, True) if of_weight else rotate(x, R, False)
    y = F.linear(x, rotated, bias) if of_weight else F.linear(rotated, weight, bias)
    _scratch.give(rotated)
    return y


class SkewPolynomial(torch.autograd.Function):
    """q [S, b (b - 1) / 2] -> R = sum_k c_k Q^k; saves q alone."""

    @staticmethod
    def forward(ctx, q, coefficients):
        ctx.save_for_backward(q)
        ctx.coefficients = coefficients
        return _ops.skew_polynomial(q, coefficients)

    @staticmethod
    def backward(ctx, dR):
        (q,) = ctx.saved_tensors
        backward = reference if _transforms.differentiating_twice() else _unchecked
        return backward.skew_polynomial_backward(dR, q, ctx.coefficients), None


class SkewCayley(torch.autograd.Function):
    """q [S, b (b - 1) / 2] -> R = (I - Q)(I + Q)^-1; saves R, which the rotation saves too."""

    @staticmethod
    def forward(ctx, q):
        R = _ops.skew_cayley(q)
        ctx.save_for_backward(q, R)
        return R

    @staticmethod
    def backward(ctx, dR):
        q, R = ctx.saved_tensors
        if _transforms.differentiating_twice():
            return reference.skew_cayley_backward(dR, reference.skew_cayley(q))
        return _unchecked.skew_cayley_backward(dR, R)


class BlockRotate(torch.autograd.Function):
    """z_i = x_i R_i (x_i R_i^T when transposed); saves x and R."""

    @staticmethod
    def forward(ctx, x, R, transpose):
        ctx.save_for_backward(x, R)
        ctx.transpose = transpose
        return _ops.block_rotate(x, R, transpose)

    @staticmethod
    def backward(ctx, dz):
        x, R = ctx.saved_tensors
        mask = ctx.needs_input_grad[:2]
        backward = reference if _transforms.differentiating_twice() else _unchecked
        dx, dR = backward.block_rotate_backward(dz, x, R, ctx.transpose, mask)
        return dx if mask[0] else None, dR if mask[1] else None, None


class BlockRotatedLinear(torch.autograd.Function):
    """y = (x R) W^T + b in one accumulator; saves x, W and R."""

    @staticmethod
    def forward(ctx, x, weight, bias, R):
        ctx.save_for_backward(x, weight, R)
        return _ops.block_rotated_linear(x, weight, bias, R)

    @staticmethod
    def backward(ctx, dy):
        return _linear_backward(dy, *ctx.saved_tensors, ctx.needs_input_grad)


def _linear_backward(dy, x, weight, R, needs_input_grad):
    """dx, dW, db and dR of y = (x R) W^T + b, None where not needed."""
    need_x, need_weight, need_bias, need_R = needs_input_grad
    ops = reference if _transforms.differentiating_twice() else _unchecked
    dx = dR = dweight = dbias = None
    if need_x or need_R:
        dx, dR = ops.block_rotated_linear_backward(dy, x, weight, R, (need_x, need_R))
        dx, dR = dx if need_x else None, dR if need_R else None
    if need_weight:
        z = ops.block_rotate(x, R, False).to(weight.dtype)
        with _transforms.no_autocast(dy.device.type):
            dweight = dy.reshape(-1, dy.shape[-1]).mT @ z.reshape(-1, z.shape[-1])
    if need_bias:
        dbias = dy.reshape(-1, dy.shape[-1]).sum(0)
    return dx, dweight, dbias, dR


class PackedRotatedLinear(torch.autograd.Function):
    """y = (x R) W^T + b with R made of packed skew matrices on the way: one node of the graph where there are three.

    coefficients: of the polynomial, or None for the exact map; x R (or W R^T) is rounded once, or not at all where
    `exact`.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, q, coefficients, exact):
        R = _ops.skew_cayley(q) if coefficients is None else _ops.skew_polynomial(q, coefficients)
        ctx.save_for_backward(x, weight, q, R)
        ctx.coefficients = coefficients
        if exact:
            return _ops.block_rotated_linear(x, weight, bias, R)
        return fast_linear(_ops.block_rotate, x, weight, bias, R)

    @staticmethod
    def backward(ctx, dy):
        x, weight, q, R = ctx.saved_tensors
        c, twice = ctx.coefficients, _transforms.differentiating_twice()
        ops = reference if twice else _unchecked
        if twice:
            R = reference.skew_cayley(q) if c is None else reference.skew_polynomial(q, c)
        *gradients, dR = _linear_backward(dy, x, weight, R, ctx.needs_input_grad[:4])
        dq = None
        if dR is not None:
            dq = ops.skew_cayley_backward(dR, R) if c is None else ops.skew_polynomial_backward(dR, q, c)
        return *gradients, dq, None, None
