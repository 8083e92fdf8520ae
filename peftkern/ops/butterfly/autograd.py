"""Differentiable forms of the `butterfly` operations.

Forward and backward are operations of `torch.ops.peftkern`. When a backward is itself differentiated (create_graph)
it is taken from the reference formulas, which torch can differentiate again; nothing is dropped.
"""

import torch
import torch.nn.functional as F

from peftkern.dispatch import direct as _ops
from peftkern.dispatch import unchecked as _unchecked
from peftkern.ops import _scratch, _transforms
from peftkern.ops.block_rotation import autograd as blocks
from peftkern.ops.butterfly import reference

# Scales in the weight are no nearer to 0 (README.md, eq. 9): a product times less would leave bfloat16's range.
LEAST_SCALE = 2.0**-60


def _backward_ops():
    return reference if _transforms.differentiating_twice() else _unchecked


class DenseCayley(torch.autograd.Function):
    """B [f, K/b, b, b] -> R, orthogonal blocks; saves R, which the rotation saves too."""

    @staticmethod
    def forward(ctx, B):
        R = _ops.dense_cayley(B)
        ctx.save_for_backward(B, R)
        return R

    @staticmethod
    def backward(ctx, dR):
        B, R = ctx.saved_tensors
        if _transforms.differentiating_twice():
            return reference.dense_cayley_backward(dR, reference.dense_cayley(B))
        return _unchecked.dense_cayley_backward(dR, R)


class ButterflyRotate(torch.autograd.Function):
    """z = x R (x R^T when transposed); saves x and R, nothing between the stages."""

    @staticmethod
    def forward(ctx, x, R, transpose):
        ctx.save_for_backward(x, R)
        ctx.transpose = transpose
        return _ops.butterfly_rotate(x, R, transpose)

    @staticmethod
    def backward(ctx, dz):
        x, R = ctx.saved_tensors
        mask = ctx.needs_input_grad[:2]
        dx, dR = _backward_ops().butterfly_rotate_backward(dz, x, R, ctx.transpose, mask)
        return dx if mask[0] else None, dR if mask[1] else None, None


class ScaleOutputs(torch.autograd.Function):
    """(y - b) s + b; saves y where the scale needs a gradient."""

    @staticmethod
    def forward(ctx, y, scale, bias):
        ctx.save_for_backward(y if ctx.needs_input_grad[1] else None, scale, bias)
        return _ops.scale_outputs(y, scale, bias)

    @staticmethod
    def backward(ctx, dy):
        return _scale_backward(dy, *ctx.saved_tensors, ctx.needs_input_grad)


def _scale_backward(dy, y, scale, bias, needs_input_grad):
    """The gradients in y, scale and bias of (y - b) s + b, None where not needed."""
    need_y, need_scale, need_bias = needs_input_grad
    # Without a gradient in the scale the value of y is not read.
    operand = dy if y is None else y
    dy0, dscale = _backward_ops().scale_outputs_backward(dy, operand, scale, bias, (need_y, need_scale))
    dbias = None
    if need_bias:
        dbias = (dy.reshape(-1, dy.shape[-1]).to(scale.dtype).sum(0) * (1 - scale)).to(bias.dtype)
    return dy0 if need_y else None, dscale if need_scale else None, dbias


