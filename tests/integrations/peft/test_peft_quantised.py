"""HRA on bitsandbytes base layers, where PEFT crashes (4 bit) or multiplies by int8 codes (8 bit)."""

import pytest
import torch
from peft import HRAConfig, get_peft_model
from peft_models import relative, unpatched
from torch import nn

import peftkern
from peftkern.integrations.peft.hra import Accelerated

bnb = pytest.importorskip("bitsandbytes")

__all__ = ["unpatched"]


def _quantised(kind, bias=True):
    source = nn.Linear(64, 96, bias=bias)
    if kind == "4 bit":
        layer = bnb.nn.Linear4bit(64, 96, bias=bias, compute_dtype=torch.bfloat16, quant_type="nf4")
    else:
        layer = bnb.nn.Linear8bitLt(64, 96, bias=bias, has_fp16_weights=False)
    layer.load_state_dict(source.state_dict())
    return layer.to("cpu")


def _weight(layer):
    if isinstance(layer, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).double()
    scale = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
    return layer.weight.data.double() * scale.double()[:, None] / 127


def _rotated(x, u):
    for v in reversed(u.double().unbind(1)):
        v = v / v.norm()
        x = x - 2 * (x @ v)[..., None] * v
    return x


def _model(kind, **options):
    net = nn.Sequential(nn.Linear(32, 64), _quantised(kind))
    options = {"r": 4, "target_modules": ["0", "1"], "init_weights": False, **options}
    return get_peft_model(net, HRAConfig(**options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["4 bit", "8 bit"])
def test_output_and_gradients_are_those_of_the_rotated_input_and_the_dequantised_weight(kind, dtype):
    model = _model(kind)
    layer = model.base_model.model[1]
    report = peftkern.accelerate(model)
    name = type(layer.base_layer).__name__
    assert report.layers["base_model.model.1"].reason == f"the base layer is quantised ({name})"
    x = torch.randn(40, 64).to(dtype).requires_grad_(True)
    u = layer.hra_u["default"]
    x64, u64 = (t.detach().double().requires_grad_(True) for t in (x, u))
    weights = torch.randn(40, 96).to(dtype)
    y = layer(x)
    y64 = _rotated(x64, u64) @ _weight(layer.base_layer).T + layer.base_layer.bias.double()
    assert y.dtype is dtype
    # One rounding to half precision, or float32 sums over 96 outputs.
    half = torch.bfloat16 if kind == "4 bit" else dtype
    bound = torch.finfo(half).eps * (1 if half is not torch.float32 else 96**0.5 / 2)
    assert relative(y, y64) <= bound
    grads = torch.autograd.grad((y * weights).sum(), (x, u))
    grads64 = torch.autograd.grad((y64 * weights.double()).sum(), (x64, u64))
    for ours, exact in zip(grads, grads64, strict=True):
        assert relative(ours, exact) <= bound


@pytest.mark.parametrize("kind", ["4 bit", "8 bit"])
def test_pefts_own_layer_crashes_or_is_wrong_on_the_same_base(kind):
    model = _model(kind)
    layer, x = model.base_model.model[1], torch.randn(5, 64)
    exact = _rotated(x.double(), layer.hra_u["default"]) @ _weight(layer.base_layer).T + layer.base_layer.bias.double()
    if kind == "4 bit":
        with pytest.raises(RuntimeError):
            layer(x)
    else:
        assert relative(layer(x), exact) > 10


@pytest.mark.parametrize("patch", [False, True], ids=["accelerate", "patch_peft"])
@pytest.mark.parametrize("kind", ["4 bit", "8 bit"])
def test_merging_is_refused_before_anything_is_changed(kind, patch, unpatched):
    if patch:
        peftkern.patch_peft()
    model = _model(kind)
    if not patch:
        peftkern.accelerate(model)
    assert all(isinstance(layer, Accelerated) for layer in model.base_model.model)
    before = [layer.base_layer.weight.detach().clone() for layer in model.base_model.model]
    for merge in (model.merge_adapter, model.merge_and_unload, model.base_model.model[1].merge):
        with pytest.raises(ValueError, match="HRA cannot be merged into a quantised base layer") as error:
            merge()
        assert "\n" not in str(error.value)
    for layer, weight in zip(model.base_model.model, before, strict=True):
        assert torch.equal(layer.base_layer.weight, weight) and not layer.merged


@torch.no_grad()
@pytest.mark.parametrize("kind", ["4 bit", "8 bit"])
def test_disabling_unloading_and_saving_work_as_on_a_plain_base(kind, tmp_path):
    model = _model(kind).eval()  # bitsandbytes has other kernels for training
    peftkern.accelerate(model)
    x = torch.randn(5, 32)
    y = model(x)
    with model.disable_adapter():
        base = model(x)
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "again")
    model.set_adapter("again")
    assert torch.equal(model(x), y)
    unloaded = model.unload()
    assert torch.equal(unloaded(x), base) and not torch.equal(base, y)


def test_a_quantised_model_trains_through_accelerated_layers():
    model = _model("4 bit", init_weights=True)
    peftkern.accelerate(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, 1e-2)
    x, target = torch.randn(64, 32), torch.randn(64, 96)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        losses.append((model(x) - target).square().mean())
        losses[-1].backward()
        optimizer.step()
    assert len(parameters) == 2 and losses[-1] < losses[0]
