"""Merging, enabling, copying, state dicts, meta construction, checkpoints, wrap, and what each refusal says."""

import copy
import io

import oracle
import pytest
import safetensors.torch
import torch
from adapted import FLOATS, hra_conv, hra_linear, rotation, truth
from torch import nn

import peftkern
from peftkern.nn import HRAConv2d, HRALinear, load_adapters, save_adapters, wrap

BOTH = pytest.mark.parametrize("make", [hra_linear, hra_conv])


def example(layer, dtype=torch.float32):
    shape = (6, 24) if isinstance(layer, HRALinear) else (2, 3, 9, 8)
    return torch.randn(shape).to(dtype)


def snapshot(module):
    """Every tensor by name, with its flags, cloned."""
    tensors = module.state_dict(keep_vars=True)
    return {name: (t.detach().clone(), t.requires_grad) for name, t in tensors.items()}


def assert_unchanged(module, before):
    after = snapshot(module)
    assert after.keys() == before.keys()
    for name, (tensor, trained) in before.items():
        assert torch.equal(after[name][0], tensor) and after[name][1] == trained, name


@BOTH
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("apply_gs", [False, True], ids=["chain", "gram_schmidt"])
def test_merge_writes_w_h_and_unmerge_rotates_it_back(make, dtype, apply_gs):
    layer = make(dtype=dtype, **({"apply_gs": apply_gs} if make is hra_linear else {"layer": {"apply_gs": apply_gs}}))
    weight = layer.base_layer.weight.detach().clone()
    merged = (weight.double().flatten(1) @ rotation(layer.hra_u, apply_gs)).view(weight.shape)
    x = example(layer, dtype)
    adapted = truth(layer, x).detach()
    address = layer.base_layer.weight.data_ptr()
    layer.merge()
    eps = max(torch.finfo(dtype).eps, 1e-15)
    assert layer.merged and layer.base_layer.weight.dtype is dtype and layer.base_layer.weight.data_ptr() == address
    assert oracle.error(layer.base_layer.weight.detach(), merged) <= 8 * eps
    assert torch.equal(layer(x), layer.base_layer(x))
    assert oracle.error(layer(x).detach(), adapted) <= 8 * eps
    layer.merge()
    assert oracle.error(layer.base_layer.weight.detach(), merged) <= 8 * eps
    layer.unmerge()
    assert not layer.merged
    assert oracle.error(layer.base_layer.weight.detach(), weight) <= 8 * eps
    layer.unmerge()
    assert oracle.error(layer.base_layer.weight.detach(), weight) <= 8 * eps


@BOTH
def test_unmerge_is_the_inverse_rotation_of_what_the_weight_is_now(make):
    layer = make()
    weight = layer.base_layer.weight.detach().clone()
    layer.merge()
    with torch.no_grad():
        layer.base_layer.weight.mul_(3)
    layer.unmerge()
    assert oracle.error(layer.base_layer.weight.detach(), 3 * weight) <= 1e-6


@BOTH
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["hra_u", "weight"])
def test_merge_refuses_what_is_not_finite_and_changes_nothing(make, bad, where):
    layer = make()
    with torch.no_grad():
        (layer.hra_u if where == "hra_u" else layer.base_layer.weight).view(-1)[3] = bad
    weight = layer.base_layer.weight.detach().clone()
    with pytest.raises(ValueError, match="the merged weight is not finite; nothing was changed"):
        layer.merge()
    assert not layer.merged and torch.equal(layer.base_layer.weight.nan_to_num(), weight.nan_to_num())


def test_merge_refuses_an_overflow_of_half_precision():
    layer = hra_linear(dtype=torch.float16)
    with torch.no_grad():
        layer.base_layer.weight.fill_(6e4)
    with pytest.raises(ValueError, match="not finite"):
        layer.merge()
    assert torch.equal(layer.base_layer.weight, torch.full_like(layer.base_layer.weight, 6e4))


def test_merge_refuses_a_quantised_or_parametrised_weight():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    quantised = HRALinear(bitsandbytes.nn.Linear4bit(64, 32).to("cpu"), 4)
    with pytest.raises(TypeError, match="merging needs a plain floating weight; Linear4bit holds Params4bit"):
        quantised.merge()
    parametrised = hra_linear()
    nn.utils.parametrizations.weight_norm(parametrised.base_layer)
    with pytest.raises(TypeError, match="merging needs a plain floating weight"):
        parametrised.merge()
    assert not quantised.merged and not parametrised.merged


