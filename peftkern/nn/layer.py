"""What the adapter layers share: the base layer, switching, merging in place, PEFT's names of the parameters."""

import torch
from torch import nn

from peftkern.ops import householder as hh


class Packed(nn.Module):
    """A parameter under PEFT's name `<name>.weight`."""

    def __init__(self, *shape, dtype, device):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*shape, dtype=dtype, device=device))

    def extra_repr(self):
        return f"{list(self.weight.shape)}"


class AdapterLayer(nn.Module):
    """An adapter around a frozen base layer. A method gives `_base_type`, `_serve` and `_rotated`."""

    _base_type = None

    def __init__(self, precision):
        super().__init__()
        self.precision, self.enabled, self.merged = precision, True, False

    def _attach(self, base_layer):
        """Draw the parameters, which now exist, and freeze the base layer."""
        self.reset_parameters()
        self.base_layer = base_layer.requires_grad_(False)

    @staticmethod
    def _place(base_layer):
        """dtype and device of the adapter's parameters."""
        weight = base_layer.weight
        dtype = torch.float64 if weight.dtype is torch.float64 else torch.float32
        return {"dtype": dtype, "device": weight.device}

    @classmethod
    def _check_base(cls, base_layer, precision):
        if not isinstance(base_layer, cls._base_type):
            wanted = f"base_layer must be a {cls._base_type.__name__}"
            raise TypeError(f"{cls.__name__}: {wanted}; got {type(base_layer).__name__}")
        if getattr(base_layer, "groups", 1) > 1:
            groups = base_layer.groups
            raise ValueError(f"{cls.__name__}: groups must be 1; got a convolution with groups = {groups}")
        hh.check_precision(precision)

    @staticmethod
    def _features(base_layer):
        """The length of what is rotated."""
        if isinstance(base_layer, nn.Conv2d):
            return base_layer.in_channels * base_layer.kernel_size[0] * base_layer.kernel_size[1]
        return base_layer.embedding_dim if isinstance(base_layer, nn.Embedding) else base_layer.in_features

    def adapter_parameters(self):
        """PEFT's name within the layer -> parameter."""
        return {name: p for name, p in self.named_parameters() if not name.startswith("base_layer.")}

    def _describe(self):
        """The options of the method, for repr."""
        return ""

    def extra_repr(self):
        state = "merged" if self.merged else "enabled" if self.enabled else "disabled"
        return f"{self._describe()}, precision={self.precision!r}, {state}"

    def forward(self, x, *args, **kwargs):
        """y in the dtype of x, under autocast too, as PEFT's layer has it."""
        if self.merged or not self.enabled:
            y = self.base_layer(x, *args, **kwargs)
        else:
            y = self._serve(x, args, kwargs)
        return y if y.dtype is x.dtype or not x.is_floating_point() else y.to(x.dtype)

    def enable(self):
        """Apply the adapter (the state after construction)."""
        self.enabled = True

    def disable(self):
        """Pass through the base layer alone. Raises RuntimeError while merged: unmerge first."""
        if self.merged:
            raise RuntimeError(f"{type(self).__name__}: the adapter is merged into the weight; unmerge() it first")
        self.enabled = False

    @torch.no_grad()
    def _rotate_weight(self, inverse):
        weight = self.base_layer._parameters.get("weight")
        if weight is None or type(weight) is not nn.Parameter or not weight.is_floating_point():
            raise TypeError(
                f"{type(self).__name__}: merging needs a plain floating weight; {type(self.base_layer).__name__} holds "
                f"{type(getattr(self.base_layer, 'weight', None)).__name__}"
            )
        dtype = torch.float64 if weight.dtype is torch.float64 else torch.float32
        rotated = self._rotated(weight.flatten(1), dtype, inverse).view_as(weight).to(weight.dtype)
        if not torch.isfinite(rotated).all():
            raise ValueError(f"{type(self).__name__}: the merged weight is not finite; nothing was changed")
        weight.copy_(rotated)

    def merge(self):
        """Rotate the weight in place; the forward is then the base layer's.

        Raises:
            TypeError: the weight is quantised, sharded or parametrised. ValueError: the merged weight is not finite.
            RuntimeError: disabled. Nothing is changed then.
        """
        if not self.merged:
            if not self.enabled:
                raise RuntimeError(f"{type(self).__name__}: the adapter is disabled; enable() it before merging")
            self._rotate_weight(inverse=False)
            self.merged = True

    def unmerge(self):
        """Rotate the weight back in place: the inverse rotation, not a stored copy."""
        if self.merged:
            self._rotate_weight(inverse=True)
            self.merged = False
