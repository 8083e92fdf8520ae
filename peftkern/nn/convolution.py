"""The convolution with a kernel W + D: D = B A of low rank, A [r, Cin, kh, kw] and B [N, r], or D like W."""

import contextlib

import torch
import torch.nn.functional as F


def _one_by_one(B):
    return B[:, :, None, None]


def low_rank(base_layer, x, A, B):
    """conv1x1(conv(x, A), B): the update alone, [..., N, Ho, Wo] in x's dtype; A and B share it."""
    return F.conv2d(base_layer._conv_forward(x, A, None), _one_by_one(B))


def one_accumulator(base_layer, x, weight, bias, A, B, save_inputs):
    """conv([x, x], [W, B A]) + bias: base product and update meet before the only rounding.

    Args:
        x, weight, bias: in one half-precision dtype; A, B: float32.
        save_inputs: keep x, W, A and B for backward and nothing else; False where torch has to see through the
            formula (functorch transforms).
    """
    x, padding = _padded(base_layer, x)
    batched = x if x.dim() == 4 else x[None]
    convolve = OneAccumulator.apply if save_inputs else _one_accumulator
    y = convolve(batched, weight, bias, A, B, base_layer.stride, padding, base_layer.dilation)
    return y if x.dim() == 4 else y[0]


def _padded(base_layer, x):
    """x and the (height, width) of zeros that are left to the convolution; any padding_mode."""
    pads = base_layer._reversed_padding_repeated_twice
    symmetric = pads[0] == pads[1] and pads[2] == pads[3]
    if base_layer.padding_mode == "zeros" and symmetric:
        return x, (pads[2], pads[0])
    mode = "constant" if base_layer.padding_mode == "zeros" else base_layer.padding_mode
    return F.pad(x, pads, mode=mode), (0, 0)


def _one_accumulator(x, weight, bias, A, B, stride, padding, dilation):
    with contextlib.nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False):
        update = (B @ A.flatten(1)).view_as(weight).to(weight.dtype)
    return F.conv2d(torch.cat((x, x), 1), torch.cat((weight, update), 1), bias, stride, padding, dilation)


class OneAccumulator(torch.autograd.Function):
    """Forward in one accumulator; backward of conv(x, W) + conv1x1(conv(x, A), B), with A and B in x's dtype."""

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, stride, padding, dilation):
        ctx.save_for_backward(x, weight, A, B)
        ctx.geometry = stride, padding, dilation
        return _one_accumulator(x, weight, bias, A, B, stride, padding, dilation)

    @staticmethod
    def backward(ctx, dy):
        x, weight, A, B = ctx.saved_tensors
        need_x, need_weight, need_bias, need_A, need_B = ctx.needs_input_grad[:5]
        dx, dweight, dbias = _backward(dy, x, weight, ctx.geometry, (need_x, need_weight, need_bias))
        if not (need_x or need_A or need_B):
            return dx, dweight, dbias, *[None] * 5
        A_half, B_half = A.to(x.dtype), _one_by_one(B.to(x.dtype))
        projected = F.conv2d(x, A_half, None, *ctx.geometry)
        mask = (need_x or need_A, need_B, False)
        dprojected, dB, _ = _backward(dy, projected, B_half, ((1, 1), (0, 0), (1, 1)), mask)
        dA = None
        if need_x or need_A:
            dx_update, dA, _ = _backward(dprojected, x, A_half, ctx.geometry, (need_x, need_A, False))
            dx = dx + dx_update if need_x else None
        dA = dA.to(A.dtype) if need_A else None
        dB = dB[:, :, 0, 0].to(B.dtype) if need_B else None
        return dx, dweight, dbias, dA, dB, None, None, None


def with_change(base_layer, x, weight, bias, change, save_inputs):
    """conv([x, x], [W, D]) + bias: base product and change D [N, Cin, kh, kw] meet before the only rounding.

    Args:
        x, weight, bias: in one half-precision dtype; change: float32.
        save_inputs: as in `one_accumulator`.
    """
    x, padding = _padded(base_layer, x)
    batched = x if x.dim() == 4 else x[None]
    convolve = WithChange.apply if save_inputs else _with_change
    y = convolve(batched, weight, bias, change, base_layer.stride, padding, base_layer.dilation)
    return y if x.dim() == 4 else y[0]


def _with_change(x, weight, bias, change, stride, padding, dilation):
    kernel = torch.cat((weight, change.to(weight.dtype)), 1)
    return F.conv2d(torch.cat((x, x), 1), kernel, bias, stride, padding, dilation)


class WithChange(torch.autograd.Function):
    """Forward in one accumulator; backward of conv(x, W + D) with W + D rounded once. Saves x, W and D."""

    @staticmethod
    def forward(ctx, x, weight, bias, change, stride, padding, dilation):
        ctx.save_for_backward(x, weight, change)
        ctx.geometry = stride, padding, dilation
        return _with_change(x, weight, bias, change, stride, padding, dilation)

    @staticmethod
    def backward(ctx, dy):
        x, weight, change = ctx.saved_tensors
        need_x, need_weight, need_bias, need_change = ctx.needs_input_grad[:4]
        kernel = (weight.to(change.dtype) + change).to(weight.dtype)
        mask = need_x, need_weight or need_change, need_bias
        dx, dkernel, dbias = _backward(dy, x, kernel, ctx.geometry, mask)
        dweight = dkernel if need_weight else None
        dchange = dkernel.to(change.dtype) if need_change else None
        return dx, dweight, dbias, dchange, None, None, None


def _backward(dy, x, weight, geometry, mask):
    if not any(mask):
        return None, None, None
    stride, padding, dilation = geometry
    zeros = (0, 0)
    return torch.ops.aten.convolution_backward(
        dy, x, weight, [weight.shape[0]], stride, padding, dilation, False, zeros, 1, mask
    )
