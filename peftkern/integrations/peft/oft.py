"""PEFT's OFT classes with another hot path.

The activations are rotated block by block by `peftkern.nn.rotation`; merging and unmerging rotate the weight block by
block, with the blocks' own inverses. What PEFT gets wrong is right here unless compat="peft": convolutions, whose
forward sums overlapping patches, and adapters from before PEFT 0.18, whose polynomial had other coefficients.
"""

import warnings

import torch
from packaging.version import InvalidVersion, Version
from peft import OFTConfig
from peft.tuners.oft import OFTModel as PeftModel
from peft.tuners.oft import layer as peft_layer
from peft.tuners.tuners_utils import check_adapters_to_merge

from peftkern.integrations.peft import layer as shared
from peftkern.integrations.peft.layer import is_quantised, odd_parameter, patch_size, short_list
from peftkern.nn import rotation
from peftkern.ops import block_rotation as br

METHOD, NAME = "oft", "OFT"
PeftLayer = peft_layer.OFTLayer
DEVIATION = "sums {what} of {names}, its merged weight does not"
# The polynomial of PEFT 0.16 and 0.17 had 2 for its last coefficient too.
_FIRST_VERSION = Version("0.18.0")


def peft_ignores(base_layer):
    """What PEFT's forward of a convolution computes otherwise than its merged weight: a list of words."""
    if isinstance(base_layer, torch.nn.Conv2d) and base_layer.kernel_size != (1, 1):
        return ["the rotated patches where they overlap"]
    return []


def is_legacy(config):
    """Whether an adapter was trained with the polynomial of PEFT before 0.18, by the version its config records."""
    try:
        version = Version((getattr(config, "peft_version", None) or "").partition("@")[0])
    except InvalidVersion:
        return False
    return version < _FIRST_VERSION and bool(getattr(config, "use_cayley_neumann", False))


class Accelerated(shared.Accelerated):
    """What the accelerated OFT layers share."""

    _method, _container = METHOD, "oft_R"
    # Names of the adapters whose polynomial is that of PEFT before 0.18.
    peftkern_legacy = frozenset()

    def adapter_tensors(self):
        return tensors(self)

    def read_configs(self, configs):
        known = {name for name in self._adapters if is_legacy(configs.get(name))}
        self.peftkern_legacy = frozenset() if self.peftkern_compat == "peft" else frozenset(known)

    def _options(self, name):
        module = self._adapters[name]
        terms = module.num_cayley_neumann_terms if module.use_cayley_neumann else None
        return terms, name in self.peftkern_legacy

    def _packed(self, name):
        """The parameter, after the projection that COFT makes in every forward."""
        module = self._adapters[name]
        if not module.coft:
            return module.weight
        br.constrain_(module.weight, module.eps)
        # A later forward projects in place: backward keeps its own copy.
        return module.weight.clone() if torch.is_grad_enabled() else module.weight

    def _chain(self, names):
        return [(self._packed(name), self._options(name)) for name in names]

    def _blocks(self, name, dtype):
        return br.rotation_blocks(self._packed(name), *self._options(name), dtype=dtype)

    @torch.no_grad()
    def get_delta_weight(self, adapter):
        """The dense block-diagonal R [K, K] in the adapter's dtype."""
        q = self._adapters[adapter].weight
        dtype = torch.float64 if q.dtype is torch.float64 else torch.float32
        eye = torch.eye(patch_size(self.get_base_layer()), dtype=dtype, device=q.device)
        return br.rotate_blocks(eye, self._blocks(adapter, dtype)).to(q.dtype)

    def merge(self, safe_merge=False, adapter_names=None):
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self._adapters:
                self._multiply_weight(name, False, safe_merge)
                self.merged_adapters.append(name)

    def unmerge(self):
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.")
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self._adapters:
                self._multiply_weight(name, True, False)

    @torch.no_grad()
    def _multiply_weight(self, name, inverse, check_finite):
        """W <- W R^T over the rows of the base weight, or with the inverse blocks."""
        shared.unpack(self.get_base_layer())
        weight = self.get_base_weight()
        wide = torch.float64 in (weight.dtype, self._adapters[name].weight.dtype)
        dtype = torch.float64 if wide else torch.float32
        R = self._blocks(name, dtype)
        R = br.inverse_blocks(R) if inverse else R
        rotated = self._rotated(weight.flatten(1).to(dtype), R).view(weight.shape)
        if check_finite and not torch.isfinite(rotated).all():
            raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        if self.quantization_backend is not None:
            self.set_base_weight(rotated.contiguous().to(weight.dtype))
        elif check_finite:
            self.set_base_weight(torch.empty_like(weight).copy_(rotated))
        else:
            weight.copy_(rotated)

    def _rotated(self, rows, R):
        return br.rotate_blocks(rows, R, transpose=True)


class Linear(Accelerated, peft_layer.Linear):
    __doc__ = peft_layer.Linear.__doc__
    _peft_class = peft_layer.Linear
    _base_class = torch.nn.Linear

    def _serve(self, x, names, args, kwargs):
        chain, cache = self._chain(names), self.peftkern_cache
        return rotation.adapted_linear(
            rotation.OFT, x, self.base_layer, chain, None, self.peftkern_precision, cache, args, kwargs
        )


