"""PEFT's HRA tuner with accelerated layers: what a later call adds is accelerated as it is built."""

import warnings

import torch
from peft.tuners.hra import HRAModel as PeftHRAModel

from peftkern.integrations.peft import hra


def accelerated_layers(model):
    """(name, layer) of every accelerated layer of a model."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, hra.Accelerated)]


class HRAModel(PeftHRAModel):
    __doc__ = PeftHRAModel.__doc__
    peftkern_precision = "auto"

    def _create_new_module(self, hra_config, adapter_name, target, **kwargs):
        layer = PeftHRAModel._create_new_module(hra_config, adapter_name, target, **kwargs)
        base_layer = layer.get_base_layer()
        if type(layer) is hra.HRAConv2d._peft_class and len(set(base_layer.kernel_size)) > 1:
            hra.swap(layer, self.peftkern_precision)
            layer.update_layer(adapter_name, config=hra_config, **kwargs)
        elif hra.why_not(layer) is None:
            hra.swap(layer, self.peftkern_precision)
        return layer

    def inject_adapter(self, model, adapter_name, *args, **kwargs):
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        watch_loading(self.model)
        added = [(n, m) for n, m in model.named_modules() if isinstance(m, PeftHRAModel.tuner_layer_cls)]
        added = [(name, layer) for name, layer in added if adapter_name in layer.hra_u]
        left = [
            f"{name}: {hra.why_not(layer) or 'it was built before patch_peft (call accelerate)'}"
            for name, layer in added
            if not isinstance(layer, hra.Accelerated)
        ]
        if left:
            warnings.warn(f"peftkern: adapter {adapter_name!r} has layers that PEFT serves: {'; '.join(left)}")
        served = [(name, layer) for name, layer in added if isinstance(layer, hra.Accelerated)]
        warn_of_dependent_columns(served, adapter_name)

    def _check_merge_allowed(self):
        super()._check_merge_allowed()
        for name, layer in accelerated_layers(self.model):
            if hra.is_quantised(layer.get_base_layer()):
                raise ValueError(hra.merge_refusal(name, layer.get_base_layer()))

    def _unload_and_optionally_merge(self, *args, **kwargs):
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        unwatch_loading(model)
        return model


def short_list(names):
    """Names in a sentence: all of a few, the first of many."""
    names = [name or "the model itself" for name in names]
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def warn_of_dependent_columns(layers, adapter_name=None):
    """Say once that apply_GS meets dependent columns: PEFT's default initialisation duplicates every column."""
    names = [
        name
        for name, layer in layers
        if any(
            gs and not layer.hra_u[a].is_meta and hra.has_dependent_columns(layer.hra_u[a])
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


def warn_of_convolutions(layers):
    """Say once that PEFT's forward computes another convolution than the base layer and the merged weight."""
    odd = [(name, hra.peft_ignores(layer.get_base_layer())) for name, layer in layers if layer.peftkern_compat is None]
    odd = [(name, ignored) for name, ignored in odd if ignored]
    if odd:
        what = ", ".join(sorted({word for _, ignored in odd for word in ignored}))
        warnings.warn(
            f"peftkern: PEFT's HRA forward ignores {what} of {short_list([name for name, _ in odd])}, its merged "
            f"weight does not. peftkern computes the convolution of the base layer; an adapter trained in plain PEFT "
            f'saw other numbers, which accelerate(model, compat="peft") keeps'
        )


def check_checkpoint(module, state_dict, prefix, *_):
    """Before anything is loaded: the shapes agree and the values are finite. A load_state_dict pre-hook."""
    loaded = []
    for name, layer in accelerated_layers(module):
        for adapter, u in layer.hra_u.items():
            value = state_dict.get(f"{prefix}{name}{'.' if name else ''}hra_u.{adapter}")
            if value is None:
                continue
            loaded.append((name, layer))
            if value.shape != u.shape:
                raise RuntimeError(
                    f"hra_u of layer {name!r}, adapter {adapter!r}, must have shape {list(u.shape)}; the checkpoint "
                    f"holds {list(value.shape)} (nothing was loaded)"
                )
            if not value.is_meta and not torch.isfinite(value).all():
                raise ValueError(
                    f"hra_u of layer {name!r}, adapter {adapter!r}, has values in the checkpoint that are not finite "
                    f"(nothing was loaded)"
                )
    warn_of_convolutions(loaded)


def _is_watch(hook):
    return getattr(hook, "hook", hook) is check_checkpoint


def watch_loading(model):
    """Check every checkpoint that is loaded into a model with injected layers."""
    if not any(_is_watch(hook) for hook in model._load_state_dict_pre_hooks.values()):
        model.register_load_state_dict_pre_hook(check_checkpoint)


def unwatch_loading(model):
    for key in [key for key, hook in model._load_state_dict_pre_hooks.items() if _is_watch(hook)]:
        del model._load_state_dict_pre_hooks[key]
