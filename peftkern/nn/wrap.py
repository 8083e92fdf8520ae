"""Put adapter layers into a model that knows nothing of them."""

import re

from torch import nn

from peftkern.nn.hra import HRAConv2d, HRALinear, _HRALayer


def wrap(model, target_modules, **options):
    """Replace layers of `model` in place by HRA layers around them and freeze everything else.

    Args:
        model: nn.Module.
        target_modules: names or suffixes of names (["q_proj", "fc1"]), or one regular expression that must match the
            whole name; matching layers must be nn.Linear or nn.Conv2d.
        options: r, apply_gs, init_weights, precision of the layers.

    Returns:
        Names of the replaced layers.

    Raises:
        ValueError: nothing matches. TypeError: a matching layer is of another kind. The model is unchanged then.
    """
    if isinstance(target_modules, str):
        pattern = re.compile(target_modules)
        chosen = [name for name, _ in model.named_modules() if pattern.fullmatch(name)]
    else:
        targets = tuple(target_modules)
        chosen = [n for n, _ in model.named_modules() if n in targets or n.endswith(tuple("." + t for t in targets))]
    modules = dict(model.named_modules())
    chosen = [name for name in chosen if not isinstance(modules[name], _HRALayer)]
    if not chosen:
        raise ValueError(f"wrap: target_modules must match at least one layer; {target_modules!r} matches none")
    layers = {}
    for name in chosen:
        kind = HRALinear if isinstance(modules[name], nn.Linear) else HRAConv2d
        if not isinstance(modules[name], (nn.Linear, nn.Conv2d)):
            raise TypeError(f"wrap: {name} must be nn.Linear or nn.Conv2d; got {type(modules[name]).__name__}")
        layers[name] = kind(modules[name], **options)
    model.requires_grad_(False)
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
        layer.hra_u.requires_grad_(True)
    return chosen