def test_a_quantised_base_layer_is_rotated_in_front():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    base = bitsandbytes.nn.Linear4bit(64, 32, compute_dtype=torch.float32).to("cpu")
    layer = HRALinear(base, 4)
    with torch.no_grad():
        layer.hra_u.normal_()
    x = torch.randn(6, 64)
    assert oracle.error(layer(x).detach(), base(peftkern.rotate(x, layer.hra_u)).detach()) <= 1e-6
    layer(x).sum().backward()
    assert layer.hra_u.grad.any()


@BOTH
def test_disable_and_enable_switch_the_adapter(make):
    layer = make()
    x = example(layer)
    adapted, base = layer(x), layer.base_layer(x)
    layer.disable()
    assert torch.equal(layer(x), base) and "disabled" in repr(layer)
    with pytest.raises(RuntimeError, match="the adapter is disabled"):
        layer.merge()
    layer.enable()
    assert torch.equal(layer(x), adapted)
    layer.merge()
    with pytest.raises(RuntimeError, match="merged into the weight"):
        layer.disable()


@BOTH
def test_state_dict_round_trip(make):
    layer, other = make(), make()
    assert set(layer.state_dict()) == {"hra_u", "base_layer.weight", "base_layer.bias"}
    x = example(layer)
    assert not torch.equal(layer(x), other(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), other(x))


@BOTH
def test_deepcopy_and_pickle_give_an_equal_and_independent_layer(make):
    layer = make()
    x = example(layer)
    with torch.no_grad():
        layer(x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), layer(x)) and other._cache is not layer._cache
        before = layer(x)
        with torch.no_grad():
            other.hra_u.normal_()
            assert torch.equal(layer(x), before) and not torch.equal(other(x), before)


@pytest.mark.parametrize("apply_gs", [False, True])
def test_a_layer_built_on_meta_runs_there_and_is_drawn_after_to_empty(apply_gs):
    with torch.device("meta"):
        linear = HRALinear(nn.Linear(24, 16, dtype=torch.bfloat16), 4, apply_gs)
        conv = HRAConv2d(nn.Conv2d(3, 5, 3, dtype=torch.bfloat16), 4, apply_gs)
        assert linear(torch.empty(2, 24, dtype=torch.bfloat16)).shape == (2, 16)
        assert conv(torch.empty(2, 3, 9, 8, dtype=torch.bfloat16)).shape == (2, 5, 7, 6)
    for layer, base in ((linear, nn.Linear(24, 16)), (conv, nn.Conv2d(3, 5, 3))):
        assert layer.hra_u.is_meta
        layer.to_empty(device="cpu")
        layer.base_layer.load_state_dict(base.state_dict())
        layer.reset_parameters()
        assert torch.isfinite(layer.hra_u).all() and layer.hra_u.norm() > 0
        pairs = torch.equal(layer.hra_u[:, 0::2], layer.hra_u[:, 1::2])
        assert pairs is not apply_gs


