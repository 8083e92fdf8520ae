"""PEFT's BOFT classes with another hot path, and with all of their butterfly factors.

The activations pass through the butterfly by `peftkern.nn.rotation`; PEFT's dense permutation matrices, a buffer of
f K^2 floats per layer, are not built, and its CUDA extension is not asked for: without it PEFT sets
boft_n_butterfly_factor to 1 and says so in a warning only.
"""

import warnings

import torch
from peft.tuners.boft import BOFTModel as PeftModel
from peft.tuners.boft import layer as peft_layer
from peft.tuners.boft import model as peft_model
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge

from peftkern.integrations.peft import layer as shared
from peftkern.integrations.peft.layer import is_quantised, odd_parameter, patch_size, short_list
from peftkern.nn import rotation
from peftkern.ops import butterfly as bf

METHOD, NAME = "boft", "BOFT"
PeftLayer = peft_layer.BOFTLayer
DEVIATION = "ignores {what} of {names}, its merged weight does not"
peft_ignores = shared.ignored_geometry


def block_size(layer_name, K, config):
    """b of a configuration for K inputs; raises ValueError where the sizes do not fit."""
    b, n, f = config.boft_block_size, config.boft_block_num, config.boft_n_butterfly_factor
    if (b == 0) == (n == 0):
        raise ValueError(f"{layer_name}: set either boft_block_size or boft_block_num; got {b} and {n}")
    if n and K % n:
        raise ValueError(f"{layer_name}: boft_block_num must divide the {K} inputs; got {n}")
    b = b or K // n
    if K % b:
        raise ValueError(f"{layer_name}: boft_block_size must divide the {K} inputs; got {b}")
    bf.check_sizes(f"{layer_name} (boft_n_butterfly_factor = {f})", K, b, f)
    return b


