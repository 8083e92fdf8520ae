"""PEFT's life cycle before and after accelerate: the same calls on twins end in the same state."""

import copy
import warnings

import pytest
import safetensors.torch
import torch
from peft import (
    HRAConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils.hotswap import hotswap_adapter, hotswap_adapter_from_state_dict
from peft_models import ConvNet, Net, assert_twins_agree, config, inputs, messages, outcome, relative, twins, unpatched

import peftkern
from peftkern.integrations.peft.hra import Accelerated

__all__ = ["unpatched"]


def _both(model):
    model.base_model.set_adapter(["default", "other"])


def _disabled_context(model):
    with model.disable_adapter():
        model(inputs())


def _merged_then(step):
    def run(model):
        model.merge_adapter()
        step(model)

    return run


def _merge_other(model):
    _both(model)
    model.merge_adapter(adapter_names=["other"])


def _rebuild(model):
    merged = model.merge_and_unload(safe_merge=True)
    model.__dict__["merged"] = merged


STEPS = {
    "nothing": lambda model: None,
    "other active": lambda model: model.set_adapter("other"),
    "both active": _both,
    "both active, other order": lambda model: model.base_model.set_adapter(["other", "default"]),
    "disabled": lambda model: model.base_model.disable_adapter_layers(),
    "disabled and enabled": lambda model: (
        model.base_model.disable_adapter_layers(),
        model.base_model.enable_adapter_layers(),
    ),
    "disabled in a context": _disabled_context,
    "merged": lambda model: model.merge_adapter(),
    "merged safely": lambda model: model.merge_adapter(safe_merge=True),
    "both merged": lambda model: (_both(model), model.merge_adapter()),
    "one of two merged": _merge_other,
    "merged twice": _merged_then(lambda model: model.merge_adapter()),
    "merged and unmerged": _merged_then(lambda model: model.unmerge_adapter()),
    "both merged and unmerged": lambda model: (_both(model), model.merge_adapter(), model.unmerge_adapter()),
    "merged and disabled": _merged_then(lambda model: model.base_model.disable_adapter_layers()),
    "merged, then another set active": _merged_then(lambda model: model.set_adapter("other")),
    "unmerged without a merge": lambda model: model.unmerge_adapter(),
    "inactive deleted": lambda model: model.delete_adapter("other"),
    "active deleted": lambda model: model.delete_adapter("default"),
    "both active, one deleted": lambda model: (_both(model), model.delete_adapter("other")),
    "merged deleted": _merged_then(lambda model: outcome(model.delete_adapter, "default")),
    "added": lambda model: model.add_adapter("third", config(r=2)),
    "added and active": lambda model: (model.add_adapter("third", config(r=2)), model.set_adapter("third")),
    "added on other layers": lambda model: model.add_adapter("third", config(r=2, target_modules=["c", "b"])),
    "added on other layers and active": lambda model: (
        model.add_adapter("third", config(r=2, target_modules=["c", "b"])),
        model.set_adapter("third"),
    ),
    "added in low memory": lambda model: model.add_adapter("third", config(r=2), low_cpu_mem_usage=True),
    "frozen": lambda model: model.set_requires_grad("default", False),
    "eval": lambda model: model.eval(),
    "in float32 and back": lambda model: model.float().double(),
    "unloaded": lambda model: model.unload(),
    "merged and unloaded": lambda model: model.merge_and_unload(safe_merge=True),
    "scaled": lambda model: [
        m.scale_layer(2.0) or m.unscale_layer() for m in model.modules() if hasattr(m, "scale_layer")
    ],
}


def _run(model, step):
    torch.manual_seed(3)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        result = STEPS[step](model)
    texts = [str(w.message) for w in record if "torch" not in w.filename]
    state = torch.get_rng_state()
    return result if isinstance(result, torch.nn.Module) else model, texts, state


@pytest.mark.parametrize("gs", [False, True], ids=["product", "gs"])
@pytest.mark.parametrize("step", STEPS)
def test_state_warnings_output_and_gradients_after_each_step_are_pefts(step, gs):
    plain, fast = twins(second=config(r=3), apply_GS=gs)
    (plain, texts, state), (fast, fast_texts, fast_state) = _run(plain, step), _run(fast, step)
    assert fast_texts == texts
    assert torch.equal(state, fast_state)
    if step == "added in low memory":
        assert all(p.is_meta for name, p in fast.named_parameters() if "third" in name)
        return
    # Where none of the active adapters has weights, PEFT computes in float32 whatever the base layer's dtype.
    assert_twins_agree(plain, fast, inputs(), tolerance=1e-5 if "other layers" in step else 1e-11)


def test_a_layer_without_active_adapter_is_its_base_layer():
    _, fast = twins()
    fast.add_adapter("third", config(target_modules=["a"]))
    fast.set_adapter("third")
    layer, x = fast.base_model.model.b, torch.randn(3, 40, dtype=torch.float64)
    assert torch.equal(layer(x), layer.base_layer(x))
    assert relative(layer.bfloat16()(x.float()), layer.base_layer.float()(x.float())) < 2e-7


def test_every_layer_of_a_later_adapter_is_accelerated():
    _, fast = twins()
    fast.add_adapter("third", config(r=2, target_modules=["b", "c"]))
    assert all(isinstance(getattr(fast.base_model.model, name), Accelerated) for name in "abc")


def test_a_later_adapter_gets_the_precision_of_accelerate():
    _, fast = twins()
    peftkern.accelerate(fast, precision="fast")
    fast.add_adapter("third", config(r=2, target_modules=["c"]))
    assert fast.base_model.model.c.peftkern_precision == "fast"


def test_accelerating_a_bare_model_again_covers_what_a_later_injection_added():
    model = inject_adapter_in_model(config(target_modules=["a"]), Net().double())
    peftkern.accelerate(model)
    inject_adapter_in_model(config(target_modules=["a", "b"]), model, "other")
    assert peftkern.accelerate(model).replaced == ["a", "b"]
    assert all(isinstance(layer, Accelerated) for layer in (model.a, model.b))


@pytest.mark.parametrize("options", [{"padding": 1}, {"stride": 2}], ids=str)
@pytest.mark.parametrize("step", ["merged", "merged safely", "merged and unmerged", "both merged", "both active"])
def test_state_and_output_of_a_convolution_after_each_step_are_pefts(step, options):
    both = {"target_modules": ["conv"], "r": 2}
    plain, fast = twins(ConvNet(**options), second=config(**both), **both)
    (plain, texts, _), (fast, fast_texts, _) = _run(plain, step), _run(fast, step)
    assert fast_texts == texts
    assert_twins_agree(plain, fast, torch.randn(2, 3, 7, 6, dtype=torch.float64), tolerance=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_merged_weight_is_as_close_to_float64_as_pefts(dtype):
    plain, fast = twins(dtype=dtype)
    exact = copy.deepcopy(plain).double()
    for model in (plain, fast, exact):
        model.merge_adapter()
    for name in "ab":
        weights = [getattr(m.base_model.model, name).base_layer.weight for m in (plain, fast, exact)]
        assert weights[1].dtype is dtype
        assert relative(weights[1], weights[2]) <= 1.05 * relative(weights[0], weights[2])


@pytest.mark.parametrize("gs", [False, True], ids=["product", "gs"])
def test_safe_merge_detects_values_that_are_not_finite_and_changes_nothing(gs):
    for model in twins(apply_GS=gs):
        layer = model.base_model.model.a
        weight = layer.base_layer.weight.clone()
        with torch.no_grad():
            layer.hra_u["default"][3, 1] = float("nan")
        with pytest.raises(ValueError, match=r"NaNs detected in the merged weights. The adapter default seems to be"):
            model.merge_adapter(safe_merge=True)
        assert torch.equal(layer.base_layer.weight, weight)
        assert not layer.merged


def test_saved_files_are_pefts_byte_for_byte(tmp_path):
    for model, folder in zip(twins(bias="hra_only", modules_to_save=["head"]), ("plain", "fast"), strict=True):
        model.save_pretrained(tmp_path / folder)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "fast" / name).read_bytes()


OPTIONS = {
    "default": {},
    "gs": {"apply_GS": True},
    "bias hra_only": {"bias": "hra_only"},
    "bias all": {"bias": "all"},
    "modules_to_save": {"modules_to_save": ["head"]},
}


def _moved(model):
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_checkpoints_go_both_ways(tmp_path, options, low_cpu_mem_usage):
    base = Net().double()
    plain, fast = twins(copy.deepcopy(base), **OPTIONS[options])
    for model in (plain, fast):
        torch.manual_seed(4)
        _moved(model).save_pretrained(tmp_path)
        x = inputs()
        torch.manual_seed(5)
        in_peft = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert relative(in_peft(x), model(x)) < 1e-13
        loaded = copy.deepcopy(in_peft)
        peftkern.accelerate(loaded)
        assert relative(loaded(x), model(x)) < 1e-13
        if options.startswith("bias"):  # PEFT allows one adapter with bias
            continue
        assert not loaded.load_adapter(tmp_path, "again", low_cpu_mem_usage=low_cpu_mem_usage).unexpected_keys
        _moved(loaded).set_adapter("again")
        assert relative(loaded(x), model(x)) < 1e-13


@pytest.mark.parametrize("bias", ["none", "hra_only", "all"])
def test_trainable_parameters_and_checkpoint_keys_are_pefts(bias):
    plain, fast = twins(bias=bias, modules_to_save=["head"])
    assert plain.get_nb_trainable_parameters() == fast.get_nb_trainable_parameters()
    assert list(get_peft_model_state_dict(plain)) == list(get_peft_model_state_dict(fast))
    assert plain.get_layer_status() == fast.get_layer_status()
    assert plain.get_model_status() == fast.get_model_status()


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_adapters_of_a_half_precision_base_have_pefts_dtype(autocast_adapter_dtype, unpatched):
    for patch in (False, True):
        if patch:
            peftkern.patch_peft()
        model = get_peft_model(Net().bfloat16(), config(), autocast_adapter_dtype=autocast_adapter_dtype)
        peftkern.accelerate(model)
        model.add_adapter("other", config(), autocast_adapter_dtype=autocast_adapter_dtype)
        wanted = torch.float32 if autocast_adapter_dtype else torch.bfloat16
        assert {u.dtype for u in model.base_model.model.a.hra_u.values()} == {wanted}


def test_hot_swapping_is_refused_as_by_peft(tmp_path):
    plain, fast = twins()
    plain.save_pretrained(tmp_path)
    refusals = [outcome(hotswap_adapter, model, tmp_path, "default") for model in (plain, fast)]
    assert refusals[0] == refusals[1]
    assert refusals[0][0] is ValueError


def test_hot_swapping_from_a_state_dict_ends_as_in_peft():
    plain, fast = twins()
    prefix = "base_model.model."
    swapped = {f"{prefix}{n}.hra_u.default": torch.randn(k, 4).double() for n, k in (("a", 24), ("b", 40))}
    results = [
        outcome(hotswap_adapter_from_state_dict, model, dict(swapped), "default", model.peft_config["default"], "hra_")
        for model in (plain, fast)
    ]
    assert results[0] == results[1]
    assert_twins_agree(plain, fast, inputs())


def test_deepcopy_and_module_pickling_keep_the_layers_accelerated_and_separate(tmp_path):
    _, fast = twins(second=config(r=3))
    x = inputs()
    y = fast(x)
    torch.save(fast, tmp_path / "model.pt")
    for other in (copy.deepcopy(fast), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert isinstance(other.base_model.model.a, Accelerated)
        assert torch.equal(other(x), y)
        _moved(other)
        assert torch.equal(fast(x), y)
        other.add_adapter("third", config(target_modules=["c"]))
        assert isinstance(other.base_model.model.c, Accelerated)
        with pytest.raises(ValueError, match="not finite"):
            other.load_state_dict({"base_model.model.a.hra_u.default": torch.full((24, 4), float("nan"))}, strict=False)


def test_a_checkpoint_of_another_shape_is_refused_before_anything_is_loaded(tmp_path):
    small, _ = twins(r=2)
    small.save_pretrained(tmp_path)
    weights = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    for model in (twins()[1], _accelerated_bare()):
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(
            RuntimeError, match=r"layer '.*a', adapter 'default', must have shape \[24, 4\]; .* \[24, 2"
        ):
            set_peft_model_state_dict(model, weights)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def _accelerated_bare():
    model = inject_adapter_in_model(config(), Net().double())
    peftkern.accelerate(model)
    return model


def test_a_checkpoint_that_is_not_finite_is_refused_before_anything_is_loaded():
    plain, fast = twins()
    weights = get_peft_model_state_dict(_moved(plain))
    weights["base_model.model.b.hra_u"][0, 0] = float("inf")
    for model in (fast, _accelerated_bare()):
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(
            ValueError, match=r"layer '.*b', adapter 'default', has values in the checkpoint that are not"
        ):
            set_peft_model_state_dict(model, weights)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_nothing_of_peftkern_is_left_in_an_unloaded_model():
    _, fast = twins()
    assert not fast.merge_and_unload()._load_state_dict_pre_hooks


def test_a_trainer_gets_accelerated_layers_from_birth(unpatched, tmp_path):
    twins()[0].save_pretrained(tmp_path)
    peftkern.patch_peft(precision="exact")
    peftkern.patch_peft(precision="exact")
    base = Net().double()
    built = {
        "get_peft_model": get_peft_model(copy.deepcopy(base), config()),
        "from_pretrained": PeftModel.from_pretrained(copy.deepcopy(base), tmp_path),
        "inject_adapter_in_model": inject_adapter_in_model(config(), copy.deepcopy(base)),
    }
    built["get_peft_model"].add_adapter("other", config(target_modules=["c"]))
    built["from_pretrained"].load_adapter(tmp_path, "other")
    for name, model in built.items():
        layers = [m for m in model.modules() if hasattr(m, "hra_u")]
        assert layers and all(isinstance(m, Accelerated) and m.peftkern_precision == "exact" for m in layers), name
    peftkern.unpatch_peft()
    peftkern.unpatch_peft()
    assert not any(isinstance(m, Accelerated) for m in get_peft_model(copy.deepcopy(base), config()).modules())
    built["get_peft_model"].add_adapter("third", config(target_modules=["head"]))
    assert isinstance(built["get_peft_model"].base_model.model.head, Accelerated)


def test_layers_that_a_new_adapter_shares_with_peft_are_named(unpatched):
    model = inject_adapter_in_model(config(target_modules=["a"]), Net())
    peftkern.patch_peft()
    with pytest.warns(UserWarning) as record:
        inject_adapter_in_model(config(target_modules=["a", "b"]), model, "other")
    assert messages(record, "PEFT serves") == [
        "peftkern: adapter 'other' has layers that PEFT serves: a: it was built before patch_peft (call accelerate)"
    ]
    assert isinstance(model.b, Accelerated) and not isinstance(model.a, Accelerated)


def test_a_model_built_under_patch_peft_starts_from_the_same_parameters_as_pefts(unpatched):
    base, models = Net().double(), []
    for patch in (False, True):
        if patch:
            peftkern.patch_peft()
        torch.manual_seed(7)
        models.append(get_peft_model(copy.deepcopy(base), config(r=6, init_weights=True, bias="hra_only")))
    assert_twins_agree(*models, inputs())


def test_gram_schmidt_with_pefts_default_initialisation_is_named_once_with_its_remedy(unpatched):
    model = get_peft_model(Net().double(), config(apply_GS=True, init_weights=True))
    with pytest.warns(UserWarning) as record:
        peftkern.accelerate(model)
    (text,) = messages(record)
    assert "base_model.model.a, base_model.model.b" in text and "init_weights=False" in text
    assert torch.isfinite(model(inputs())).all()
    peftkern.patch_peft()
    with pytest.warns(UserWarning) as record:
        get_peft_model(Net(), HRAConfig(r=4, apply_GS=True, target_modules=["a"]))
    assert len(messages(record)) == 1
