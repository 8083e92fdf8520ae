"""BOFT layers that need no PEFT: wrap any nn.Linear or nn.Conv2d. Names and layout are PEFT's (`boft_R`, `boft_s`)."""

import torch
from torch import nn

from peftkern.nn import rotation
from peftkern.nn.layer import AdapterLayer
from peftkern.ops import butterfly as bf


class _BOFTLayer(AdapterLayer):
    """Shared by the layers: blocks of f stages, the output scale, and the rotation of the weight's rows by them."""

    def __init__(
        self, base_layer, block_size=4, n_butterfly_factor=1, dropout=0.0, init_weights=True, precision="auto"
    ):
        self.check(base_layer, block_size, n_butterfly_factor, dropout, init_weights, precision)
        super().__init__(precision)
        self.dropout, self.init_weights = dropout, init_weights
        place, blocks = self._place(base_layer), self._features(base_layer) // block_size
        self.boft_R = nn.Parameter(torch.empty(n_butterfly_factor, blocks, block_size, block_size, **place))
        self.boft_s = nn.Parameter(torch.empty(*self._scale_shape(base_layer), **place))
        self._attach(base_layer)
        self._cache = rotation.BOFTCache()

    @classmethod
    def check(cls, base_layer, block_size=4, n_butterfly_factor=1, dropout=0.0, init_weights=True, precision="auto"):
        """Raise what the constructor raises for these arguments."""
        cls._check_base(base_layer, precision)
        for name, value in (("block_size", block_size), ("n_butterfly_factor", n_butterfly_factor)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{cls.__name__}: {name} must be an integer of at least 1; got {value!r}")
        bf.check_sizes(cls.__name__, cls._features(base_layer), block_size, n_butterfly_factor)
        if not 0 <= dropout <= 1:
            raise ValueError(f"{cls.__name__}: dropout must be a fraction from 0 to 1; got {dropout!r}")

    def reset_parameters(self):
        """Draw the parameters again: the identity and scales of 1, or PEFT's normal numbers of deviation 0.1."""
        if self.boft_R.device.type == "meta":
            return
        if self.init_weights:
            nn.init.zeros_(self.boft_R)
            nn.init.ones_(self.boft_s)
        else:
            nn.init.normal_(self.boft_R, std=0.1)
            nn.init.normal_(self.boft_s, mean=1.0, std=0.1)

    def _describe(self):
        f, _, b, _ = self.boft_R.shape
        dropout = f", dropout={self.dropout}" if self.dropout else ""
        return f"block_size={b}, n_butterfly_factor={f}{dropout}"

    def _chain(self):
        return [(self.boft_R, self.dropout if self.training else 0.0)]

    def _rotated(self, rows, dtype, inverse):
        """s W R^T, or (W / s) R."""
        R, s = bf.butterfly_blocks(self.boft_R, dtype), self.boft_s.reshape(-1, 1).to(dtype)
        rows = rows.to(dtype)
        return bf.butterfly_rotate(rows / s, R) if inverse else bf.butterfly_rotate(rows, R, transpose=True) * s


class BOFTLinear(_BOFTLayer):
    """y = s (x R) W^T + b around any nn.Linear, quantised ones included; R a butterfly of f block-diagonal factors.

    Args:
        base_layer: nn.Linear; its parameters are frozen.
        block_size, n_butterfly_factor: b and f; b 2^(f-1) must divide the inputs.
        dropout: the fraction of blocks that one random factor drops (becomes the identity) in training.
        init_weights: True starts from the identity; False draws.
        precision: "auto" and "fast" round the rotated x or weight once, "exact" neither; see `peftkern.boft_linear`.

    Raises:
        TypeError: not an nn.Linear. ValueError: sizes that do not divide, dropout outside 0 to 1, no such precision.

    Source: arXiv:2311.06243.
    """

    _base_type = nn.Linear

    @staticmethod
    def _scale_shape(base_layer):
        return base_layer.out_features, 1

    def _serve(self, x, args, kwargs):
        chain, cache = self._chain(), self._cache
        return rotation.adapted_linear(
            rotation.BOFT, x, self.base_layer, chain, self.boft_s, self.precision, cache, args, kwargs
        )


class BOFTConv2d(_BOFTLayer):
    """The same around nn.Conv2d: R acts on the Cin kh kw inputs of a patch, through the kernel s W R^T.

    Raises:
        TypeError: not an nn.Conv2d. ValueError: as BOFTLinear, or groups > 1.
    """

    _base_type = nn.Conv2d

    @staticmethod
    def _scale_shape(base_layer):
        return 1, base_layer.out_channels

    def _serve(self, x, args, kwargs):
        chain, cache = self._chain(), self._cache
        return rotation.adapted_conv2d(
            rotation.BOFT, x, self.base_layer, chain, self.boft_s, self.precision, cache, args, kwargs
        )


__all__ = ["BOFTConv2d", "BOFTLinear"]
