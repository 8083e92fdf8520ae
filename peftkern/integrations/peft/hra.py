"""PEFT's HRA classes with another hot path.

Each class here is a subclass of PEFT's class of the same name (so repr, isinstance and `adapter_layer_names` are
PEFT's) and overrides the forward, the reflection matrix that merging uses, and what PEFT gets wrong: merging into a
quantised base layer, and convolutions that are not square. All state stays where PEFT keeps it.
"""

import torch
from peft.tuners.hra import layer as peft_layer
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge

from peftkern import dispatch
from peftkern.integrations.peft import counters
from peftkern.nn.forward import FactorCache, adapted_conv2d, adapted_linear, readable_weight
from peftkern.ops import householder as hh

METHOD = "hra"


def is_quantised(base_layer):
    """Whether the weight of a base layer is stored in a form that a product of matrices must not be written into."""
    weight = base_layer.weight
    if not weight.is_floating_point() or type(weight).__name__ in ("Params4bit", "Int8Params"):
        return True
    return type(weight).__module__.startswith("torchao")


def merge_refusal(layer_name, base_layer):
    return (
        f"{layer_name}: HRA cannot be merged into a quantised base layer ({type(base_layer).__name__}); keep the "
        f"adapter unmerged, or merge it into an unquantised copy of the base model (nothing was changed)"
    )


class Accelerated:
    """What the accelerated layers share. The attributes are set per instance by `accelerate`."""

    peftkern_precision = "auto"
    peftkern_compat = None
    peftkern_cache = None
    _peft_class = None
    _base_class = None
    _adapted = None

    def _left_to_peft(self):
        """Why this call takes PEFT's own forward, or None."""
        if self.disable_adapters:
            return "adapters disabled"
        if self.merged:
            return "adapters merged"
        if dispatch.DISABLED:
            return "PEFTKERN_DISABLE=1"
        return None

    def forward(self, x, *args, **kwargs):
        reason = self._left_to_peft()
        if reason is not None:
            counters.count(METHOD, reason)
            return super().forward(x, *args, **kwargs)
        previous_dtype = x.dtype
        chain = [(self.hra_u[name], self.hra_apply_GS[name]) for name in self.active_adapters if name in self.hra_u]
        if chain:
            counters.count(METHOD)
            precision, cache = self.peftkern_precision, self.peftkern_cache
            result = type(self)._adapted(x, self.base_layer, chain, precision, cache, args, kwargs)
        else:
            counters.count(METHOD, "no active adapter")
            result = self._base_alone(x, *args, **kwargs)
        return result.to(previous_dtype)

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
        return super().forward(x, *args, **kwargs)

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


def patch_size(base_layer):
    """The number of rows of hra_u: in_features, or Cin kh kw of a convolution."""
    if isinstance(base_layer, torch.nn.Conv2d):
        return base_layer.in_channels * base_layer.kernel_size[0] * base_layer.kernel_size[1]
    return base_layer.in_features


def peft_ignores(base_layer):
    """What of a convolution PEFT's forward ignores while its merged weight does not: a list of words."""
    if not isinstance(base_layer, torch.nn.Conv2d):
        return []
    ignored = []
    if base_layer.dilation != (1, 1):
        ignored.append("dilation")
    if base_layer.padding_mode != "zeros":
        ignored.append("padding_mode")
    if not isinstance(base_layer.padding, str) and len(set(base_layer.padding)) > 1:
        ignored.append("the second padding")
    if len(set(base_layer.stride)) > 1:
        ignored.append("the second stride")
    return ignored


ACCELERATED = {peft_layer.HRALinear: HRALinear, peft_layer.HRAConv2d: HRAConv2d}


def why_not(layer):
    """Why a tuner layer of PEFT stays PEFT's, or None if it can be (or is) accelerated."""
    if isinstance(layer, Accelerated):
        return None
    if not isinstance(layer, peft_layer.HRALayer):
        return f"{type(layer).__module__.split('.')[-2]}.{type(layer).__name__} is not covered"
    if type(layer) not in ACCELERATED:
        return f"its class, {type(layer).__name__}, is not PEFT's own (accelerate before wrapping)"
    if "forward" in layer.__dict__:
        return "its forward was replaced on the instance (accelerate before attaching hooks or offloading)"
    if isinstance(layer.base_layer, BaseTunerLayer):
        return f"it wraps another adapter layer ({type(layer.base_layer).__name__})"
    base_layer = layer.get_base_layer()
    if isinstance(base_layer, torch.nn.Conv2d) and is_quantised(base_layer):
        return "a quantised convolution has no readable weight"
    for u in layer.hra_u.values():
        if u.dim() != 2 or u.shape[0] != patch_size(base_layer):
            square = "" if isinstance(base_layer, torch.nn.Linear) else " (PEFT supports square kernels only)"
            return f"hra_u has shape {list(u.shape)}, the base layer needs {patch_size(base_layer)} rows{square}"
        if u.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            return f"hra_u is {u.dtype}"
        if type(u) is not torch.nn.Parameter:
            return f"hra_u is a {type(u).__name__}, not a plain parameter"
    return None


def served(layer):
    """(precision, reason): what serves the products of an accelerated layer, and why it is not `exact`."""
    base_layer = layer.get_base_layer()
    if layer.peftkern_precision == "fast":
        return "fast", ""
    if is_quantised(base_layer):
        return "fast", f"the base layer is quantised ({type(base_layer).__name__})"
    weight, reason = readable_weight(base_layer, layer._base_class)
    if weight is None:
        return "fast", reason
    if weight.dtype in hh.HALF:
        return "exact", ""
    return "fast", f"{str(weight.dtype).removeprefix('torch.')} loses nothing; exact under autocast"


def has_dependent_columns(u):
    """Whether Gram-Schmidt drops a column of u that is not zero."""
    T = hh.factor(u.detach(), torch.float64, gram_schmidt=True)[1]
    return bool(((T.diagonal() == 0) & (u.detach() != 0).any(0)).any())


def swap(layer, precision, compat=None):
    """Make a layer that `why_not` accepts an accelerated one, or change the settings of one that is."""
    if type(layer) in ACCELERATED:
        layer.__class__ = ACCELERATED[type(layer)]
        layer.peftkern_cache = FactorCache()
    layer.peftkern_precision = precision
    layer.peftkern_compat = compat


def swap_back(layer):
    """Give a layer PEFT's class again; False if it is of another class than `swap` gives."""
    if type(layer) not in ACCELERATED.values() or len(set(getattr(layer.get_base_layer(), "kernel_size", ()))) > 1:
        return False
    layer.__class__ = layer._peft_class
    for name in ("peftkern_precision", "peftkern_compat", "peftkern_cache"):
        layer.__dict__.pop(name, None)
    return True