def test_a_seed_draws_the_same_adapter_whatever_the_default_device_and_dtype():
    def draw():
        torch.manual_seed(3)
        return HRALinear(base, 4).hra_u.detach()

    base = nn.Linear(24, 16)
    expected = draw()
    with torch.device("meta"):
        assert torch.equal(draw(), expected)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(draw(), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("r", [0, -1, 2.0, True, "4"])
def test_r_below_one_is_refused_before_the_base_layer_is_frozen(r):
    for kind, base in ((HRALinear, nn.Linear(4, 4)), (HRAConv2d, nn.Conv2d(3, 5, 3))):
        with pytest.raises(ValueError, match=f"{kind.__name__}: r must be an integer of at least 1; got {r!r}"):
            kind(base, r)
        assert base.weight.requires_grad


def test_wrong_base_types_groups_and_precisions_are_refused_before_the_base_layer_is_frozen():
    linear, conv, grouped = nn.Linear(4, 4), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=2)
    with pytest.raises(TypeError, match="HRALinear: base_layer must be a Linear; got Conv2d"):
        HRALinear(conv)
    with pytest.raises(TypeError, match="HRAConv2d: base_layer must be a Conv2d; got Linear"):
        HRAConv2d(linear)
    with pytest.raises(ValueError, match="HRAConv2d: groups must be 1; got a convolution with groups = 2"):
        HRAConv2d(grouped)
    with pytest.raises(ValueError, match="precision must be one of auto, fast, exact; got 'high'"):
        HRALinear(linear, precision="high")
    assert all(layer.weight.requires_grad for layer in (linear, conv, grouped))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wrong_inputs_are_refused_in_a_sentence(backend, dtype):
    linear, conv = hra_linear(dtype=dtype), hra_conv(dtype)
    with pytest.raises(TypeError, match=r"the input must be floating; got torch.int64 of shape \[2, 24\]"):
        linear(torch.ones(2, 24, dtype=torch.int64))
    with pytest.raises(TypeError, match="the input must be floating"):
        conv(torch.ones(2, 3, 9, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"x must have K = 24 columns like V; got \w+ of shape \[2, 23\]"):
        linear(torch.ones(2, 23, dtype=dtype))
    with pytest.raises(ValueError, match=r"must have shape \[\(batch,\) 3, height, width\]; got \[2, 4, 9, 8\]"):
        conv(torch.ones(2, 4, 9, 8, dtype=dtype))
    with pytest.raises(ValueError, match=r"must have shape \[\(batch,\) 3, height, width\]; got \[9, 8\]"):
        conv(torch.ones(9, 8, dtype=dtype))
    for layer in (linear, conv):
        with pytest.raises(ValueError, match="the input is on meta, the adapter on cpu; move one of them"):
            layer(example(layer, dtype).to("meta"))


def test_a_quantised_convolution_is_refused_in_a_sentence():
    layer = hra_conv()
    nn.utils.parametrizations.weight_norm(layer.base_layer)
    with pytest.raises(TypeError, match="a convolution needs a readable floating weight"):
        layer(torch.randn(2, 3, 9, 8))


def small_model():
    return nn.ModuleDict(
        {
            "block": nn.ModuleDict({"fc1": nn.Linear(24, 16), "fc2": nn.Linear(16, 24), "norm": nn.LayerNorm(24)}),
            "conv": nn.Conv2d(3, 5, 3),
            "fc1": nn.Linear(8, 4),
        }
    )


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (["fc1"], ["block.fc1", "fc1"]),
        (["block.fc1"], ["block.fc1"]),
        (["c1"], None),
        (["fc2", "conv"], ["block.fc2", "conv"]),
        (r"block\.fc\d", ["block.fc1", "block.fc2"]),
        (r"fc1", ["fc1"]),
        (r"block\.fc", None),
        ([], None),
    ],
    ids=str,
)
def test_wrap_replaces_what_names_suffixes_or_a_pattern_of_the_whole_name_choose(targets, names):
    model = small_model()
    before = snapshot(model)
    if names is None:
        with pytest.raises(ValueError, match="target_modules must match at least one layer"):
            wrap(model, targets)
        return assert_unchanged(model, before)
    assert wrap(model, targets, r=6, precision="fast") == names
    replaced = [n for n, m in model.named_modules() if isinstance(m, (HRALinear, HRAConv2d))]
    assert sorted(replaced) == sorted(names)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {f"{n}.hra_u" for n in names}
    assert all(model.get_submodule(n).hra_u.shape[1] == 6 for n in names)
    assert all(model.get_submodule(n).precision == "fast" for n in names)


@pytest.mark.parametrize(
    ("targets", "options", "error", "message"),
    [
        (r"block\..*", {}, TypeError, "block.norm must be nn.Linear or nn.Conv2d; got LayerNorm"),
        (r".*", {}, TypeError, "the model must be nn.Linear or nn.Conv2d; got ModuleDict"),
        (["fc1", "norm"], {}, TypeError, "block.norm must be"),
        (["fc1", "grouped"], {}, ValueError, "groups must be 1"),
        (["fc1"], {"r": 0}, ValueError, "r must be an integer of at least 1"),
        (["fc1"], {"precision": "best"}, ValueError, "precision must be one of"),
        (["fc1"], {"rank": 4}, TypeError, "rank"),
    ],
)
def test_wrap_that_refuses_leaves_the_model_unchanged(targets, options, error, message):
    model = small_model()
    model["grouped"] = nn.Conv2d(4, 4, 3, groups=2)
    before = snapshot(model)
    with pytest.raises(error, match=message):
        wrap(model, targets, **options)
    assert_unchanged(model, before)