def _linear_backward(dy, x, weight, scale, p, R, needs_input_grad):
    """dx, dW, db, ds and dR of y = s (x R) W^T + b with p = (x R) W^T where ds is needed; None where not needed."""
    need_x, need_weight, need_bias, need_scale, need_R = needs_input_grad
    ops = _backward_ops()
    if _transforms.differentiating_twice() and p is not None:
        p = reference.butterfly_rotated_linear(x, weight, None, torch.ones_like(scale), R)[0]
    dx = dR = dscale = dweight = dbias = None
    if need_x or need_scale or need_R:
        mask = need_x, need_scale, need_R
        kept = dy if p is None else p
        dx, dscale, dR = ops.butterfly_rotated_linear_backward(dy, x, weight, scale, kept, R, mask)
        dx, dscale, dR = dx if need_x else None, dscale if need_scale else None, dR if need_R else None
    if need_weight:
        z = ops.butterfly_rotate(x, R, False).to(weight.dtype)
        dp = dy if scale is None else ops.scale_outputs_backward(dy, dy, scale, None, (True, False))[0]
        with _transforms.no_autocast(dy.device.type):
            dweight = dp.reshape(-1, dp.shape[-1]).mT @ z.reshape(-1, z.shape[-1])
    if need_bias:
        dbias = dy.reshape(-1, dy.shape[-1]).sum(0)
    return dx, dweight, dbias, dscale, dR


class ButterflyRotatedLinear(torch.autograd.Function):
    """y = s (x R) W^T + b in one accumulator; saves x, W, R, s and p = (x R) W^T where there is a scale."""

    @staticmethod
    def forward(ctx, x, weight, bias, scale, R):
        y, p = _ops.butterfly_rotated_linear(x, weight, bias, scale, R)
        keep_p = scale is not None and ctx.needs_input_grad[3]
        ctx.save_for_backward(x, weight, scale, p if keep_p else None, R)
        return y

    @staticmethod
    def backward(ctx, dy):
        return _linear_backward(dy, *ctx.saved_tensors, ctx.needs_input_grad)


def folds(x, weight, bias, scale):
    """Whether `fast` multiplies the scale into the rotated weight, before that is rounded.

    Not behind a bias: the gradient of s would come from (y - b) / s, and a small s leave nothing there but the rounding
    of b. Nor in float16, which has no room for small scales of small weights. Nor in a graph that is compiled: it keeps
    y itself, and cannot tell who will write into it.
    """
    if scale is None or bias is not None or x.dtype is torch.float16 or torch.compiler.is_compiling():
        return False
    return blocks.rotates_weight(x.numel(), weight.numel())


def away_from_zero(scale):
    return scale.abs().clamp_(min=LEAST_SCALE).copysign_(scale)


def fast_linear(x, weight, bias, scale, R):
    """y = s (x R) W^T + b as `fast` has it. Not differentiable."""
    if folds(x, weight, bias, scale):
        return F.linear(x, _ops.butterfly_rotate_weight(weight, away_from_zero(scale), R))
    y = blocks.fast_linear(_ops.butterfly_rotate, x, weight, bias, R)
    return y if scale is None else _ops.scale_outputs(y, scale, bias)


def folded_linear(x, weight, scale, B):
    """y = x (s W R^T)^T with R made of dense blocks B, where `folds`; scale: N numbers of any shape."""
    if not torch.is_grad_enabled():
        return fast_linear(x, weight, None, scale.reshape(-1), _ops.dense_cayley(B))
    s = away_from_zero(scale.detach()).reshape(-1)
    return FoldedScale.apply(FoldedLinear.apply(x, weight, scale, s, B), scale, s)


class FoldedLinear(torch.autograd.Function):
    """y = x (s W R^T)^T, differentiated as (x R) W^T: FoldedScale behind it multiplies the incoming gradient by s.

    Unless FoldedScale leaves that to it (`whole`).
    """

    @staticmethod
    def forward(ctx, x, weight, scale, s, B):
        R = _ops.dense_cayley(B)
        ctx.save_for_backward(x, weight, scale, s, B, R)
        ctx.whole = False
        return F.linear(x, _ops.butterfly_rotate_weight(weight, s, R))

    @staticmethod
    def backward(ctx, dp):
        x, weight, scale, s, B, R = ctx.saved_tensors
        need_x, need_weight, need_scale, _, need_R = ctx.needs_input_grad
        p, need_scale = None, need_scale and ctx.whole
        if _transforms.differentiating_twice():
            # _linear_backward makes the product itself, where there is any.
            s, R, p = scale.reshape(-1), reference.dense_cayley(B), dp if need_scale else None
        elif need_scale:
            with _transforms.no_autocast(x.device.type):
                p = F.linear(_ops.butterfly_rotate(x, R, False), weight)
        needs = need_x, need_weight, False, need_scale, need_R
        dx, dweight, _, dscale, dR = _linear_backward(dp, x, weight, s if ctx.whole else None, p, R, needs)
        dB = None if dR is None else _backward_ops().dense_cayley_backward(dR, R)
        return dx, dweight, None if dscale is None else dscale.view_as(scale), None, dB