class Conv2d(Accelerated, peft_layer.Conv2d):
    __doc__ = peft_layer.Conv2d.__doc__
    _peft_class = peft_layer.Conv2d
    _base_class = torch.nn.Conv2d

    def _left_to_peft(self):
        reason = super()._left_to_peft()
        if reason is None and self.peftkern_compat == "peft" and peft_ignores(self.get_base_layer()):
            return 'compat="peft"'
        return reason

    def _serve(self, x, names, args, kwargs):
        chain, cache = self._chain(names), self.peftkern_cache
        return rotation.adapted_conv2d(
            rotation.OFT, x, self.base_layer, chain, None, self.peftkern_precision, cache, args, kwargs
        )


class Embedding(Accelerated, peft_layer.Embedding):
    __doc__ = peft_layer.Embedding.__doc__
    _container = "oft_embedding_R"
    _peft_class = peft_layer.Embedding
    _base_class = torch.nn.Embedding

    def _serve(self, x, names, args, kwargs):
        chain = self._chain(names)
        return rotation.adapted_embedding(rotation.OFT, x, self.base_layer, chain, self.peftkern_cache, args, kwargs)

    def _as_peft(self, result, x):
        return result

    def _rotated(self, rows, R):
        """The rows of an embedding are what is rotated: W <- W R."""
        return br.rotate_blocks(rows, R)


ACCELERATED = {peft_layer.Linear: Linear, peft_layer.Conv2d: Conv2d, peft_layer.Embedding: Embedding}


def adapters_of(layer):
    return layer.oft_embedding_R if isinstance(layer, peft_layer.Embedding) else layer.oft_R


def tensors(layer):
    """(adapter, name, key in the layer's state_dict, tensor) of every adapter parameter."""
    held = "oft_embedding_R" if isinstance(layer, peft_layer.Embedding) else "oft_R"
    return [(name, held, f"{held}.{name}.weight", module.weight) for name, module in adapters_of(layer).items()]


def build(config, adapter_name, target, **kwargs):
    return PeftModel._create_new_module(config, adapter_name, target, **kwargs)


def why_not(layer):
    """Why one of PEFT's own OFT layers cannot be accelerated, or None."""
    base_layer = layer.get_base_layer()
    if isinstance(base_layer, torch.nn.Conv2d):
        if is_quantised(base_layer):
            return "a quantised convolution has no readable weight"
        if base_layer.groups > 1:
            return f"a convolution with groups = {base_layer.groups}, whose weight cannot be merged either"
    size = patch_size(base_layer)
    for module in adapters_of(layer).values():
        if type(module) is not peft_layer.OFTRotationModule or "forward" in module.__dict__:
            return f"its rotation is a {type(module).__name__} that is not PEFT's own"
        q, b = module.weight, module.block_size
        blocks = 1 if module.block_share else size // b
        if size % b or q.shape != (blocks, b * (b - 1) // 2):
            square = " (PEFT supports square kernels only)" if isinstance(base_layer, torch.nn.Conv2d) else ""
            return f"oft_R has shape {list(q.shape)} for blocks of {b}, the base layer needs {size} inputs{square}"
        if odd_parameter("oft_R", q) is not None:
            return odd_parameter("oft_R", q)
    return None


def served(layer):
    """(precision, reason): what serves the products of an accelerated layer, and why it is not `exact`."""
    if layer.peftkern_precision != "exact":
        return "fast", ""
    if isinstance(layer, Embedding):
        return "fast", "a row of an embedding is rounded once in any case"
    return shared.readable_exactly(layer)


def prepare(layer):
    """Give a layer that has just become an accelerated one what its class needs."""
    layer.peftkern_cache = rotation.OFTCache()


def release(layer):
    """Whether PEFT's class can serve a layer again."""
    return True


def complete(layer, swap, adapter_name, config, kwargs):
    """A layer that the tuner has just built needs nothing more."""


def check_merge(layers):
    """PEFT's quantisation backends merge, or refuse."""


def warn(layers, adapter_name=None):
    """Say once which layers the polynomial has left the rotations, and which take the one of PEFT before 0.18."""
    diverged, legacy = [], set()
    for name, layer in layers:
        for adapter, module in layer._adapters.items():
            if adapter_name not in (None, adapter):
                continue
            if adapter in layer.peftkern_legacy:
                legacy.add(adapter)
            if module.use_cayley_neumann and _norm(module.weight) >= 1:
                diverged.append(name)
    if diverged:
        warnings.warn(
            f"peftkern: |Q| reaches 1 in {short_list(list(dict.fromkeys(diverged)))}, where the Cayley-Neumann "
            f"polynomial diverges and R is far from a rotation. peftkern computes what PEFT computes; train with "
            f"use_cayley_neumann=False, or with a smaller learning rate"
        )
    if legacy:
        warnings.warn(
            f"peftkern: the configuration of {', '.join(map(repr, sorted(legacy)))} is from PEFT before 0.18, whose "
            f"polynomial had another last coefficient; that one is used. PEFT 0.18 and later compute other numbers, "
            f'which accelerate(model, compat="peft") keeps'
        )


def _norm(q):
    """max |Q_i|_2, exact where it can matter: the Frobenius norm bounds it."""
    if q.is_meta or q.numel() == 0 or 2**0.5 * float(q.detach().norm(dim=1).max()) < 1:
        return 0.0
    return float(br.skew_norm(q))


_check_kwargs = OFTConfig.__dict__.get("check_kwargs")


def keep_missing_version():
    """Let configurations that record no version keep that: PEFT would write its own into them as it loads them."""

    def check_kwargs(cls, **kwargs):
        checked = _check_kwargs.__func__(cls, **kwargs)
        if kwargs.get("peft_version") is None:
            checked["peft_version"] = "0.17.0"
        return checked

    OFTConfig.check_kwargs = classmethod(check_kwargs)


def forget_missing_version():
    OFTConfig.check_kwargs = _check_kwargs
