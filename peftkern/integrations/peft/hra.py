"""PEFT's HRA classes with another hot path.

Each class here is a subclass of PEFT's class of the same name (so repr, isinstance and `adapter_layer_names` are
PEFT's) and overrides the forward, the reflection matrix that merging uses, and what PEFT gets wrong: merging into a
quantised base layer, and convolutions that are not square. All state stays where PEFT keeps it.
"""

import warnings

import torch
from peft.tuners.hra import HRAModel as PeftModel
from peft.tuners.hra import layer as peft_layer
from peft.tuners.tuners_utils import check_adapters_to_merge

from peftkern.integrations.peft import layer as shared
from peftkern.integrations.peft.layer import is_quantised, odd_parameter, patch_size, short_list
from peftkern.nn.forward import FactorCache, adapted_conv2d, adapted_linear
from peftkern.ops import householder as hh

METHOD, NAME = "hra", "HRA"
PeftLayer = peft_layer.HRALayer


def merge_refusal(layer_name, base_layer):
    return (
        f"{layer_name}: HRA cannot be merged into a quantised base layer ({type(base_layer).__name__}); keep the "
        f"adapter unmerged, or merge it into an unquantised copy of the base model (nothing was changed)"
    )


class Accelerated(shared.Accelerated):
    """What the accelerated HRA layers share."""

    _method, _container = METHOD, "hra_u"
    _adapted = None

    def adapter_tensors(self):
        return tensors(self)

    def _serve(self, x, names, args, kwargs):
        chain = [(self.hra_u[name], self.hra_apply_GS[name]) for name in names]
        precision, cache = self.peftkern_precision, self.peftkern_cache
        return type(self)._adapted(x, self.base_layer, chain, precision, cache, args, kwargs)

    def _base_alone(self, x, *args, **kwargs):
        """PEFT multiplies the weight by the identity here; only another dtype of x makes that differ from the base."""
        weight = self.base_layer.weight
        if (
            weight.dtype is x.dtype
            or not self.cast_input_dtype_enabled
            or is_quantised(self.base_layer)
            or torch.is_autocast_enabled(x.device.type)
        ):
            return self.base_layer(x, *args, **kwargs)
        return self._peft_class.forward(self, x, *args, **kwargs)

    def get_delta_weight(self, adapter_name, reverse=False):
        """H = H_1 ... H_r [K, K] in the adapter's dtype, its transpose if reversed; W H is the merged weight."""
        u = self.hra_u[adapter_name]
        dtype = torch.float64 if u.dtype is torch.float64 else torch.float32
        V, T = hh.factor(u, dtype, self.hra_apply_GS[adapter_name])
        eye = torch.eye(u.shape[0], dtype=dtype, device=u.device)
        return hh.apply_factor(eye, V, T, reverse=not reverse).to(u.dtype)

    def merge(self, safe_merge=False, adapter_names=None):
        if is_quantised(self.get_base_layer()):
            raise ValueError(merge_refusal(type(self).__name__, self.get_base_layer()))
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)


class HRALinear(Accelerated, peft_layer.HRALinear):
    __doc__ = peft_layer.HRALinear.__doc__
    _peft_class = peft_layer.HRALinear
    _base_class = torch.nn.Linear
    _adapted = staticmethod(adapted_linear)


class _Conv2dMerge(peft_layer.HRAConv2d):
    """PEFT's merge and unmerge, for kernels that are not square and weights that are not contiguous as well."""

    def merge(self, safe_merge=False, adapter_names=None):
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.hra_u:
                self._multiply_weight(name, False, safe_merge)
                self.merged_adapters.append(name)

    def unmerge(self):
        if not self.merged:
            super().unmerge()
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self.hra_u:
                self._multiply_weight(name, True, False)

    def _multiply_weight(self, name, reverse, check_finite):
        weight = self.get_base_layer().weight
        delta = self.get_delta_weight(name, reverse=reverse)
        product = (weight.data.flatten(1).to(delta.dtype) @ delta).view(weight.shape)
        if check_finite and not torch.isfinite(product).all():
            raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        weight.data = torch.empty_like(weight.data).copy_(product)