def test_wrap_refuses_to_replace_the_model_itself_and_a_weight_that_is_never_called():
    with pytest.raises(ValueError, match="the model is itself a Linear; put it into HRALinear"):
        wrap(nn.Linear(4, 4), ".*")
    attention = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    with pytest.raises(TypeError, match=r"attention.out_proj is never called, nn.MultiheadAttention reads its weight"):
        wrap(attention, ["out_proj"])


def test_wrap_twice_keeps_the_adapters_of_the_first_call_trainable_and_does_not_nest():
    model = small_model()
    wrap(model, ["fc1"])
    first = model["fc1"]
    assert wrap(model, r".*fc.*") == ["block.fc2"]
    assert model["fc1"] is first and isinstance(first.base_layer, nn.Linear)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"block.fc1.hra_u", "fc1.hra_u", "block.fc2.hra_u"}
    with pytest.raises(ValueError, match="must match at least one layer"):
        wrap(model, ["fc1"])


def test_wrap_gives_a_layer_with_two_names_one_adapter():
    model = nn.ModuleDict({"a": nn.Linear(4, 4)})
    model["b"] = model["a"]
    assert wrap(model, ["a", "b"]) == ["a", "b"]
    assert model["a"] is model["b"] and isinstance(model["a"], HRALinear)


@pytest.fixture
def adapted(tmp_path):
    model = small_model()
    wrap(model, ["fc1", "conv"], r=4)
    for layer in (model["fc1"], model["conv"], model["block"]["fc1"]):
        nn.init.normal_(layer.hra_u)
    save_adapters(model, tmp_path / "adapter.safetensors")
    return model, tmp_path / "adapter.safetensors"


def test_adapters_round_trip_under_pefts_names(adapted):
    model, path = adapted
    names = ("block.fc1", "conv", "fc1")
    assert set(safetensors.torch.load_file(path)) == {f"base_model.model.{name}.hra_u" for name in names}
    other = small_model()
    wrap(other, ["fc1", "conv"], r=4)
    load_adapters(other, path)
    for name in names:
        loaded = other.get_submodule(name).hra_u
        assert torch.equal(loaded, model.get_submodule(name).hra_u) and loaded.requires_grad


def test_saving_a_model_without_adapters_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the model has no adapter layer"):
        save_adapters(small_model(), tmp_path / "adapter.safetensors")
    assert not list(tmp_path.iterdir())


def _missing(tensors):
    del tensors["base_model.model.conv.hra_u"]


def _unknown(tensors):
    tensors["base_model.model.block.fc2.hra_u"] = torch.ones(16, 4)


def _shape(tensors):
    tensors["base_model.model.fc1.hra_u"] = torch.ones(8, 6)


def _nan(tensors):
    tensors["base_model.model.fc1.hra_u"][0, 0] = float("nan")


def _overflow(tensors):
    tensors["base_model.model.fc1.hra_u"] = torch.full((8, 4), 1e300, dtype=torch.float64)


def _integer(tensors):
    tensors["base_model.model.fc1.hra_u"] = torch.ones(8, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_missing, "has no hra_u for conv"),
        (_unknown, "the model has no adapter layer for block.fc2"),
        (_shape, r"hra_u of fc1 must have shape \[8, 4\]; .* holds \[8, 6\]"),
        (_nan, "hra_u of fc1 in .* has values that are not finite"),
        (_overflow, "hra_u of fc1 in .* has values that are not finite"),
        (_integer, "hra_u of fc1 in .* must be floating"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_and_nothing_changed(adapted, spoil, message):
    model, path = adapted
    tensors = safetensors.torch.load_file(path)
    for name in tensors:
        tensors[name] = tensors[name] + 1
    spoil(tensors)
    safetensors.torch.save_file(tensors, path)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        load_adapters(model, path)
    assert_unchanged(model, before)


def test_loading_into_a_merged_layer_is_refused(adapted):
    model, path = adapted
    model["fc1"].merge()
    with pytest.raises(ValueError, match="fc1 is merged into its weight"):
        load_adapters(model, path)
