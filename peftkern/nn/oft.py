"""OFT layers that need no PEFT: wrap any nn.Linear, nn.Conv2d or nn.Embedding. Names and packing are PEFT's."""

import torch
from torch import nn

from peftkern.nn import rotation
from peftkern.nn.layer import AdapterLayer, Packed
from peftkern.ops import block_rotation as br


class _OFTLayer(AdapterLayer):
    """Shared by the layers: the packed skew matrices, and the rotation of the weight's rows by them."""

    _held = "oft_R"

    def __init__(
        self, base_layer, block_size=32, terms=5, block_share=False, coft_eps=None, init_weights=True, precision="auto"
    ):
        self.check(base_layer, block_size, terms, block_share, coft_eps, init_weights, precision)
        super().__init__(precision)
        self.block_size, self.terms, self.block_share = block_size, terms, block_share
        self.coft_eps, self.init_weights = coft_eps, init_weights
        blocks = 1 if block_share else self._features(base_layer) // block_size
        packed = Packed(blocks, block_size * (block_size - 1) // 2, **self._place(base_layer))
        setattr(self, self._held, packed)
        self._attach(base_layer)
        self._cache = rotation.OFTCache()

    @classmethod
    def check(
        cls,
        base_layer,
        block_size=32,
        terms=5,
        block_share=False,
        coft_eps=None,
        init_weights=True,
        precision="auto",
    ):
        """Raise what the constructor raises for these arguments."""
        cls._check_base(base_layer, precision)
        K = cls._features(base_layer)
        if not isinstance(block_size, int) or isinstance(block_size, bool) or block_size < 2 or K % block_size:
            raise ValueError(
                f"{cls.__name__}: block_size must be a divisor of the {K} inputs, at least 2; got {block_size!r}"
            )
        if terms is not None and (not isinstance(terms, int) or isinstance(terms, bool)):
            raise TypeError(f"{cls.__name__}: terms must be an integer, or None for the exact map; got {terms!r}")
        if coft_eps is not None and not coft_eps > 0:
            raise ValueError(f"{cls.__name__}: coft_eps must be a radius above 0, or None; got {coft_eps!r}")

    @property
    def _q(self):
        return getattr(self, self._held).weight

    def reset_parameters(self):
        """Draw the parameters again: zeros, so that R = I, or PEFT's normal numbers of deviation 0.1."""
        if self._q.device.type == "meta":
            return
        if self.init_weights:
            nn.init.zeros_(self._q)
        else:
            nn.init.normal_(self._q, std=0.1)

    def _describe(self):
        form = "exact" if self.terms is None else f"terms={self.terms}"
        shared = ", block_share=True" if self.block_share else ""
        coft = "" if self.coft_eps is None else f", coft_eps={self.coft_eps}"
        return f"block_size={self.block_size}, {form}{shared}{coft}"

    def _packed(self):
        """The parameter, after COFT's projection, which every forward makes as in PEFT."""
        q = self._q
        if self.coft_eps is None:
            return q
        br.constrain_(q, self.coft_eps)
        return q.clone() if torch.is_grad_enabled() else q

    def _chain(self):
        return [(self._packed(), (self.terms, False))]

    def _rotated(self, rows, dtype, inverse):
        """W R^T, or with the inverse blocks."""
        R = br.rotation_blocks(self._packed(), self.terms, dtype=dtype)
        return br.rotate_blocks(rows.to(dtype), br.inverse_blocks(R) if inverse else R, transpose=True)


class OFTLinear(_OFTLayer):
    """y = (x R) W^T + b around any nn.Linear, quantised ones included (the rotation needs no weight).

    Args:
        base_layer: nn.Linear; its parameters are frozen.
        block_size: b of the rotated blocks, a divisor of the inputs.
        terms: of the Cayley-Neumann polynomial, PEFT's `num_cayley_neumann_terms`; None for the exact Cayley map. An
            even number from 6 on, and the exact map, are better rotations than the default.
        block_share: one rotation for all blocks.
        coft_eps: radius of the constraint of COFT (PEFT's `coft=True`, `eps`), or None.
        init_weights: True starts from the identity; False draws.
        precision: "auto" and "fast" round the rotated x or weight once, "exact" neither; see `peftkern.oft_linear`.

    Raises:
        TypeError: not an nn.Linear. ValueError: a block size that does not divide, or no such precision.

    Source: arXiv:2306.07280, arXiv:2506.19847.
    """

    _base_type = nn.Linear

    def _serve(self, x, args, kwargs):
        chain, cache = self._chain(), self._cache
        return rotation.adapted_linear(
            rotation.OFT, x, self.base_layer, chain, None, self.precision, cache, args, kwargs
        )


class OFTConv2d(_OFTLayer):
    """The same around nn.Conv2d: R acts on the Cin kh kw inputs of a patch, through the kernel W R^T.

    PEFT's forward sums rotated patches where they overlap; this layer computes what PEFT's merged weight does.

    Raises:
        TypeError: not an nn.Conv2d. ValueError: as OFTLinear, or groups > 1.
    """

    _base_type = nn.Conv2d

    def _serve(self, x, args, kwargs):
        chain, cache = self._chain(), self._cache
        return rotation.adapted_conv2d(
            rotation.OFT, x, self.base_layer, chain, None, self.precision, cache, args, kwargs
        )


class OFTEmbedding(_OFTLayer):
    """The rows of an nn.Embedding, rotated after the look-up; the merged table is W R."""

    _base_type = nn.Embedding
    _held = "oft_embedding_R"

    def _serve(self, x, args, kwargs):
        chain = self._chain()
        return rotation.adapted_embedding(rotation.OFT, x, self.base_layer, chain, self._cache, args, kwargs)

    def _rotated(self, rows, dtype, inverse):
        R = br.rotation_blocks(self._packed(), self.terms, dtype=dtype)
        return br.rotate_blocks(rows.to(dtype), br.inverse_blocks(R) if inverse else R)


__all__ = ["OFTConv2d", "OFTEmbedding", "OFTLinear"]