class HRAConv2d(Accelerated, _Conv2dMerge):
    __doc__ = peft_layer.HRAConv2d.__doc__
    _peft_class = peft_layer.HRAConv2d
    _base_class = torch.nn.Conv2d
    _adapted = staticmethod(adapted_conv2d)

    def _left_to_peft(self):
        reason = super()._left_to_peft()
        if reason is None and self.peftkern_compat == "peft" and peft_ignores(self.get_base_layer()):
            return 'compat="peft"'
        return reason

    def reset_hra_parameters(self, adapter_name):
        self._size_for_kernel(adapter_name)
        super().reset_hra_parameters(adapter_name)

    def reset_hra_parameters_random(self, adapter_name):
        self._size_for_kernel(adapter_name)
        super().reset_hra_parameters_random(adapter_name)

    def _size_for_kernel(self, adapter_name):
        """PEFT sizes hra_u by the kernel's height alone; a kernel that is not square has Cin kh kw inputs."""
        rows = patch_size(self.get_base_layer())
        if self.hra_u[adapter_name].shape[0] != rows:
            self.hra_u[adapter_name] = torch.nn.Parameter(torch.empty(rows, self.hra_r[adapter_name]))


peft_ignores = shared.ignored_geometry
DEVIATION = "ignores {what} of {names}, its merged weight does not"


ACCELERATED = {peft_layer.HRALinear: HRALinear, peft_layer.HRAConv2d: HRAConv2d}


def adapters_of(layer):
    return layer.hra_u


def tensors(layer):
    """(adapter, name, key in the layer's state_dict, tensor) of every adapter parameter."""
    return [(name, "hra_u", f"hra_u.{name}", u) for name, u in layer.hra_u.items()]


def build(config, adapter_name, target, **kwargs):
    return PeftModel._create_new_module(config, adapter_name, target, **kwargs)


def why_not(layer):
    """Why one of PEFT's own HRA layers cannot be accelerated, or None."""
    base_layer = layer.get_base_layer()
    if isinstance(base_layer, torch.nn.Conv2d) and is_quantised(base_layer):
        return "a quantised convolution has no readable weight"
    for u in layer.hra_u.values():
        if u.dim() != 2 or u.shape[0] != patch_size(base_layer):
            square = "" if isinstance(base_layer, torch.nn.Linear) else " (PEFT supports square kernels only)"
            return f"hra_u has shape {list(u.shape)}, the base layer needs {patch_size(base_layer)} rows{square}"
        if odd_parameter("hra_u", u) is not None:
            return odd_parameter("hra_u", u)
    return None


def served(layer):
    """(precision, reason): what serves the products of an accelerated layer, and why it is not `exact`."""
    return ("fast", "") if layer.peftkern_precision == "fast" else shared.readable_exactly(layer)


def prepare(layer):
    """Give a layer that has just become an accelerated one what its class needs."""
    layer.peftkern_cache = FactorCache()


def release(layer):
    """Take that away again before the layer becomes PEFT's; False if PEFT's class cannot serve it."""
    return len(set(getattr(layer.get_base_layer(), "kernel_size", ()))) < 2


def complete(layer, swap, adapter_name, config, kwargs):
    """Finish a layer that the tuner has just built: a kernel that is not square needs parameters of another size."""
    if type(layer) is HRAConv2d._peft_class and len(set(layer.get_base_layer().kernel_size)) > 1:
        swap()
        layer.update_layer(adapter_name, config=config, **kwargs)


def check_merge(layers):
    for name, layer in layers:
        if is_quantised(layer.get_base_layer()):
            raise ValueError(merge_refusal(name, layer.get_base_layer()))


def has_dependent_columns(u):
    """Whether Gram-Schmidt drops a column of u that is not zero."""
    T = hh.factor(u.detach(), torch.float64, gram_schmidt=True)[1]
    return bool(((T.diagonal() == 0) & (u.detach() != 0).any(0)).any())


def warn(layers, adapter_name=None):
    """Say once that apply_GS meets dependent columns: PEFT's default initialisation duplicates every column."""
    names = [
        name
        for name, layer in layers
        if any(
            gs and not layer.hra_u[a].is_meta and has_dependent_columns(layer.hra_u[a])
            for a, gs in layer.hra_apply_GS.items()
            if a in layer.hra_u and adapter_name in (None, a)
        )
    ]
    if names:
        warnings.warn(
            f"peftkern: apply_GS meets linearly dependent columns of hra_u in {short_list(names)}. PEFT's default "
            f"initialisation makes them and then divides rounding noise by its norm: NaN or random reflections. "
            f"peftkern drops the dependent columns; use init_weights=False in HRAConfig"
        )
