"""Adapters in and out of safetensors, under the names PEFT gives them (`base_model.model.<layer>.hra_u`)."""

import torch

from peftkern.nn.layer import AdapterLayer

_PREFIX = "base_model.model."


def _parameters(model):
    """key -> (parameter's name, layer's name, layer, parameter), for every adapter parameter of the model."""
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, AdapterLayer)]
    return {
        f"{_PREFIX}{name}.{key}": (key, name, layer, parameter)
        for name, layer in layers
        for key, parameter in layer.adapter_parameters().items()
    }


def save_adapters(model, path):
    """Write the parameters of every adapter layer of `model` to one safetensors file at `path`."""
    tensors = {key: p.detach().contiguous() for key, (_, _, _, p) in _parameters(model).items()}
    if not tensors:
        raise ValueError("save_adapters: the model has no adapter layer")
    # Here, so that the layers need torch alone.
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"format": "pt"})


def load_adapters(model, path):
    """Read what `save_adapters` or PEFT wrote (adapter_model.safetensors) into the adapter layers of `model`.

    Tensors of modules that the adapter training saved beside (PEFT's modules_to_save, biases) are left alone.

    Raises:
        ValueError: a parameter without a tensor, a tensor without a layer, another shape, values that are not finite,
            or a merged layer. Nothing is changed then.
    """
    from safetensors.torch import load_file

    parameters = _parameters(model)
    kinds = {key for key, *_ in parameters.values()} or {"hra_u"}
    read = load_file(path)
    tensors = {key: t for key, t in read.items() if any(key.endswith(f".{kind}") for kind in kinds)}
    for key in sorted(parameters.keys() - tensors.keys()):
        raise ValueError(f"load_adapters: {path} has no {parameters[key][0]} for {parameters[key][1]}")
    if unknown := sorted(tensors.keys() - parameters.keys()):
        names = ", ".join(key.removeprefix(_PREFIX) for key in unknown)
        raise ValueError(f"load_adapters: the model has no adapter layer for {names} of {path}")
    for key, (parameter, name, layer, own) in parameters.items():
        value, what = tensors[key], f"{parameter} of {name}"
        if value.shape != own.shape:
            raise ValueError(
                f"load_adapters: {what} must have shape {list(own.shape)}; {path} holds {list(value.shape)}"
            )
        if not value.is_floating_point():
            raise ValueError(f"load_adapters: {what} in {path} must be floating; it is {value.dtype}")
        if not torch.isfinite(value.to(own.dtype)).all():
            raise ValueError(f"load_adapters: {what} in {path} has values that are not finite")
        if layer.merged:
            raise ValueError(f"load_adapters: {name} is merged into its weight; unmerge() it before loading")
    with torch.no_grad():
        for key, (_, _, _, own) in parameters.items():
            own.copy_(tensors[key])
