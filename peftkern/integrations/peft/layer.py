"""What all accelerated layers share, whatever their method: the hot path, the settings, what can be read."""

import torch

from peftkern import dispatch
from peftkern.integrations.peft import counters
from peftkern.nn.forward import readable_weight
from peftkern.ops.householder import HALF


def is_quantised(base_layer):
    """Whether the weight of a base layer is stored in a form that a product of matrices must not be written into."""
    weight = getattr(base_layer, "weight", None)
    if weight is None or not weight.is_floating_point() or type(weight).__name__ in ("Params4bit", "Int8Params"):
        return True
    return type(weight).__module__.startswith("torchao")


def unpack(base_layer):
    """Undo what bitsandbytes does to a 4-bit weight for its CPU kernel, in evaluation, and then dequantises wrongly.

    It unpacks the weight where it saves it.
    """
    quant_state = getattr(getattr(base_layer, "weight", None), "quant_state", None)
    if getattr(quant_state, "packing_format_for_cpu", False):
        base_layer.state_dict()


def patch_size(base_layer):
    """The length of what is rotated: in_features, the Cin kh kw of a convolution, the width of an embedding."""
    if isinstance(base_layer, torch.nn.Conv2d):
        return base_layer.in_channels * base_layer.kernel_size[0] * base_layer.kernel_size[1]
    return base_layer.embedding_dim if isinstance(base_layer, torch.nn.Embedding) else base_layer.in_features


class Accelerated:
    """A subclass of PEFT's class with another hot path. The settings are set per instance by `accelerate`.

    A method gives `_method`, `_container` (the name of the dict of adapters), `_peft_class`, `_base_class`, `_serve`
    and `adapter_tensors`.
    """

    peftkern_precision = "auto"
    peftkern_compat = None
    peftkern_cache = None
    _method = None
    _container = None
    _peft_class = None
    _base_class = None

    @property
    def _adapters(self):
        return getattr(self, self._container)

    def adapter_tensors(self):
        """(adapter, name, key, tensor) of every adapter parameter; key is its place in the layer's state_dict."""
        raise NotImplementedError

    def can_hold(self, parameter, tensor, value):
        """Whether a value of another shape in a checkpoint fits all the same."""
        return False

    def read_configs(self, configs):
        """Take from PEFT's configurations (adapter name -> config) what the layer needs and does not hold."""

    def _serve(self, x, names, args, kwargs):
        """The output for the active adapters `names`, not yet in PEFT's dtype."""
        raise NotImplementedError

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
            counters.count(self._method, reason)
            return super().forward(x, *args, **kwargs)
        names = [name for name in self.active_adapters if name in self._adapters]
        if names:
            counters.count(self._method)
            return self._as_peft(self._serve(x, names, args, kwargs), x)
        counters.count(self._method, "no active adapter")
        return self._as_peft(self._base_alone(x, *args, **kwargs), x)

    def _as_peft(self, result, x):
        """PEFT returns the dtype of the input."""
        return result.to(x.dtype)

    def _base_alone(self, x, *args, **kwargs):
        return self.base_layer(x, *args, **kwargs)


def readable_exactly(layer):
    """(precision, reason): "exact" where the base weight can be read, else "fast" and why."""
    base_layer = layer.get_base_layer()
    if is_quantised(base_layer):
        return "fast", f"the base layer is quantised ({type(base_layer).__name__})"
    weight, reason = readable_weight(base_layer, layer._base_class)
    if weight is None:
        return "fast", reason
    if weight.dtype in HALF:
        return "exact", ""
    return "fast", f"{str(weight.dtype).removeprefix('torch.')} loses nothing; exact under autocast"


def odd_parameter(name, tensor):
    """Why a parameter of an adapter cannot be served, whatever its shape, or None."""
    if tensor.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        return f"{name} is {tensor.dtype}"
    if type(tensor) is not torch.nn.Parameter:
        return f"{name} is a {type(tensor).__name__}, not a plain parameter"
    return None


def ignored_geometry(base_layer):
    """What of a convolution PEFT's weight-side forwards (HRA, BOFT) ignore while its merged weight does not."""
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


def short_list(names):
    """Names in a sentence: all of a few, the first of many."""
    names = [name or "the model itself" for name in names]
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
