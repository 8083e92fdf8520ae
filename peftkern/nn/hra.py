"""HRA layers that need no PEFT: wrap any nn.Linear or nn.Conv2d. Parameter name and layout are PEFT's (`hra_u`)."""

import math
import warnings

import torch
from torch import nn

from peftkern.nn.forward import FactorCache, adapted_conv2d, adapted_linear, readable_weight
from peftkern.nn.layer import AdapterLayer
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


class _HRALayer(AdapterLayer):
    """Shared by the layers: the parameter, and the rotation of the weight's rows."""

    _adapted = None

    def __init__(self, base_layer, r=8, apply_gs=False, init_weights=True, precision="auto"):
        self.check(base_layer, r, precision=precision)
        super().__init__(precision)
        self.apply_gs, self.init_weights = apply_gs, init_weights
        self.hra_u = nn.Parameter(torch.empty(self._features(base_layer), r, **self._place(base_layer)))
        self._attach(base_layer)
        self._cache = FactorCache()

    @classmethod
    def check(cls, base_layer, r=8, apply_gs=False, init_weights=True, precision="auto"):
        """Raise what the constructor raises for these arguments."""
        cls._check_base(base_layer, precision)
        if not isinstance(r, int) or isinstance(r, bool) or r < 1:
            raise ValueError(f"{cls.__name__}: r must be an integer of at least 1; got {r!r}")

    def reset_parameters(self):
        """Draw `hra_u` again: after to_empty() of a layer that was built on the meta device."""
        if self.hra_u.device.type != "meta":
            init_hra_(self.hra_u, self.apply_gs, self.init_weights)

    def _describe(self):
        return f"r={self.hra_u.shape[1]}, apply_gs={self.apply_gs}"

    def _serve(self, x, args, kwargs):
        # Past nn.Module's __getattr__, which counts where a token goes through a narrow layer.
        u = self._parameters.get("hra_u")
        chain = [(self.hra_u if u is None else u, self.apply_gs)]
        return self._adapted(x, self._modules["base_layer"], chain, self.precision, self._cache, args, kwargs)

    def _rotated(self, rows, dtype, inverse):
        """W H, or W H^T."""
        V, T = hh.factor(self.hra_u, dtype, self.apply_gs)
        return hh.apply_factor(rows, V, T, not inverse)


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


class HRAConv2d(_HRALayer):
    """The same around nn.Conv2d: H acts on the Cin kh kw inputs of a patch; stride, dilation, padding as the base.

    Raises:
        TypeError: not an nn.Conv2d. ValueError: groups > 1, r < 1, or a precision that does not exist.
    """

    _base_type = nn.Conv2d
    _adapted = staticmethod(adapted_conv2d)


__all__ = ["HRAConv2d", "HRALinear", "init_hra_", "readable_weight"]
