"""Adapters in and out of safetensors, under the names PEFT gives them (`base_model.model.<layer>.hra_u`)."""

import torch

from peftkern.nn.hra import _HRALayer

_PREFIX = "base_model.model."


def _layers(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, _HRALayer)}


def save_adapters(model, path):
    """Write the `hra_u` of every HRA layer of `model` to one safetensors file at `path`."""
    tensors = {f"{_PREFIX}{name}.hra_u": layer.hra_u.detach().contiguous() for name, layer in _layers(model).items()}
    if not tensors:
        raise ValueError("save_adapters: the model has no HRA layer")
    # Here, so that the layers need torch alone.
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"format": "pt"})


def load_adapters(model, path):
    """Read what `save_adapters` or PEFT's HRA wrote (adapter_model.safetensors) into the HRA layers of `model`.

    Raises:
        ValueError: a layer without a tensor, a tensor without a layer, another shape, values that are not finite, or a
            merged layer. Nothing is changed then.
    """
    from safetensors.torch import load_file

    layers = _layers(model)
    read = load_file(path)
    tensors = {key.removeprefix(_PREFIX).removesuffix(".hra_u"): t for key, t in read.items() if key.endswith(".hra_u")}
    if missing := sorted(layers.keys() - tensors.keys()):
        raise ValueError(f"load_adapters: {path} has no hra_u for {', '.join(missing)}")
    if unknown := sorted(tensors.keys() - layers.keys()):
        raise ValueError(f"load_adapters: the model has no HRA layer for {', '.join(unknown)} of {path}")
    for name, layer in layers.items():
        if tensors[name].shape != layer.hra_u.shape:
            raise ValueError(
                f"load_adapters: hra_u of {name} must have shape {list(layer.hra_u.shape)}; "
                f"{path} holds {list(tensors[name].shape)}"
            )
        if not tensors[name].is_floating_point():
            raise ValueError(f"load_adapters: hra_u of {name} in {path} must be floating; it is {tensors[name].dtype}")
        if not torch.isfinite(tensors[name].to(layer.hra_u.dtype)).all():
            raise ValueError(f"load_adapters: hra_u of {name} in {path} has values that are not finite")
        if layer.merged:
            raise ValueError(f"load_adapters: {name} is merged into its weight; unmerge() it before loading")
    with torch.no_grad():
        for name, layer in layers.items():
            layer.hra_u.copy_(tensors[name])