class FoldedScale(torch.autograd.Function):
    """The y of FoldedLinear, kept for the gradient of the scale: ds = (sum over rows of dy y) / s.

    Where a caller has since written into y, as nothing forbids behind a linear layer, or a gradient will itself be
    differentiated, FoldedLinear finds all gradients by the product that y was, once more.
    """

    @staticmethod
    def forward(ctx, y, scale, s):
        ctx.save_for_backward(y if ctx.needs_input_grad[1] else None, s)
        ctx.version, ctx.shape = y._version, scale.shape
        # An output of its own of the same memory: what is written into it counts as a new version of y.
        return y.detach()

    @staticmethod
    def backward(ctx, dy):
        kept, product = _kept(ctx), ctx.next_functions[0][0]
        product.whole = kept is None or torch.is_grad_enabled()
        if product.whole:
            return dy, None, None
        y, s = kept
        dp, dscale = _unchecked.scale_outputs_backward(dy, dy if y is None else y, s, None, (True, y is not None))
        return dp, None if y is None else dscale.div_(s).view(ctx.shape), None


def _kept(ctx):
    """(y, s), or None where y is not what it was: autograd refuses it then, or hands it out where hooks keep it."""
    try:
        y, s = ctx.saved_tensors
    except RuntimeError:
        return None
    return (y, s) if y is None or y._version == ctx.version else None


class DenseRotatedLinear(torch.autograd.Function):
    """y = s (x R) W^T + b with R made of dense blocks B on the way: one node of the graph where there are five.

    scale: N numbers of any shape, or None; x R (or W R^T) and the product are rounded before the scale, or not where
    `exact`.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, scale, B, exact):
        R = _ops.dense_cayley(B)
        s = None if scale is None else scale.reshape(-1)
        if exact:
            y, p = _ops.butterfly_rotated_linear(x, weight, bias, s, R)
        else:
            y = p = blocks.fast_linear(_ops.butterfly_rotate, x, weight, bias, R)
            if s is not None:
                y = _ops.scale_outputs(p, s, bias)
        keep_p = s is not None and ctx.needs_input_grad[3]
        # p of an inexact product has the bias in it.
        ctx.save_for_backward(x, weight, None if exact else bias, scale, p if keep_p else None, B, R)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, scale, p, B, R = ctx.saved_tensors
        twice, needs = _transforms.differentiating_twice(), ctx.needs_input_grad[:5]
        if twice:
            R = reference.dense_cayley(B)
        s = None if scale is None else scale.reshape(-1)
        if p is None or bias is None or twice:
            dx, dweight, dbias, dscale, dR = _linear_backward(dy, x, weight, s, p, R, needs)
        else:
            need_x, need_weight, need_bias, _, need_R = needs
            dp, dscale, _ = _scale_backward(dy, p, s, bias, (need_x or need_weight or need_R, True, False))
            dx = dweight = dR = None
            if dp is not None:
                needs = need_x, need_weight, False, False, need_R
                dx, dweight, _, _, dR = _linear_backward(dp, x, weight, None, None, R, needs)
                _scratch.give(dp)
            dbias = dy.reshape(-1, dy.shape[-1]).sum(0) if need_bias else None
        dscale = None if dscale is None else dscale.view_as(scale)
        dB = None if dR is None else _backward_ops().dense_cayley_backward(dR, R)
        return dx, dweight, dbias, dscale, dB, None
