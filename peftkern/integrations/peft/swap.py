"""accelerate, restore, patch_peft and unpatch_peft."""

import functools
import warnings

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from peftkern import _versions, dispatch
from peftkern.integrations.peft.report import Report
from peftkern.ops.householder import check_precision


def unavailable():
    """Why no PEFT layer can be accelerated in this process, or None."""
    if dispatch.DISABLED:
        return "PEFTKERN_DISABLE=1 is set"
    if not _versions.in_range("peft", peft.__version__):
        return (
            f"PEFT {peft.__version__} is not known to peftkern {_versions.__version__} (made for PEFT "
            f"{_versions.supported_range('peft')}), so its layers are left alone"
        )
    return None


def _check_compat(compat, names):
    """The set of layer names that keep PEFT's numbers."""
    if compat is None:
        return set()
    if isinstance(compat, str):
        if compat != "peft":
            raise ValueError(f'compat must be None, "peft" or a list of layer names; got {compat!r}')
        return set(names)
    unknown = sorted(set(compat) - set(names))
    if unknown:
        raise ValueError(f"compat names layers that are not accelerated: {', '.join(unknown)}")
    return set(compat)


def check_finite(layers):
    """Raise ValueError for the first adapter parameter with a value that is not finite; meta tensors are passed."""
    from peftkern.integrations.peft import methods

    for name, layer in layers:
        for adapter, parameter, _, tensor in methods.of(layer).tensors(layer):
            if not tensor.is_meta and not torch.isfinite(tensor.detach()).all():
                raise ValueError(
                    f"{parameter} of layer {name!r}, adapter {adapter!r}, has values that are not finite; nothing was "
                    f"changed"
                )


def accelerate(model, precision="auto", compat=None):
    """Serve the HRA, OFT and BOFT layers of a PEFT model by peftkern, in place.

    Every supported layer gets a subclass of its own class: names, parameters, state_dict, checkpoints, merging,
    switching and deleting adapters stay PEFT's. Layers and adapters that are added to a `PeftModel` later are
    accelerated as they are built; a bare model with injected layers has no tuner to do so: call accelerate again.

    Args:
        model: a PeftModel, or any module that holds injected adapter layers.
        precision: "auto" (never keeps less than PEFT: exact for half-precision products of HRA, else fast), "fast" or
            "exact"; see `peftkern.hra_linear`.
        compat: None; "peft", or a list of layer names, keeps PEFT's numbers where its forward disagrees with its own
            merged weight: OFT convolutions beyond 1 x 1; HRA and BOFT convolutions with dilation, padding_mode, or two
            strides or paddings. Also OFT adapters from PEFT before 0.18, whose polynomial was another.

    Returns:
        A report: `.replaced` (names), `.skipped` ((name, reason) pairs), `.layers`; it prints as a table.

    Raises:
        TypeError, ValueError: no module, no such precision or compat, adapter parameters that are not finite. The model
        is unchanged then. A model without adapter layers is no error: the report says so.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"accelerate: model must be a torch.nn.Module; got {type(model).__name__}")
    check_precision(precision)
    reason = unavailable()
    if reason is not None:
        return Report(reason=reason)
    from peftkern.integrations.peft import methods, tuner

    found = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    if not found:
        return Report(reason=f"this {type(model).__name__} has no adapter layer of PEFT")
    skipped = [(name, methods.why_not(layer)) for name, layer in found if methods.why_not(layer) is not None]
    layers = [(name, layer) for name, layer in found if methods.why_not(layer) is None]
    keep_peft = _check_compat(compat, [name for name, _ in layers])
    check_finite(layers)

    for name, layer in layers:
        methods.swap(layer, precision, "peft" if name in keep_peft else None)
    _follow(model, precision, bool(layers))
    methods.read_configs(layers, _configs(model))
    methods.warn(layers)
    tuner.warn_of_convolutions(layers)
    described = {name: methods.describe(layer) for name, layer in layers}
    return Report(list(described), skipped, None, described)


def _configs(model):
    """Adapter name to PEFT's configuration, from whatever part of the model holds one."""
    holders = [m.peft_config for m in model.modules() if isinstance(getattr(m, "peft_config", None), dict)]
    return {name: config for held in holders for name, config in held.items()}


def _follow(model, precision, watch):
    """Make the tuners inside the model build accelerated layers, and check what is loaded into the model."""
    from peftkern.integrations.peft import tuner

    tuners = [module for module in model.modules() if tuner.follow(module, precision)]
    for module in tuners:
        tuner.watch_loading(module.model)
    if not tuners and watch:
        tuner.watch_loading(model)


def restore(model):
    """Give the accelerated layers of a model PEFT's own classes again.

    Returns:
        Names of the restored layers. Layers that only peftkern can serve (kernels that are not square, butterflies of
        several factors, classes derived from the accelerated ones) stay as they are, with a warning.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"restore: model must be a torch.nn.Module; got {type(model).__name__}")
    from peftkern.integrations.peft import layer as layer_names
    from peftkern.integrations.peft import methods, tuner

    restored, kept = [], []
    for name, layer in methods.accelerated_layers(model):
        (restored if methods.swap_back(layer) else kept).append(name)
    for module in model.modules():
        tuner.unfollow(module)
        tuner.unwatch_loading(module)
    if kept:
        warnings.warn(
            f"peftkern: restore leaves layers that PEFT's classes cannot serve: {layer_names.short_list(kept)}"
        )
    return restored


_patched_precision = None


def patch_peft(precision="auto"):
    """Accelerate from birth every HRA, OFT and BOFT model that PEFT builds in this process from now on.

    A trainer's models, for example. BOFT models get all factors of `boft_n_butterfly_factor`, which PEFT sets to 1
    where its CUDA extension does not compile.

    Calling it again changes the precision for later models. Where nothing can be accelerated (PEFTKERN_DISABLE=1,
    another PEFT) it warns with the reason and changes nothing.

    Raises:
        ValueError: a precision that does not exist.
    """
    global _patched_precision
    check_precision(precision)
    reason = unavailable()
    if reason is not None:
        warnings.warn(f"peftkern: patch_peft changes nothing: {reason}")
        return
    from peftkern.integrations.peft import oft, tuner

    patched, _patched_precision = _patched_precision is not None, precision
    if patched:
        return
    for peft_tuner, ours in tuner.FOLLOWING.items():
        peft_tuner.__init__ = _following(peft_tuner, ours)
    oft.keep_missing_version()


def _following(peft_tuner, ours):
    """PEFT's `__init__` of a tuner that first makes the instance one of ours."""
    original = peft_tuner.__init__

    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        if type(self) is peft_tuner:
            self.__class__ = ours
            self.peftkern_precision = _patched_precision
        original(self, *args, **kwargs)

    return __init__


def unpatch_peft():
    """End `patch_peft` for models built from now on; layers and models already built stay accelerated."""
    global _patched_precision
    if _patched_precision is None:
        return
    from peftkern.integrations.peft import oft, tuner

    _patched_precision = None
    for peft_tuner in tuner.FOLLOWING:
        del peft_tuner.__init__
    oft.forget_missing_version()
