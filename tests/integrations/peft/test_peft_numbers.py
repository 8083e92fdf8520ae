"""Forward and gradients of accelerated PEFT layers against PEFT's own, both judged in float64."""

import copy

import pytest
import torch
from peft import HRAConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from peft_models import DTYPES, ConvNet, Net, config, inputs, relative, twins
from torch import nn

import peftkern

CHAINS = {
    "r4": ({"r": 4}, None),
    "r1": ({"r": 1}, None),
    "r5": ({"r": 5}, None),
    "gs": ({"apply_GS": True}, None),
    "two": ({"r": 4}, {"r": 3}),
    "two gs": ({"apply_GS": True}, {"r": 3, "apply_GS": True}),
    "gs then plain": ({"apply_GS": True}, {"r": 3}),
    "plain then gs": ({"r": 6}, {"r": 2, "apply_GS": True}),
}


def _gradients(model, x, weights):
    x = x.detach().clone().requires_grad_(True)
    names, parameters = zip(*[(n, p) for n, p in model.named_parameters() if p.requires_grad], strict=True)
    y = model(x)
    return y, dict(zip(("x", *names), torch.autograd.grad((y * weights).sum(), (x, *parameters)), strict=True))


@pytest.mark.parametrize("chain", CHAINS)
def test_outputs_and_gradients_are_pefts_in_float64(chain):
    first, second = CHAINS[chain]
    plain, fast = twins(second=None if second is None else config(**second), **first)
    for model in (plain, fast):
        model.base_model.set_adapter(["default", "other"] if second else ["default"])
    x, weights = inputs(), torch.randn(2, 5, 3, dtype=torch.float64)
    (y, grads), (y_fast, grads_fast) = _gradients(plain, x, weights), _gradients(fast, x, weights)
    assert relative(y_fast, y) < 1e-13
    for name, grad in grads.items():
        assert relative(grads_fast[name], grad) < 1e-12, name


@pytest.mark.parametrize("order", [["default", "other"], ["other", "default"]])
def test_several_active_adapters_multiply_in_pefts_order(order):
    plain, fast = twins(second=config(r=3))
    for model in (plain, fast):
        model.base_model.set_adapter(order)
    x = inputs()
    assert relative(fast(x), plain(x)) < 1e-13
    plain.base_model.set_adapter(order[::-1])
    assert relative(fast(x), plain(x)) > 1e-3


def _layer_pair(dtype_name, **options):
    x_dtype, base_dtype, adapter_dtype = DTYPES[dtype_name]
    net = nn.Sequential(nn.Linear(96, 80)).to(base_dtype)
    plain = get_peft_model(net, HRAConfig(**{"r": 8, "target_modules": ["0"], "init_weights": False, **options}))
    plain.base_model.model[0].hra_u.to(adapter_dtype)
    fast = copy.deepcopy(plain)
    peftkern.accelerate(fast)
    exact = copy.deepcopy(plain).double()
    return plain, fast, exact, torch.randn(64, 96).to(x_dtype)


@pytest.mark.parametrize("gs", [False, True], ids=["product", "gs"])
@pytest.mark.parametrize("dtypes", [name for name in DTYPES if name != "fp64"])
def test_output_error_is_at_most_twice_pefts_and_its_dtype_is_pefts(dtypes, gs):
    plain, fast, exact, x = _layer_pair(dtypes, apply_GS=gs)
    y = exact(x.double())
    roundoff = torch.finfo(x.dtype).eps / 2
    assert fast(x).dtype is plain(x).dtype is x.dtype
    assert relative(fast(x), y) <= max(2 * relative(plain(x), y), roundoff)


@pytest.mark.parametrize("dtypes", [name for name in DTYPES if name != "fp64"])
def test_gradient_errors_are_at_most_twice_pefts_and_their_dtypes_are_pefts(dtypes):
    plain, fast, exact, x = _layer_pair(dtypes)
    weights = torch.randn(64, 80).to(x.dtype)
    _, grads64 = _gradients(exact, x.double(), weights.double())
    (_, grads), (_, grads_fast) = _gradients(plain, x, weights), _gradients(fast, x, weights)
    for name, grad in grads64.items():
        assert grads_fast[name].dtype is grads[name].dtype
        assert relative(grads_fast[name], grad) <= 2 * relative(grads[name], grad), name


