"""PEFT's tuners with accelerated layers: what a later call adds is accelerated as it is built."""

import warnings

import torch

from peftkern.integrations.peft import boft, hra, methods, oft
from peftkern.integrations.peft.layer import Accelerated, short_list


class _Follows:
    """A tuner whose layers are accelerated from birth."""

    peftkern_precision = "auto"
    _method = None

    def _create_new_module(self, config, adapter_name, target, **kwargs):
        method, precision = self._method, self.peftkern_precision
        layer = method.build(config, adapter_name, target, **kwargs)
        method.complete(layer, lambda: methods.swap(layer, precision), adapter_name, config, kwargs)
        if methods.why_not(layer) is None:
            methods.swap(layer, precision)
        return layer

    def inject_adapter(self, model, adapter_name, *args, **kwargs):
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        watch_loading(self.model)
        added = [(n, m) for n, m in model.named_modules() if isinstance(m, self._method.PeftLayer)]
        added = [(name, layer) for name, layer in added if adapter_name in self._method.adapters_of(layer)]
        left = [
            f"{name}: {methods.why_not(layer) or 'it was built before patch_peft (call accelerate)'}"
            for name, layer in added
            if not isinstance(layer, Accelerated)
        ]
        if left:
            warnings.warn(f"peftkern: adapter {adapter_name!r} has layers that PEFT serves: {'; '.join(left)}")
        served = [(name, layer) for name, layer in added if isinstance(layer, Accelerated)]
        methods.read_configs(served, self.peft_config)
        methods.warn(served, adapter_name)

    def _check_merge_allowed(self):
        super()._check_merge_allowed()
        self._method.check_merge(methods.accelerated_layers(self.model))

    def _unload_and_optionally_merge(self, *args, **kwargs):
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        unwatch_loading(model)
        return model


class HRAModel(_Follows, hra.PeftModel):
    __doc__ = hra.PeftModel.__doc__
    _method = hra


class OFTModel(_Follows, oft.PeftModel):
    __doc__ = oft.PeftModel.__doc__
    _method = oft


class BOFTModel(_Follows, boft.PeftModel):
    __doc__ = boft.PeftModel.__doc__
    _method = boft


FOLLOWING = {tuner._method.PeftModel: tuner for tuner in (HRAModel, OFTModel, BOFTModel)}


def follow(module, precision):
    """Make a tuner of PEFT build accelerated layers; False if it is none that can."""
    if type(module) not in FOLLOWING and type(module) not in FOLLOWING.values():
        return False
    module.__class__ = FOLLOWING.get(type(module), type(module))
    module.peftkern_precision = precision
    return True


def unfollow(module):
    if type(module) in FOLLOWING.values():
        module.__class__ = module._method.PeftModel
        module.__dict__.pop("peftkern_precision", None)


def warn_of_convolutions(layers):
    """Say once per method that PEFT's forward computes another convolution than its merged weight."""
    for method in methods.METHODS:
        own = [(name, layer) for name, layer in layers if methods.of(layer) is method]
        odd = [(name, method.peft_ignores(m.get_base_layer())) for name, m in own if m.peftkern_compat is None]
        odd = [(name, ignored) for name, ignored in odd if ignored]
        if odd:
            what = ", ".join(sorted({word for _, ignored in odd for word in ignored}))
            deviation = method.DEVIATION.format(what=what, names=short_list([name for name, _ in odd]))
            warnings.warn(
                f"peftkern: PEFT's {method.NAME} forward {deviation}. peftkern computes the convolution of the base "
                f"layer; an adapter trained in plain PEFT saw other numbers, which "
                f'accelerate(model, compat="peft") keeps'
            )


def check_checkpoint(module, state_dict, prefix, *_):
    """Before anything is loaded: the shapes agree and the values are finite. A load_state_dict pre-hook."""
    loaded, refits = [], []
    for name, layer in methods.accelerated_layers(module):
        for adapter, parameter, key, tensor in layer.adapter_tensors():
            value = state_dict.get(f"{prefix}{name}{'.' if name else ''}{key}")
            if value is None:
                continue
            loaded.append((name, layer))
            if value.shape != tensor.shape:
                if layer.can_hold(parameter, tensor, value):
                    refits.append((name, tensor, value))
                else:
                    raise RuntimeError(
                        f"{parameter} of layer {name!r}, adapter {adapter!r}, must have shape {list(tensor.shape)}; "
                        f"the checkpoint holds {list(value.shape)} (nothing was loaded)"
                    )
            if not value.is_meta and not torch.isfinite(value).all():
                raise ValueError(
                    f"{parameter} of layer {name!r}, adapter {adapter!r}, has values in the checkpoint that are not "
                    f"finite (nothing was loaded)"
                )
    if refits:
        boft.refit(refits)
    warn_of_convolutions(list(dict(loaded).items()))


def _is_watch(hook):
    return getattr(hook, "hook", hook) is check_checkpoint


def watch_loading(model):
    """Check every checkpoint that is loaded into a model with injected layers."""
    if not any(_is_watch(hook) for hook in model._load_state_dict_pre_hooks.values()):
        model.register_load_state_dict_pre_hook(check_checkpoint)


def unwatch_loading(model):
    for key in [key for key, hook in model._load_state_dict_pre_hooks.items() if _is_watch(hook)]:
        del model._load_state_dict_pre_hooks[key]
