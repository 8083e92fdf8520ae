"""HRA layers that need no PEFT: wrap any nn.Linear or nn.Conv2d. Parameter name and layout are PEFT's (`hra_u`)."""

import math
import warnings

import torch
from torch import nn

from peftkern.nn.forward import FactorCache, adapted_conv2d, adapted_linear, readable_weight
from peftkern.ops import householder as hh


def init_hra_(u, apply_gs=False, init_weights=True):
    """Fill u [K, r] as PEFT does: equal neighbours, so that H = I, where r is even; else kaiming-uniform columns.

    Gram-Schmidt has no identity to start from and drops equal columns, so with `apply_gs` all columns are drawn.
    """
    r = u.shape[1]
    if init_weights and not apply_gs and r % 2:
        warnings.warn(f"HRA starts from the identity only when r is even; r = {r} starts from random reflections")
    pairs = init_weights and not apply_gs and r % 2 == 0
    # Drawn as float32 on the CPU, whatever the surroundings set, so that a seed gives one adapter everywhere.
    drawn = torch.empty(u.shape[0], r // 2 if pairs else r, dtype=torch.float32, device="cpu")
    nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))
    with torch.no_grad():
        u.copy_(drawn.repeat_interleave(2, dim=1) if pairs else drawn)
    return u


class _HRALayer(nn.Module):
    """Shared by the layers: the parameter, merging by the rotation of the weight's rows, enabling."""

    _base_type = None
    _adapted = None

    def __init__(self, base_layer, r=8, apply_gs=False, init_weights=True, precision="auto"):
        super().__init__()
        self.check(base_layer, r, precision)
        weight = base_layer.weight
        dtype = torch.float64 if weight.dtype is torch.float64 else torch.float32
        self.precision, self.apply_gs, self.init_weights = precision, apply_gs, init_weights
        self.enabled, self.merged = True, False
        self.hra_u = nn.Parameter(torch.empty(self._features(base_layer), r, dtype=dtype, device=weight.device))
        self.reset_parameters()
        self.base_layer = base_layer.requires_grad_(False)
        self._cache = FactorCache()

    @classmethod
    def check(cls, base_layer, r=8, precision="auto"):
        """Raise what the constructor raises for these arguments."""
        if not isinstance(base_layer, cls._base_type):
            wanted = f"base_layer must be a {cls._base_type.__name__}"
            raise TypeError(f"{cls.__name__}: {wanted}; got {type(base_layer).__name__}")
        if not isinstance(r, int) or isinstance(r, bool) or r < 1:
            raise ValueError(f"{cls.__name__}: r must be an integer of at least 1; got {r!r}")
        hh.check_precision(precision)

    def reset_parameters(self):
        """Draw `hra_u` again: after to_empty() of a layer that was built on the meta device."""
        if self.hra_u.device.type != "meta":
            init_hra_(self.hra_u, self.apply_gs, self.init_weights)

    def extra_repr(self):
        state = "merged" if self.merged else "enabled" if self.enabled else "disabled"
        return f"r={self.hra_u.shape[1]}, apply_gs={self.apply_gs}, precision={self.precision!r}, {state}"

    def forward(self, x, *args, **kwargs):
        """y in the dtype of x, under autocast too, as PEFT's layer has it."""
        if self.merged or not self.enabled:
            y = self.base_layer(x, *args, **kwargs)
        else:
            chain = [(self.hra_u, self.apply_gs)]
            y = type(self)._adapted(x, self.base_layer, chain, self.precision, self._cache, args, kwargs)
        return y if y.dtype is x.dtype else y.to(x.dtype)

    def enable(self):
        """Apply the adapter (the state after construction)."""
        self.enabled = True

    def disable(self):
        """Pass through the base layer alone. Raises RuntimeError while merged: unmerge first."""
        if self.merged:
            raise RuntimeError(f"{type(self).__name__}: the adapter is merged into the weight; unmerge() it first")
        self.enabled = False

    def _rotate_weight(self, reverse):
        weight = self.base_layer._parameters.get("weight")
        if weight is None or type(weight) is not nn.Parameter or not weight.is_floating_point():
            raise TypeError(
                f"{type(self).__name__}: merging needs a plain floating weight; {type(self.base_layer).__name__} holds "
                f"{type(getattr(self.base_layer, 'weight', None)).__name__}"
            )
        with torch.no_grad():
            rows = weight.flatten(1)
            V, T = hh.factor(self.hra_u, torch.float64 if rows.dtype is torch.float64 else torch.float32, self.apply_gs)
            rotated = hh.apply_factor(rows, V, T, reverse).view_as(weight)
            if not torch.isfinite(rotated).all():
                raise ValueError(f"{type(self).__name__}: the merged weight is not finite; nothing was changed")
            weight.copy_(rotated)

    def merge(self):
        """W <- W H in place; the forward is then the base layer's.

        Raises:
            TypeError: the weight is quantised, sharded or parametrised. ValueError: the merged weight is not finite.
            RuntimeError: disabled. Nothing is changed then.
        """
        if not self.merged:
            if not self.enabled:
                raise RuntimeError(f"{type(self).__name__}: the adapter is disabled; enable() it before merging")
            self._rotate_weight(reverse=True)
            self.merged = True

    def unmerge(self):
        """W <- W H^T in place: the inverse rotation, not a stored copy."""
        if self.merged:
            self._rotate_weight(reverse=False)
            self.merged = False


class HRALinear(_HRALayer):
    """y = x (W H)^T + b around any nn.Linear, quantised ones included (the rotation needs no weight).

    Args:
        base_layer: nn.Linear; its parameters are frozen.
        r: number of reflections, at least 1; even to start from the identity.
        apply_gs: orthonormalise the reflection vectors (HRA with lambda -> infinity).
        init_weights: PEFT's initialisation; False draws independent columns.
        precision: "auto", "fast" or "exact", see `peftkern.hra_linear`.

    Raises:
        TypeError: not an nn.Linear. ValueError: r < 1, or a precision that does not exist.

    Source: arXiv:2405.17484.
    """

    _base_type = nn.Linear
    _adapted = staticmethod(adapted_linear)

    @staticmethod
    def _features(base_layer):
        return base_layer.in_features


class HRAConv2d(_HRALayer):
    """The same around nn.Conv2d: H acts on the Cin kh kw inputs of a patch; stride, dilation, padding as the base.

    Raises:
        TypeError: not an nn.Conv2d. ValueError: groups > 1, r < 1, or a precision that does not exist.
    """

    _base_type = nn.Conv2d
    _adapted = staticmethod(adapted_conv2d)

    @classmethod
    def check(cls, base_layer, r=8, precision="auto"):
        super().check(base_layer, r, precision)
        if base_layer.groups > 1:
            raise ValueError(f"HRAConv2d: groups must be 1; got a convolution with groups = {base_layer.groups}")

    @staticmethod
    def _features(base_layer):
        return base_layer.in_channels * base_layer.kernel_size[0] * base_layer.kernel_size[1]


__all__ = ["HRAConv2d", "HRALinear", "init_hra_", "readable_weight"]