class Accelerated(shared.Accelerated):
    """What the accelerated BOFT layers share."""

    _method, _container = METHOD, "boft_R"
    # Whether PEFT built fewer factors than the configuration asks for.
    peftkern_forced = False

    def adapter_tensors(self):
        return tensors(self)

    def read_configs(self, configs):
        wanted = {name: getattr(configs.get(name), "boft_n_butterfly_factor", 1) for name in self.boft_R}
        self.peftkern_forced = any(f > len(self.boft_R[name]) for name, f in wanted.items())

    def can_hold(self, parameter, tensor, value):
        """boft_R of one factor where there are several, or of several where PEFT forced one, if the sizes allow it."""
        if parameter != "boft_R" or value.dim() != 4 or value.shape[1:] != tensor.shape[1:]:
            return False
        f, n, b, _ = value.shape
        return 1 in (f, len(tensor)) and f > 0 and (f == 1 or (b % 2 == 0 and n % (1 << (f - 1)) == 0))

    def _butterflies(self, names):
        return any(len(self.boft_R[name]) > 1 for name in names)

    def _left_to_peft(self):
        reason = super()._left_to_peft()
        # PEFT's forward needs its CUDA extension for several factors.
        if reason == "PEFTKERN_DISABLE=1" and self._butterflies(self.boft_R):
            return None
        return reason

    def _chain(self, names):
        return [(self.boft_R[name], self._dropped(name)) for name in names]

    def _dropped(self, name):
        dropout = self.boft_dropout[name]
        return dropout.p if isinstance(dropout, peft_layer.MultiplicativeDropoutLayer) and dropout.training else 0.0

    def _scale(self, names):
        """The product of the output scales, in float32, or float64 if one is."""
        scales = [self.boft_s[name].reshape(-1) for name in names]
        wide = any(s.dtype is torch.float64 for s in scales)
        scale = scales[0].to(torch.float64 if wide else torch.float32)
        for s in scales[1:]:
            scale = scale * s.to(scale.dtype)
        return scale

    @property
    def boft_P(self):
        """PEFT's permutation matrices [f, K, K] of the adapter added last, made for PEFT's own forward alone."""
        *_, R = self.boft_R.values()
        f, n, b, _ = R.shape
        rows = [self.block_butterfly_perm(n * b, n >> s, b // 2, f - 1) for s in range(f)]
        return torch.stack([torch.eye(n * b)[row] for row in rows]).to(R.device)

    def update_layer(self, adapter_name, config, **kwargs):
        """Build the parameters of a new adapter, with all of its factors."""
        base_layer = self.get_base_layer()
        if getattr(base_layer, "groups", 1) > 1:
            raise NotImplementedError(
                f"BOFT does not support {type(base_layer).__name__} layers with groups > 1 "
                f"(got groups={base_layer.groups})."
            )
        K, f = patch_size(base_layer), config.boft_n_butterfly_factor
        b = block_size(f"BOFT of a {type(base_layer).__name__}", K, config)
        p = config.boft_dropout
        self.fbd_cuda_available = False
        self.boft_dropout[adapter_name] = peft_layer.MultiplicativeDropoutLayer(p=p) if p > 0 else torch.nn.Identity()
        self.boft_R[adapter_name] = torch.nn.Parameter(torch.zeros(f, K // b, b, b))
        self.boft_s[adapter_name] = torch.nn.Parameter(torch.ones(self._scale_shape()))
        self.reset_boft_parameters(adapter_name, config.init_weights)
        self.boft_block_size[adapter_name], self.boft_block_num[adapter_name] = b, K // b
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def get_delta_weight(self, adapter):
        """(R [K, K] in the adapter's dtype, boft_s [N, 1]); the merged weight is s W R^T."""
        boft_R = self.boft_R[adapter]
        R = bf.butterfly_blocks(boft_R)
        eye = torch.eye(R.shape[1] * R.shape[2], dtype=R.dtype, device=R.device)
        return bf.butterfly_rotate(eye, R).to(boft_R.dtype), self.boft_s[adapter].reshape(-1, 1)

    def merge(self, safe_merge=False, adapter_names=None):
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.boft_R:
                self._multiply_weight(name, False, safe_merge)
                self.merged_adapters.append(name)

    def unmerge(self):
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.")
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self.boft_R:
                self._multiply_weight(name, True, False)

    @torch.no_grad()
    def _multiply_weight(self, name, inverse, check_finite):
        """W <- s W R^T, or W <- (W / s) R."""
        shared.unpack(self.get_base_layer())
        weight = self.get_base_weight()
        wide = torch.float64 in (weight.dtype, self.boft_R[name].dtype)
        dtype = torch.float64 if wide else torch.float32
        R, s = bf.butterfly_blocks(self.boft_R[name], dtype), self.boft_s[name].reshape(-1, 1).to(dtype)
        rows = weight.flatten(1).to(dtype)
        rotated = bf.butterfly_rotate(rows / s, R) if inverse else bf.butterfly_rotate(rows, R, transpose=True) * s
        if check_finite and not torch.isfinite(rotated).all():
            raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        rotated = rotated.view(weight.shape)
        if self.quantization_backend is not None:
            self.set_base_weight(rotated.contiguous().to(weight.dtype))
        else:
            self.set_base_weight(torch.empty_like(weight).copy_(rotated))


class Linear(Accelerated, peft_layer.Linear):
    __doc__ = peft_layer.Linear.__doc__
    _peft_class = peft_layer.Linear
    _base_class = torch.nn.Linear

    def _scale_shape(self):
        return self.out_features, 1

    def _serve(self, x, names, args, kwargs):
        chain, scale, cache = self._chain(names), self._scale(names), self.peftkern_cache
        return rotation.adapted_linear(
            rotation.BOFT, x, self.base_layer, chain, scale, self.peftkern_precision, cache, args, kwargs
        )


class Conv2d(Accelerated, peft_layer.Conv2d):
    __doc__ = peft_layer.Conv2d.__doc__
    _peft_class = peft_layer.Conv2d
    _base_class = torch.nn.Conv2d

    def _scale_shape(self):
        return 1, self.out_features

    def _left_to_peft(self):
        reason = super()._left_to_peft()
        keep = reason is None and self.peftkern_compat == "peft" and not self._butterflies(self.boft_R)
        return 'compat="peft"' if keep and peft_ignores(self.get_base_layer()) else reason

    def _serve(self, x, names, args, kwargs):
        chain, scale, cache = self._chain(names), self._scale(names), self.peftkern_cache
        return rotation.adapted_conv2d(
            rotation.BOFT, x, self.base_layer, chain, scale, self.peftkern_precision, cache, args, kwargs
        )


ACCELERATED = {peft_layer.Linear: Linear, peft_layer.Conv2d: Conv2d}


def adapters_of(layer):
    return layer.boft_R


def tensors(layer):
    """(adapter, name, key in the layer's state_dict, tensor) of every adapter parameter."""
    held = (("boft_R", layer.boft_R), ("boft_s", layer.boft_s))
    return [(name, key, f"{key}.{name}", tensor) for key, group in held for name, tensor in group.items()]


def build(config, adapter_name, target, **kwargs):
    """A new layer with all of its factors; PEFT's own where ours has no class for the target."""
    base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    layer_class = ACCELERATED.get(peft_model._get_tuner_layer_class(base_layer))
    if layer_class is None or isinstance(target, BaseTunerLayer):
        return PeftModel._create_new_module(config, adapter_name, target, **kwargs)
    if layer_class is Linear and config.fan_in_fan_out:
        warnings.warn("fan_in_fan_out is set to True but the target module is `torch.nn.Linear`. Setting it to False.")
        config.fan_in_fan_out = False
    return layer_class(target, adapter_name, config=config, **kwargs)


def complete(layer, swap, adapter_name, config, kwargs):
    """A layer that `build` has made is an accelerated one: give it the settings."""
    if isinstance(layer, Accelerated):
        prepare(layer)
        swap()


def why_not(layer):
    """Why one of PEFT's own BOFT layers cannot be accelerated, or None."""
    base_layer = layer.get_base_layer()
    if isinstance(base_layer, torch.nn.Conv2d) and is_quantised(base_layer):
        return "a quantised convolution has no readable weight"
    size = patch_size(base_layer)
    for name, R in layer.boft_R.items():
        f, n, b, _ = R.shape
        if n * b != size or (f > 1 and (b % 2 or n % (1 << (f - 1)))):
            square = " (PEFT supports square kernels only)" if isinstance(base_layer, torch.nn.Conv2d) else ""
            return f"boft_R has shape {list(R.shape)}, the base layer needs {size} inputs{square}"
        odd = odd_parameter("boft_R", R) or odd_parameter("boft_s", layer.boft_s[name])
        if odd is not None:
            return odd
    return None


def served(layer):
    """(precision, reason): what serves the products of an accelerated layer, and why it is not `exact`."""
    return shared.readable_exactly(layer) if layer.peftkern_precision == "exact" else ("fast", "")


def prepare(layer):
    """Give a layer that has just become an accelerated one what its class needs, and drop PEFT's permutations."""
    layer.peftkern_cache = rotation.BOFTCache()
    layer._buffers.pop("boft_P", None)


def release(layer):
    """Give PEFT's class its permutations back; False where it cannot serve the layer: several factors."""
    if layer._butterflies(layer.boft_R) or len(set(getattr(layer.get_base_layer(), "kernel_size", ()))) > 1:
        return False
    permutations = layer.boft_P
    layer.__class__ = layer._peft_class
    layer.register_buffer("boft_P", permutations, persistent=False)
    return True


def check_merge(layers):
    """PEFT's quantisation backends merge, or refuse."""


def warn(layers, adapter_name=None):
    """Say once which layers hold one factor although their configuration asks for several."""
    forced = [name for name, layer in layers if layer.peftkern_forced]
    if forced:
        warnings.warn(
            f"peftkern: PEFT has set boft_n_butterfly_factor to 1 in {short_list(forced)} (its CUDA extension does not "
            f"compile), so these rotations are plain blocks. peftkern serves them as they are; call "
            f"peftkern.patch_peft() before the model is built to get all factors"
        )


def refit(layers):
    """Give parameters the number of factors of a checkpoint: a list of (layer name, tensor, value)."""
    warnings.warn(
        f"peftkern: the checkpoint holds boft_R of {layers[0][2].shape[0]} butterfly factor(s) for "
        f"{short_list([name for name, _, _ in layers])}, built with {layers[0][1].shape[0]}; the layers take the "
        f"checkpoint's (PEFT writes 1 where its CUDA extension does not compile)"
    )
    for _, tensor, value in layers:
        tensor.data = tensor.data.new_zeros(value.shape)
