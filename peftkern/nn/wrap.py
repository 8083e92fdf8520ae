"""Put adapter layers into a model that knows nothing of them."""

import re

from torch import nn

from peftkern.nn.hra import HRAConv2d, HRALinear, _HRALayer


def wrap(model, target_modules, **options):
    """Replace layers of `model` in place by HRA layers around them and freeze everything but the adapters.

    Args:
        model: nn.Module.
        target_modules: names or suffixes of names (["q_proj", "fc1"]), or one regular expression that must match the
            whole name; matching layers must be nn.Linear or nn.Conv2d.
        options: r, apply_gs, init_weights, precision of the layers.

    Returns:
        Names of the replaced layers.

    Raises:
        ValueError: nothing matches, or a layer is refused (r < 1, groups > 1). TypeError: a matching layer is of
            another kind. The model is unchanged then.
    """
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
        _check(model, name, modules[name], options)
    trained = [p for m in model.modules() if isinstance(m, _HRALayer) for p in (m.hra_u,) if p.requires_grad]
    # A module that is known under several names gets one adapter.
    layers = {modules[name]: _kind(modules[name])(modules[name], **options) for name in chosen}
    model.requires_grad_(False)
    for u in trained:
        u.requires_grad_(True)
    for name in chosen:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layers[modules[name]].requires_grad_(False))
        layers[modules[name]].hra_u.requires_grad_(True)
    return chosen


def _adapted(model, name):
    """Whether a module is an HRA layer or lies inside one."""
    path = name.split(".") if name else []
    return any(isinstance(model.get_submodule(".".join(path[:i])), _HRALayer) for i in range(len(path) + 1))


def _kind(module):
    return HRALinear if isinstance(module, nn.Linear) else HRAConv2d


def _check(model, name, module, options):
    if not isinstance(module, (nn.Linear, nn.Conv2d)):
        raise TypeError(f"wrap: {name or 'the model'} must be nn.Linear or nn.Conv2d; got {type(module).__name__}")
    if not name:
        raise ValueError(f"wrap: the model is itself a {type(module).__name__}; put it into {_kind(module).__name__}")
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention):
        raise TypeError(f"wrap: {name} is never called, nn.MultiheadAttention reads its weight; leave it out")
    given = {key: options[key] for key in ("r", "precision") if key in options}
    _kind(module).check(module, **given)