@pytest.mark.parametrize("dtypes", [name for name in DTYPES if "fp32 adapter" in name])
@pytest.mark.parametrize("options", [{"precision": "fast"}, {"apply_GS": True}], ids=["fast", "gs"])
def test_other_gradients_of_mixed_dtypes_are_within_a_rounding_of_the_activations(dtypes, options):
    _, fast, exact, x = _layer_pair(dtypes, apply_GS="apply_GS" in options)
    peftkern.accelerate(fast, options.get("precision", "auto"))
    weights = torch.randn(64, 80).to(x.dtype)
    (_, grads64), (_, grads) = _gradients(exact, x.double(), weights.double()), _gradients(fast, x, weights)
    roundoff = max(torch.finfo(dtype).eps / 2 for dtype in DTYPES[dtypes])
    for name, grad in grads64.items():
        assert relative(grads[name], grad) <= roundoff, name


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_output_under_autocast_has_pefts_dtype_and_at_most_twice_its_error(base_dtype, x_dtype):
    net = nn.Sequential(nn.Linear(96, 80)).to(base_dtype)
    plain = get_peft_model(net, HRAConfig(r=8, target_modules=["0"], init_weights=False))
    fast = copy.deepcopy(plain)
    peftkern.accelerate(fast)
    x = torch.randn(64, 96).to(x_dtype)
    y = copy.deepcopy(plain).double()(x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs, ours = plain(x), fast(x)
    assert ours.dtype is theirs.dtype is x_dtype
    assert relative(ours, y) <= 2 * relative(theirs, y)


def test_without_input_dtype_casting_the_output_is_pefts():
    plain, fast = twins(dtype=torch.float32)
    x = inputs(torch.bfloat16)
    layers = [model.base_model.model.a for model in (plain, fast)]
    with disable_input_dtype_casting(plain), disable_input_dtype_casting(fast):
        theirs, ours = (layer(x) for layer in layers)
    assert ours.dtype is theirs.dtype is torch.bfloat16
    assert relative(ours, theirs) <= torch.finfo(torch.bfloat16).eps / 2
    assert all(layer.cast_input_dtype_enabled for layer in layers)


@pytest.mark.parametrize("casting", [True, False], ids=["casting", "no casting"])
def test_a_base_weight_that_hooks_keep_in_float8_serves_in_the_inputs_dtype(casting):
    net = nn.Sequential(nn.Linear(96, 80)).bfloat16()
    model = get_peft_model(net, HRAConfig(r=8, target_modules=["0"], init_weights=False))
    layer = model.base_model.model[0]
    base = layer.base_layer
    base.weight.data = base.weight.data.to(torch.float8_e4m3fn).bfloat16()
    exact, x = copy.deepcopy(model).double(), torch.randn(64, 96).bfloat16()

    def store(*_):
        base.weight.data = base.weight.data.to(torch.float8_e4m3fn)

    def load(*_):
        base.weight.data = base.weight.data.bfloat16()

    base.register_forward_pre_hook(load)
    base.register_forward_hook(store)
    store()
    peftkern.accelerate(model)
    with disable_input_dtype_casting(model, active=not casting):
        y = model(x)
    assert base.weight.dtype is torch.float8_e4m3fn
    assert y.dtype is torch.bfloat16 and relative(y, exact(x.double())) < torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("update", [3e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_auto_keeps_small_updates_of_a_half_precision_layer(update, adapter_dtype):
    net = nn.Sequential(nn.Linear(256, 256, bias=False)).to(torch.bfloat16)
    model = get_peft_model(net, HRAConfig(r=8, target_modules=["0"]))
    layer = model.base_model.model[0]
    x = torch.randn(512, 256).bfloat16()
    base = x.double() @ net[0].weight.double().T
    with torch.no_grad():
        direction = torch.randn(256, 8)
        step = 1e-3
        for _ in range(4):
            moved = copy.deepcopy(layer)
            moved.hra_u["default"].data = (layer.hra_u["default"] + step * direction).to(adapter_dtype)
            delta = copy.deepcopy(moved).double()(x.double()) - base
            step *= update / float(delta.norm() / base.norm())
        if adapter_dtype is torch.float32:
            assert 0.8 * update < float(delta.norm() / base.norm()) < 1.2 * update
        peftkern.accelerate(moved)
        gain = float(((moved(x).double() - base) * delta).sum() / delta.square().sum())
    assert 0.94 < gain < 1.06


def test_a_zero_column_is_the_identity_in_forward_and_merge():
    plain, fast = twins(r=4)
    with torch.no_grad():
        for model in (plain, fast):
            for layer in (model.base_model.model.a, model.base_model.model.b):
                layer.hra_u["default"][:, 2] = 0
    x = inputs()
    y = fast(x)
    assert torch.isnan(plain(x)).all()
    shorter, _ = twins(r=3)
    for name in "ab":
        layer, full = getattr(shorter.base_model.model, name), getattr(fast.base_model.model, name)
        layer.hra_u["default"].data = full.hra_u["default"].data[:, [0, 1, 3]]
    assert relative(y, shorter(x)) < 1e-13
    fast.merge_adapter(safe_merge=True)
    assert relative(fast(x), y) < 1e-13


@pytest.mark.parametrize("gs", [False, True], ids=["product", "gs"])
@pytest.mark.parametrize("reverse", [False, True])
def test_reflection_matrix_is_pefts(gs, reverse):
    plain, fast = twins(r=6, apply_GS=gs)
    for name in "ab":
        theirs, ours = (getattr(m.base_model.model, name).get_delta_weight("default", reverse) for m in (plain, fast))
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def test_default_initialisation_leaves_the_output_of_the_base_model_unchanged():
    base = Net().double()
    x = inputs()
    y = base(x)
    model = get_peft_model(base, config(init_weights=True))
    peftkern.accelerate(model)
    assert relative(model(x), y) < 1e-14


def test_a_trainable_base_weight_gets_its_gradient_and_a_bias_pefts():
    plain, fast = twins(bias="hra_only")
    for model in (plain, fast):
        model.base_model.model.a.base_layer.weight.requires_grad_(True)
    x, weights = inputs(), torch.randn(2, 5, 3, dtype=torch.float64)
    _, grads = _gradients(fast, x, weights)
    (plain(x) * weights).sum().backward()
    layer = plain.base_model.model.a.base_layer
    assert layer.weight.grad is None
    assert relative(grads["base_model.model.a.base_layer.bias"], layer.bias.grad) < 1e-12
    name = "base_model.model.a.base_layer.weight"
    eps, direction = 1e-6, torch.randn_like(layer.weight)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            fast.base_model.model.a.base_layer.weight.add_(sign * eps * direction)
            values.append((fast(x) * weights).sum())
            fast.base_model.model.a.base_layer.weight.sub_(sign * eps * direction)
    numeric = (values[0] - values[1]) / (2 * eps)
    torch.testing.assert_close((grads[name] * direction).sum(), numeric, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_hooks_of_the_base_layer_fire(dtype):
    plain, fast = twins(dtype=dtype)
    seen = []
    for model in (plain, fast):
        model.base_model.model.a.base_layer.register_forward_hook(lambda *_, model=model: seen.append(model))
        model(inputs(dtype))
    assert seen == [fast]
    layer = peftkern.accelerate(fast).layers["base_model.model.a"]
    assert (layer.precision, layer.reason) == ("fast", "the base layer has hooks")


@pytest.mark.parametrize("shape", [(0, 24), (24,), (1, 24), (2, 3, 5, 24)])
def test_any_leading_shape_gives_pefts_output(shape):
    plain, fast = twins()
    x = torch.randn(shape, dtype=torch.float64)
    theirs, ours = plain(x), fast(x)
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_second_derivatives_are_pefts():
    plain, fast = twins()
    grads = []
    for model in (plain, fast):
        layer = model.base_model.model.a
        x = inputs().requires_grad_(True)
        (first,) = torch.autograd.grad(layer(x).tanh().sum(), x, create_graph=True)
        grads.append(torch.autograd.grad(first.square().sum(), (x, layer.hra_u["default"])))
    for theirs, ours in zip(*grads, strict=True):
        assert relative(ours, theirs) < 1e-11


def test_torch_func_transforms_give_pefts_derivatives():
    plain, fast = twins()
    x, results = inputs(rows=(3,)), []
    for model in (plain, fast):
        layer = model.base_model.model.a

        def loss(u, row, layer=layer):
            return torch.func.functional_call(layer, {"hra_u.default": u}, (row,)).tanh().sum()

        u = layer.hra_u["default"].detach()
        results.append(
            (
                torch.vmap(torch.func.grad(loss), (None, 0))(u, x),
                torch.func.jvp(lambda u, loss=loss: loss(u, x), (u,), (torch.ones_like(u),))[1],
            )
        )
    for theirs, ours in zip(*results, strict=True):
        assert relative(ours, theirs) < 1e-11


CONVOLUTIONS = {
    "plain": {},
    "padding": {"padding": 1},
    "stride": {"stride": 2, "padding": 2},
    "1x1": {"kernel_size": 1},
    "no bias": {"bias": False},
}


@pytest.mark.parametrize("gs", [False, True], ids=["product", "gs"])
@pytest.mark.parametrize("options", CONVOLUTIONS)
def test_convolution_outputs_and_gradients_are_pefts_in_float64(options, gs):
    plain, fast = twins(ConvNet(**CONVOLUTIONS[options]), target_modules=["conv"], r=2, apply_GS=gs)
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    weights = torch.randn_like(plain(x))
    (y, grads), (y_fast, grads_fast) = _gradients(plain, x, weights), _gradients(fast, x, weights)
    assert relative(y_fast, y) < 1e-13
    for name, grad in grads.items():
        assert relative(grads_fast[name], grad) < 1e-12, name


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_convolution_output_error_in_half_precision_is_at_most_twice_pefts(adapter_dtype):
    plain, fast = twins(ConvNet(padding=1), target_modules=["conv"], dtype=torch.bfloat16)
    for model in (plain, fast):
        model.base_model.model.conv.hra_u.to(adapter_dtype)
    x = torch.randn(2, 3, 9, 8).bfloat16()
    y = copy.deepcopy(plain).double()(x.double())
    assert fast(x).dtype is torch.bfloat16
    assert relative(fast(x), y) <= 2 * relative(plain(x), y)
