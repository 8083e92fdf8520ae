"""What accelerate, restore and patch_peft do to a model, report, refuse and leave alone."""

import copy

import peft
import pytest
import torch
from peft import HRAConfig, LoraConfig, get_peft_model
from peft.tuners.hra import HRAConv2d, HRALinear
from peft.tuners.hra import HRAModel as PeftHRAModel
from peft_models import ConvNet, Net, config, inputs, messages, relative, twins, unpatched
from torch import nn

import peftkern
from peftkern import dispatch
from peftkern.integrations.peft.hra import Accelerated

__all__ = ["unpatched"]


def _snapshot(model):
    return [(type(m), sorted(m.__dict__)) for m in model.modules()], copy.deepcopy(model.state_dict())


def _unchanged(model, before):
    classes, state = before
    assert [(type(m), sorted(m.__dict__)) for m in model.modules()] == classes
    assert all(torch.equal(value.nan_to_num(), state[key].nan_to_num()) for key, value in model.state_dict().items())


def test_report_names_the_layers_and_prints_one_line_per_pattern():
    net = nn.Sequential(*[nn.ModuleDict({"q": nn.Linear(8, 8)}) for _ in range(12)]).bfloat16()
    net[3]["q"].register_forward_hook(lambda *_: None)
    model = get_peft_model(net, HRAConfig(r=2, target_modules=["q"]))
    report = peftkern.accelerate(model)
    assert report.replaced == [f"base_model.model.{i}.q" for i in range(12)]
    assert report.skipped == [] and report.reason is None
    assert report.layers["base_model.model.0.q"].precision == "exact"
    lines = str(report).splitlines()
    assert lines[0] == "peftkern: 12 layers accelerated, 0 left to PEFT"
    assert lines[3].split() == ["base_model.model.*.q", "11", "HRALinear", "default", "exact"]
    assert lines[4].endswith("fast (the base layer has hooks)") and lines[4].startswith("base_model.model.3.q  1 ")
    assert len(lines) == 5


