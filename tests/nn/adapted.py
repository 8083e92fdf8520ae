"""Layers for the tests of `peftkern.nn`, and the explicit formula in float64 that judges them."""

import copy

import oracle
import torch
from torch import nn
from torch.func import functional_call

from peftkern.nn import HRAConv2d, HRALinear

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALF = (torch.bfloat16, torch.float16)


def hra_linear(features=(24, 16), dtype=torch.float32, r=4, bias=True, u_dtype=None, **options):
    """An HRALinear with random reflections; u in float32 (float64 over a float64 base) unless u_dtype is given."""
    return _random(HRALinear(nn.Linear(*features, bias=bias, dtype=dtype), r, **options), u_dtype)


def hra_conv(dtype=torch.float32, r=4, channels=(3, 5), kernel=(3, 2), u_dtype=None, bias=True, layer=None, **geometry):
    """An HRAConv2d with random reflections; `layer` holds the options of the adapter, `geometry` those of nn.Conv2d."""
    base = nn.Conv2d(*channels, kernel, bias=bias, dtype=dtype, **geometry)
    return _random(HRAConv2d(base, r, **(layer or {})), u_dtype)


def _random(layer, u_dtype):
    with torch.no_grad():
        layer.hra_u.normal_()
    if u_dtype is not None:
        layer.hra_u.data = layer.hra_u.data.to(u_dtype)
    return layer


def rotation(u, apply_gs=False):
    return oracle.gram_schmidt_chain(u) if apply_gs else oracle.chain(u)


def truth(layer, x, u=None, weight=None, bias=None):
    """base_layer with the weight W H, everything in float64; differentiable in what is given."""
    base = copy.deepcopy(layer.base_layer).double()
    u = layer.hra_u.detach() if u is None else u
    weight = layer.base_layer.weight.detach() if weight is None else weight
    bias = layer.base_layer.bias if bias is None else bias
    rows = weight.double().flatten(1) @ rotation(u, layer.apply_gs)
    tensors = {"weight": rows.view(weight.shape)}
    if bias is not None:
        tensors["bias"] = bias.double()
    return functional_call(base, tensors, (x.double(),))


def gradients(layer, x, dy):
    """y and the gradients of <y, dy> in x and u through the layer."""
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    return y.detach(), *torch.autograd.grad(y, (x, layer.hra_u), dy.to(y.dtype))


def true_gradients(layer, x, dy):
    """The same in float64 by the explicit formula."""
    x, u = x.detach().double().requires_grad_(), layer.hra_u.detach().double().requires_grad_()
    y = truth(layer, x, u)
    return y.detach(), *torch.autograd.grad(y, (x, u), dy.double())


def small_update(layer, x, size):
    """Move neighbouring columns of u so close that the layer changes its base's output by `size`.

    Returns (y0, D) in float64: the base's output and the update, for x and W as they are.
    """
    half = torch.randn(layer.hra_u.shape[0], layer.hra_u.shape[1] // 2)
    noise = torch.randn(layer.hra_u.shape)
    base = truth(layer, x, torch.zeros_like(layer.hra_u))
    gap = 1e-3
    for _ in range(3):
        with torch.no_grad():
            layer.hra_u.copy_(half.repeat_interleave(2, 1) + gap * noise)
        update = truth(layer, x) - base
        gap *= size * (base.norm() / update.norm()).item()
    return base, update


def gain(y, base, update):
    """How much of the update arrived, <y - y0, D> / <D, D>."""
    return ((y.double() - base) * update).sum().div(update.square().sum()).item()
