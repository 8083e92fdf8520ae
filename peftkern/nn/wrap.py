"""Put adapter layers into a model that knows nothing of them."""

import re

from torch import nn

from peftkern.nn.boft import BOFTConv2d, BOFTLinear
from peftkern.nn.hra import HRAConv2d, HRALinear
from peftkern.nn.layer import AdapterLayer
from peftkern.nn.oft import OFTConv2d, OFTEmbedding, OFTLinear

_KINDS = {
    "hra": (HRALinear, HRAConv2d),
    "oft": (OFTLinear, OFTConv2d, OFTEmbedding),
    "boft": (BOFTLinear, BOFTConv2d),
}


def wrap(model, target_modules, method="hra", **options):
    """Replace layers of `model` in place by adapter layers around them and freeze everything but the adapters.

    Args:
        model: nn.Module.
        target_modules: names or suffixes of names (["q_proj", "fc1"]), or one regular expression that must match the
            whole name; matching layers must be nn.Linear or nn.Conv2d, with "oft" also nn.Embedding.
        method: "hra", "oft" or "boft".
        options: of the layers, see `HRALinear`, `OFTLinear`, `BOFTLinear`.

    Returns:
        Names of the replaced layers.

    Raises:
        ValueError: nothing matches, no such method, or a layer is refused (r < 1, groups > 1). TypeError: a matching
            layer is of another kind. The model is unchanged then.
    """
    if method not in _KINDS:
        raise ValueError(f"wrap: method must be one of {', '.join(_KINDS)}; got {method!r}")
    modules = {name: m for name, m in model.named_modules(remove_duplicate=False) if not _adapted(model, name)}
    if isinstance(target_modules, str):
        pattern = re.compile(target_modules)
        chosen = [name for name in modules if pattern.fullmatch(name)]
    else:
        targets = tuple(target_modules)
        chosen = [name for name in modules if name in targets or name.endswith(tuple("." + t for t in targets))]
    if not chosen:
        raise ValueError(f"wrap: target_modules must match at least one layer; {target_modules!r} matches none")
    for name in chosen:
        _check(model, name, modules[name], method, options)
    held = [p for m in model.modules() if isinstance(m, AdapterLayer) for p in m.adapter_parameters().values()]
    trained = [p for p in held if p.requires_grad]
    # A module that is known under several names gets one adapter.
    layers = {modules[name]: _kind(method, modules[name])(modules[name], **options) for name in chosen}
    model.requires_grad_(False)
    for p in trained:
        p.requires_grad_(True)
    for name in chosen:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layers[modules[name]].requires_grad_(False))
        for p in layers[modules[name]].adapter_parameters().values():
            p.requires_grad_(True)
    return chosen


def _adapted(model, name):
    """Whether a module is an adapter layer or lies inside one."""
    path = name.split(".") if name else []
    return any(isinstance(model.get_submodule(".".join(path[:i])), AdapterLayer) for i in range(len(path) + 1))


def _kind(method, module):
    """The layer of a method for a module, or None."""
    return next((kind for kind in _KINDS[method] if isinstance(module, kind._base_type)), None)


def _check(model, name, module, method, options):
    kind = _kind(method, module)
    if kind is None:
        *others, last = (f"nn.{layer._base_type.__name__}" for layer in _KINDS[method])
        wanted = f"{', '.join(others)} or {last}"
        raise TypeError(f"wrap: {name or 'the model'} must be {wanted}; got {type(module).__name__}")
    if not name:
        raise ValueError(f"wrap: the model is itself a {type(module).__name__}; put it into {kind.__name__}")
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention):
        raise TypeError(f"wrap: {name} is never called, nn.MultiheadAttention reads its weight; leave it out")
    kind.check(module, **options)