@pytest.mark.parametrize("precision", ["auto", "fast", "exact"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_report_says_which_precision_serves(dtype, precision):
    model = get_peft_model(Net().to(dtype), config())
    layer = peftkern.accelerate(model, precision=precision).layers["base_model.model.a"]
    half = dtype in (torch.bfloat16, torch.float16)
    assert layer.precision == ("exact" if half and precision != "fast" else "fast")
    assert bool(layer.reason) == (not half and precision != "fast")


def test_accelerating_twice_changes_only_the_precision():
    model = get_peft_model(Net(), config())
    first, before = peftkern.accelerate(model), _snapshot(model)
    second = peftkern.accelerate(model, precision="fast")
    assert first.replaced == second.replaced
    _unchanged(model, before)
    assert {m.peftkern_precision for m in model.modules() if isinstance(m, Accelerated)} == {"fast"}


def test_precision_decides_what_is_kept_of_a_small_update():
    model = get_peft_model(Net().bfloat16(), config(init_weights=True))
    layer, x = model.base_model.model.a, inputs(torch.bfloat16, rows=(400,))
    with torch.no_grad():
        layer.hra_u["default"].add_(2e-4 * torch.randn(24, 4))
        base = x.double() @ layer.base_layer.weight.double().T + layer.base_layer.bias.double()
        delta = copy.deepcopy(layer).double()(x.double()) - base
        gains = {}
        for precision in ("fast", "auto", "exact"):
            peftkern.accelerate(model, precision=precision)
            gains[precision] = float(((layer(x).double() - base) * delta).sum() / delta.square().sum())
    assert abs(gains["auto"] - 1) < 0.06 and gains["exact"] == gains["auto"]
    assert gains["fast"] < 0.5, gains


def test_restore_gives_back_pefts_classes_and_attributes():
    model = get_peft_model(Net().double(), config())
    before, y = _snapshot(model), model(inputs())
    names = peftkern.accelerate(model).replaced
    assert not torch.equal(model(inputs()), y)
    assert peftkern.restore(model) == names
    _unchanged(model, before)
    assert torch.equal(model(inputs()), y)
    assert peftkern.restore(model) == []


def test_accelerate_consumes_no_random_numbers_and_touches_no_gradient():
    model = get_peft_model(Net(), config())
    model(inputs(torch.float32)).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    peftkern.accelerate(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is grads[name] for name, p in model.named_parameters())


def test_accelerated_layers_are_pefts_and_print_as_pefts():
    plain, fast = twins()
    layer = fast.base_model.model.a
    assert isinstance(layer, HRALinear) and isinstance(fast.base_model, PeftHRAModel)
    assert type(layer).__name__ == "HRALinear" and repr(fast) == repr(plain)
    assert type(layer) is getattr(__import__(type(layer).__module__, fromlist=["x"]), type(layer).__qualname__)


@pytest.mark.parametrize(
    "call", [peftkern.accelerate, lambda m, p: peftkern.patch_peft(p)], ids=["accelerate", "patch"]
)
def test_an_unknown_precision_is_refused_before_anything_is_changed(call):
    model = get_peft_model(Net(), config())
    before = _snapshot(model)
    with pytest.raises(ValueError, match="precision must be one of auto, fast, exact; got 'half'"):
        call(model, "half")
    _unchanged(model, before)


@pytest.mark.parametrize(
    ("compat", "sentence"),
    [
        ("PEFT", "compat must be None, \"peft\" or a list of layer names; got 'PEFT'"),
        (["nowhere"], "compat names layers that are not accelerated: nowhere"),
    ],
)
def test_an_unknown_compat_is_refused_before_anything_is_changed(compat, sentence):
    model = get_peft_model(Net(), config())
    before = _snapshot(model)
    with pytest.raises(ValueError) as error:
        peftkern.accelerate(model, compat=compat)
    assert str(error.value) == sentence
    _unchanged(model, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_parameters_that_are_not_finite_are_named_before_anything_is_changed(value):
    model = get_peft_model(Net(), config())
    model.add_adapter("other", config())
    with torch.no_grad():
        model.base_model.model.b.hra_u["other"][0, 0] = value
    before = _snapshot(model)
    with pytest.raises(ValueError) as error:
        peftkern.accelerate(model)
    assert str(error.value) == (
        "hra_u of layer 'base_model.model.b', adapter 'other', has values that are not finite; nothing was changed"
    )
    _unchanged(model, before)


def test_parameters_on_the_meta_device_are_accelerated_unchecked():
    model = get_peft_model(Net(), config(), low_cpu_mem_usage=True)
    assert model.base_model.model.a.hra_u["default"].is_meta
    assert len(peftkern.accelerate(model).replaced) == 2


@pytest.mark.parametrize("function", [peftkern.accelerate, peftkern.restore])
def test_something_that_is_no_module_is_refused(function):
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module; got str"):
        function("model")


def test_a_model_without_adapters_is_left_alone_with_the_reason():
    net = Net()
    before = _snapshot(net)
    report = peftkern.accelerate(net)
    assert (report.replaced, report.skipped) == ([], [])
    assert str(report) == "peftkern: nothing accelerated: this Net has no adapter layer of PEFT"
    _unchanged(net, before)


def test_another_peft_version_is_left_alone_with_one_sentence(monkeypatch):
    model = get_peft_model(Net(), config())
    before = _snapshot(model)
    monkeypatch.setattr(peft, "__version__", "0.99.0")
    report = peftkern.accelerate(model)
    assert "PEFT 0.99.0 is not known to peftkern" in report.reason and report.replaced == []
    with pytest.warns(UserWarning, match="patch_peft changes nothing: PEFT 0.99.0"):
        peftkern.patch_peft()
    _unchanged(model, before)
    assert not isinstance(get_peft_model(Net(), config()).base_model.model.a, Accelerated)


def test_the_switch_turns_everything_off(monkeypatch):
    _, fast = twins(dtype=torch.float32)
    model = get_peft_model(Net(), config())
    before, x = _snapshot(model), inputs(torch.float32)
    monkeypatch.setattr(dispatch, "DISABLED", True)
    assert peftkern.accelerate(model).reason == "PEFTKERN_DISABLE=1 is set"
    with pytest.warns(UserWarning, match="PEFTKERN_DISABLE=1 is set"):
        peftkern.patch_peft()
    _unchanged(model, before)
    peftkern.stats(reset=True)
    fast(x)
    assert peftkern.stats()["hra"]["reasons"] == {"PEFTKERN_DISABLE=1": 2}


def test_layers_of_other_methods_are_listed_as_not_covered():
    model = get_peft_model(Net(), LoraConfig(target_modules=["a"]))
    before = _snapshot(model)
    report = peftkern.accelerate(model)
    assert report.replaced == []
    assert report.skipped == [("base_model.model.a", "lora.Linear is not covered")]
    assert "PEFT: lora.Linear is not covered" in str(report)
    _unchanged(model, before)


def test_an_adapter_around_another_adapter_is_left_to_peft():
    with pytest.warns(UserWarning):
        model = get_peft_model(get_peft_model(Net(), LoraConfig(target_modules=["a"])).base_model.model, config())
    x = inputs(torch.float32)
    y = model(x)
    report = peftkern.accelerate(model)
    assert ("base_model.model.a", "it wraps another adapter layer (Linear)") in report.skipped
    assert report.replaced == ["base_model.model.b"]
    assert relative(model(x), y) < 1e-6


class _Wrapped(HRALinear):
    pass


def test_classes_derived_from_pefts_and_replaced_forwards_are_left_alone_with_the_reason():
    model = get_peft_model(Net(), config(target_modules=["a", "b", "c"]))
    inner = model.base_model.model
    inner.a.__class__ = _Wrapped
    inner.b.forward = lambda x: x
    reasons = dict(peftkern.accelerate(model).skipped)
    assert "_Wrapped, is not PEFT's own" in reasons["base_model.model.a"]
    assert "its forward was replaced on the instance" in reasons["base_model.model.b"]
    assert type(inner.a) is _Wrapped and type(inner.b) is HRALinear and isinstance(inner.c, Accelerated)


@pytest.mark.parametrize(
    ("x", "error", "sentence"),
    [
        (torch.zeros(2, 23), ValueError, "K = 24"),
        (torch.zeros(2, 24, dtype=torch.int64), TypeError, "the input must be floating; got torch.int64"),
        (torch.zeros(2, 24, device="meta"), ValueError, "the input is on meta, the adapter on cpu"),
    ],
)
def test_a_wrong_input_is_refused_in_one_sentence(x, error, sentence):
    _, fast = twins(dtype=torch.float32)
    with pytest.raises(error, match=sentence) as refusal:
        fast.base_model.model.a(x)
    assert "\n" not in str(refusal.value)


def test_one_layer_alone_can_be_accelerated():
    layer = get_peft_model(Net().double(), config()).base_model.model.a
    x = inputs()
    y = layer(x)
    assert peftkern.accelerate(layer).replaced == [""]
    assert relative(layer(x), y) < 1e-13


def test_a_kernel_that_is_not_square_is_skipped_after_peft_and_right_from_birth(unpatched):
    net = ConvNet(kernel_size=(3, 2), padding=(1, 0), stride=(2, 1)).double()
    options = {"r": 2, "target_modules": ["conv"], "init_weights": False}
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64)
    plain = get_peft_model(copy.deepcopy(net), HRAConfig(**options))
    ((name, reason),) = peftkern.accelerate(plain).skipped
    assert name == "base_model.model.conv" and "hra_u has shape [27, 2], the base layer needs 18 rows" in reason
    assert type(plain.base_model.model.conv) is HRAConv2d

    peftkern.patch_peft()
    model = get_peft_model(net, HRAConfig(**options))
    model.add_adapter("other", HRAConfig(**{**options, "r": 4, "init_weights": True}))
    layer = model.base_model.model.conv
    assert [tuple(u.shape) for u in layer.hra_u.values()] == [(18, 2), (18, 4)]
    model.base_model.set_adapter(["default", "other"])
    y = model(x)
    model.merge_adapter(safe_merge=True)
    merged = layer.base_layer.weight.clone()
    assert relative(model(x), y) < 1e-13
    model.unmerge_adapter()
    assert relative(layer.base_layer.weight, merged) > 1e-2
    assert relative(model(x), y) < 1e-13
    with pytest.warns(UserWarning) as record:
        assert peftkern.restore(model) == []
    assert messages(record) == [
        "peftkern: restore leaves layers that PEFT's classes cannot serve: base_model.model.conv"
    ]


ODD = {
    "dilation": {"dilation": 2, "padding": 2},
    "padding_mode": {"padding_mode": "circular", "padding": 1},
    "the second padding": {"padding": (1, 2)},
    "the second stride": {"stride": (1, 2)},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("what", ODD)
def test_a_convolution_is_its_merged_weights_convolution_and_pefts_on_demand(what, dtype):
    net = ConvNet(**ODD[what]).to(dtype)
    plain = get_peft_model(net, HRAConfig(r=2, target_modules=["conv"], init_weights=False))
    x = torch.randn(2, 3, 9, 8).to(dtype)
    theirs = plain(x)
    merged = copy.deepcopy(plain).double()
    merged.merge_adapter()
    exact = merged(x.double())
    roundoff = torch.finfo(dtype).eps
    with pytest.warns(UserWarning, match=f"PEFT's HRA forward ignores {what} of base_model.model.conv"):
        peftkern.accelerate(plain)
    ours = plain(x)
    assert ours.shape == exact.shape and relative(ours, exact) <= 4 * roundoff
    assert theirs.shape != exact.shape or relative(theirs, exact) > 0.1
    for compat in ("peft", ["base_model.model.conv"]):
        peftkern.stats(reset=True)
        peftkern.accelerate(plain, compat=compat)
        compatible = plain(x)
        assert compatible.shape == theirs.shape and relative(compatible, theirs) <= 4 * roundoff
        assert peftkern.stats()["hra"]["reasons"] == {'compat="peft"': 1}


def test_a_checkpoint_loaded_into_such_a_convolution_is_named(tmp_path, unpatched):
    options = {"r": 2, "target_modules": ["conv"], "init_weights": False}
    net = ConvNet(dilation=2)
    get_peft_model(copy.deepcopy(net), HRAConfig(**options)).save_pretrained(tmp_path)
    peftkern.patch_peft()
    with pytest.warns(UserWarning) as record:
        peft.PeftModel.from_pretrained(net, tmp_path)
    (text,) = messages(record)
    assert "ignores dilation of conv" in text and 'compat="peft"' in text


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_by_name_works_where_peft_fails(padding):
    plain, fast = twins(ConvNet(padding=padding), target_modules=["conv"], r=2)
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64)
    with pytest.raises(RuntimeError):
        plain(x)
    y = fast(x)
    fast.merge_adapter()
    assert relative(fast(x), y) < 1e-13


def test_a_channels_last_convolution_merges_where_peft_fails():
    plain, fast = twins(ConvNet(), target_modules=["conv"], r=2)
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64)
    y = fast(x)
    for model in (plain, fast):
        model.to(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError):
        plain.merge_adapter()
    fast.merge_adapter()
    assert relative(fast(x), y) < 1e-13
    assert fast.base_model.model.conv.base_layer.weight.is_contiguous(memory_format=torch.channels_last)
