"""HRALinear and HRAConv2d against W H written out in float64: values, gradients, dtypes, precision."""

import oracle
import peft
import pytest
import torch
from adapted import FLOATS, HALF, gain, gradients, hra_conv, hra_linear, small_update, true_gradients, truth
from torch import nn

from peftkern.nn import HRAConv2d, HRALinear

# Relative errors that the arithmetic of each dtype gives; half precision is that of rounding every factor once.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3}

GEOMETRIES = {
    "plain": {},
    "pointwise": {"kernel": (1, 1), "channels": (8, 5)},
    "stride": {"stride": (2, 3), "padding": 1},
    "asymmetric padding": {"padding": (2, 1)},
    "same, even kernel": {"kernel": (4, 2), "padding": "same"},
    "valid": {"padding": "valid"},
    "dilation": {"dilation": (2, 1), "padding": (1, 2)},
    "circular": {"padding": (2, 1), "padding_mode": "circular"},
    "reflect, strided": {"padding": (1, 2), "padding_mode": "reflect", "stride": (1, 2)},
    "replicate, same": {"kernel": (2, 3), "padding": "same", "padding_mode": "replicate"},
    "no bias": {"bias": False, "padding": 1},
}


def assert_close(seen, exact, tolerance):
    for name, ours, theirs in zip(("y", "dx", "du"), seen, exact, strict=True):
        assert ours.shape == theirs.shape, name
        assert oracle.error(ours, theirs) <= tolerance, f"{name}: {oracle.error(ours, theirs):.2e}"


@pytest.mark.filterwarnings("ignore:HRA starts from the identity")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("r", [1, 4, 7])
def test_linear_is_the_base_layer_with_weight_w_h(backend, dtype, r):
    layer = hra_linear((23, 17), dtype, r)
    x, dy = torch.randn(3, 5, 23).to(dtype), torch.randn(3, 5, 17).to(dtype)
    seen = gradients(layer, x, dy)
    assert [t.dtype for t in seen] == [dtype, dtype, layer.hra_u.dtype]
    assert_close(seen, true_gradients(layer, x, dy), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("precision", ["fast", "exact"])
def test_linear_with_gram_schmidt_is_the_block_reflection(backend, dtype, precision):
    layer = hra_linear((23, 17), dtype, 4, apply_gs=True, precision=precision)
    x, dy = torch.randn(3, 5, 23).to(dtype), torch.randn(3, 5, 17).to(dtype)
    assert_close(gradients(layer, x, dy), true_gradients(layer, x, dy), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_convolution_is_the_base_layer_with_kernel_w_h(backend, dtype, geometry):
    layer = hra_conv(dtype, **geometry)
    x = torch.randn(2, layer.base_layer.in_channels, 9, 8).to(dtype)
    dy = torch.randn_like(layer.base_layer(x))
    seen = gradients(layer, x, dy)
    assert [t.dtype for t in seen] == [dtype, dtype, layer.hra_u.dtype]
    assert_close(seen, true_gradients(layer, x, dy), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("precision", ["fast", "exact"])
def test_convolution_with_gram_schmidt_is_the_block_reflection(dtype, precision):
    layer = hra_conv(dtype, r=3, layer={"apply_gs": True, "precision": precision}, padding=1)
    x = torch.randn(2, 3, 9, 8).to(dtype)
    dy = torch.randn_like(layer.base_layer(x))
    assert_close(gradients(layer, x, dy), true_gradients(layer, x, dy), 1.5 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_fast_convolution_in_half_precision_is_right_too(dtype, geometry):
    layer = hra_conv(dtype, layer={"precision": "fast"}, **geometry)
    x = torch.randn(2, layer.base_layer.in_channels, 9, 8).to(dtype)
    dy = torch.randn_like(layer.base_layer(x))
    assert_close(gradients(layer, x, dy), true_gradients(layer, x, dy), 1.5 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_convolution_takes_an_unbatched_image(dtype):
    layer = hra_conv(dtype, padding=(2, 1))
    x = torch.randn(3, 9, 8).to(dtype)
    y = layer(x)
    assert torch.equal(y, layer(x[None])[0])
    assert oracle.error(y.detach(), truth(layer, x).detach()) <= TOLERANCE[dtype]


@pytest.mark.filterwarnings("ignore:HRA starts from the identity")
@pytest.mark.parametrize("r", [1, 8, 33])
def test_linear_errs_at_most_twice_as_much_as_plain_torch(backend, r):
    layer = hra_linear((300, 200), r=r)
    x, dy = torch.randn(64, 300), torch.randn(64, 200)
    w, b = layer.base_layer.weight, layer.base_layer.bias
    plain = oracle.value_and_gradients(lambda x, u: oracle.peft_linear(x, w, b, u), (x, layer.hra_u), dy)
    seen, exact = gradients(layer, x, dy), true_gradients(layer, x, dy)
    oracle.assert_as_good_as(("y", "dx", "du"), seen, plain, exact, 300)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("rows", [3, 64])
def test_linear_on_a_half_precision_base_errs_at_most_twice_as_much_as_peft(backend, dtype, rows):
    layer = hra_linear((300, 200), dtype, r=8)
    x, dy = torch.randn(rows, 300).to(dtype), torch.randn(rows, 200).to(dtype)
    w, b = layer.base_layer.weight, layer.base_layer.bias
    value = oracle.peft_linear(x, w, b, layer.hra_u).detach()
    plain = oracle.value_and_gradients(lambda x, u: oracle.black_box_linear(x, w, b, u), (x, layer.hra_u), dy)
    seen, exact = gradients(layer, x, dy), true_gradients(layer, x, dy)
    # The gradients are judged by the plain form whose base layer keeps its dtype: PEFT takes them through a float32 W.
    oracle.assert_as_good_as(("y", "dx", "du"), seen, (value, *plain[1:]), exact, 300)


def test_default_initialisation_is_the_identity(backend):
    x, image = torch.randn(5, 24), torch.randn(2, 3, 6, 6)
    for dtype in (torch.float32, torch.bfloat16):
        linear, conv = nn.Linear(24, 16).to(dtype), nn.Conv2d(3, 5, 3).to(dtype)
        y, z = HRALinear(linear, 8)(x.to(dtype)), HRAConv2d(conv, 8)(image.to(dtype))
        assert oracle.error(y, linear(x.to(dtype))) <= 2 * torch.finfo(dtype).eps
        assert oracle.error(z, conv(image.to(dtype))) <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("make", [hra_linear, hra_conv])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_an_initial_pair_are_exact_negatives(make, dtype):
    layer = make(dtype=dtype, r=2)
    with torch.no_grad():
        layer.hra_u[:, 1] = layer.hra_u[:, 0]
    x = torch.randn(6, 24).to(dtype) if make is hra_linear else torch.randn(2, 3, 9, 8).to(dtype)
    dy = torch.randn_like(layer.base_layer(x))
    exact = true_gradients(layer, x, dy)[2]
    du = gradients(layer, x, dy)[2]
    assert oracle.error(du, exact) <= TOLERANCE[dtype] * 2
    assert oracle.error(du[:, 0], -du[:, 1]) <= TOLERANCE[torch.float32]


MIXED = [
    (torch.float32, torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.bfloat16, torch.float32),
    (torch.float64, torch.float32, torch.float32),
    (torch.float32, torch.float32, torch.float64),
    (torch.bfloat16, torch.float64, torch.float64),
]


@pytest.mark.parametrize("make", [hra_linear, hra_conv])
@pytest.mark.parametrize(("x_dtype", "w_dtype", "u_dtype"), MIXED, ids=lambda d: str(d).removeprefix("torch."))
def test_mixed_dtypes_compute_in_the_widest_and_return_that_of_x(backend, make, x_dtype, w_dtype, u_dtype):
    layer = make(dtype=w_dtype, u_dtype=u_dtype)
    x = (torch.randn(6, 24) if make is hra_linear else torch.randn(2, 3, 9, 8)).to(x_dtype)
    dy = torch.randn(truth(layer, x).shape).to(x_dtype)
    y, dx, du = gradients(layer, x, dy)
    assert (y.dtype, dx.dtype, du.dtype) == (x_dtype, x_dtype, u_dtype)
    half = all(d in HALF for d in (x_dtype, w_dtype)) and x_dtype is w_dtype
    coarsest = max(torch.finfo(d).eps for d in (x_dtype, u_dtype, *([w_dtype] if half else [])))
    tolerance = max(1.5 * coarsest, TOLERANCE[torch.float32] if torch.float64 not in (w_dtype, u_dtype) else 0)
    assert_close((y, dx, du), true_gradients(layer, x, dy), max(tolerance, 1e-12))


def peft_layer(layer):
    """PEFT's own layer with the same base and the same reflections."""
    model = nn.Sequential(layer.base_layer)
    config = peft.HRAConfig(target_modules=["0"], r=layer.hra_u.shape[1])
    theirs = peft.get_peft_model(model, config, autocast_adapter_dtype=False).base_model.model[0]
    with torch.no_grad():
        theirs.hra_u["default"].data = layer.hra_u.detach().clone()
    return theirs


@pytest.mark.parametrize("autocast", HALF, ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("w_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast_dtypes_are_pefts_and_the_error_is_no_larger(backend, autocast, x_dtype, w_dtype):
    layer = hra_linear((96, 64), w_dtype, r=8)
    theirs = peft_layer(layer)
    x, dy = torch.randn(40, 96).to(x_dtype), torch.randn(40, 64).to(x_dtype)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    with torch.autocast("cpu", autocast):
        ours, his = layer(inputs[0]), theirs(inputs[1])
    ours.backward(dy)
    his.backward(dy)
    theirs_u = theirs.hra_u["default"]
    assert (ours.dtype, inputs[0].grad.dtype, layer.hra_u.grad.dtype) == (his.dtype, x_dtype, theirs_u.grad.dtype)
    exact = true_gradients(layer, x, dy)
    seen = (ours.detach(), inputs[0].grad, layer.hra_u.grad)
    plain = (his.detach(), inputs[1].grad, theirs_u.grad)
    for name, a, b, e in zip(("y", "dx", "du"), seen, plain, exact, strict=True):
        assert oracle.error(a, e) <= 1.05 * oracle.error(b, e), name


@pytest.mark.parametrize("autocast", HALF, ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("precision", ["fast", "exact"])
def test_convolution_under_autocast_returns_the_dtype_of_x(autocast, x_dtype, precision):
    layer = hra_conv(padding=1, layer={"precision": precision})
    x = torch.randn(2, 3, 9, 8).to(x_dtype)
    dy = torch.randn_like(truth(layer, x).to(x_dtype))
    with torch.autocast("cpu", autocast):
        seen = gradients(layer, x, dy)
    assert [t.dtype for t in seen] == [x_dtype, x_dtype, torch.float32]
    assert_close(seen, true_gradients(layer, x, dy), 1.5 * max(TOLERANCE[autocast], torch.finfo(x_dtype).eps))


@pytest.mark.parametrize("make", [hra_linear, hra_conv])
@pytest.mark.parametrize("precision", ["fast", "exact"])
def test_autocast_changes_no_bit_of_what_is_already_in_its_dtype(make, precision):
    """The small algebra stays float32 and float64 under autocast."""
    layer = make(dtype=torch.bfloat16)
    layer.precision = precision
    x = (torch.randn(6, 24) if make is hra_linear else torch.randn(2, 3, 9, 8)).bfloat16()
    dy = torch.randn_like(layer.base_layer(x))
    plain = gradients(layer, x, dy)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(gradients(layer, x, dy), plain, strict=True))


@pytest.mark.parametrize("state", ["disabled", "merged"])
def test_disabled_and_merged_layers_return_the_dtype_of_x_under_autocast(state):
    layer = hra_linear()
    layer.disable() if state == "disabled" else layer.merge()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 24)).dtype is torch.float32


UPDATES = [3e-4, 1e-3, 1e-2]


@pytest.mark.parametrize("size", UPDATES)
@pytest.mark.parametrize("rows", [8, 192])
@pytest.mark.parametrize("precision", ["auto", "exact"])
def test_exact_keeps_small_updates(backend, precision, rows, size):
    layer = hra_linear((512, 4096 if rows == 8 else 512), torch.bfloat16, r=8, precision=precision)
    x = torch.randn(rows, 512).bfloat16()
    base, update = small_update(layer, x, size)
    assert update.norm() / base.norm() == pytest.approx(size, rel=0.05)
    assert gain(layer(x), base, update) == pytest.approx(1, abs=0.06)


@pytest.mark.parametrize("size", UPDATES)
@pytest.mark.parametrize("w_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_exact_keeps_small_updates_under_autocast(backend, size, w_dtype):
    layer = hra_linear((512, 512), torch.bfloat16, r=8)
    layer.base_layer.to(w_dtype)
    x = torch.randn(192, 512).bfloat16()
    base, update = small_update(layer, x, size)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x.float())
    assert y.dtype is torch.float32
    assert gain(y, base, update) == pytest.approx(1, abs=0.06)


@pytest.mark.parametrize("size", UPDATES)
@pytest.mark.parametrize("autocast", [False, True])
def test_exact_convolution_keeps_small_updates(size, autocast):
    layer = hra_conv(torch.bfloat16, 8, (32, 64), (3, 3), padding=1, layer={"precision": "exact"})
    x = torch.randn(2, 32, 24, 24).bfloat16()
    base, update = small_update(layer, x, size)
    if autocast:
        layer.base_layer.float()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x)
    assert gain(y, base, update) == pytest.approx(1, abs=0.06)


@pytest.mark.parametrize("size", UPDATES)
def test_a_bfloat16_input_to_a_float32_base_keeps_small_updates(size):
    layer = hra_linear((512, 512), torch.float32, r=8, precision="auto")
    x = torch.randn(192, 512).bfloat16()
    base, update = small_update(layer, x, size)
    assert gain(layer(x), base, update) == pytest.approx(1, abs=0.06)


def test_fast_loses_small_updates_of_half_precision():
    """What `exact` is for; were this to fail, the tests of the gain above would prove nothing."""
    layer = hra_linear((512, 512), torch.bfloat16, r=8, precision="fast")
    x = torch.randn(192, 512).bfloat16()
    base, update = small_update(layer, x, 3e-4)
    assert gain(layer(x), base, update) < 0.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_precision_makes_no_difference_above_half(dtype):
    x = torch.randn(6, 24).to(dtype)
    outputs = []
    for precision in ("auto", "fast", "exact"):
        torch.manual_seed(1)
        outputs.append(hra_linear(dtype=dtype, precision=precision)(x))
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(0, 24), (2, 0, 24), (1, 24), (24,)], ids=str)
def test_no_token_and_one_token(backend, dtype, shape):
    layer = hra_linear(dtype=dtype)
    x = torch.randn(shape).to(dtype)
    y, dx, du = gradients(layer, x, torch.ones(*shape[:-1], 16))
    assert y.shape == (*shape[:-1], 16) and dx.shape == shape and torch.isfinite(du).all()
    assert bool((du != 0).any()) == (x.numel() > 0)
    assert oracle.error(y, truth(layer, x).detach()) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_image(dtype):
    layer = hra_conv(dtype, padding=1)
    y, dx, du = gradients(layer, torch.randn(0, 3, 9, 8).to(dtype), torch.ones(0, 5, 9, 9))
    assert y.shape == (0, 5, 9, 9) and dx.shape == (0, 3, 9, 8) and not du.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_inputs_and_gradients_give_the_same_as_contiguous_ones(backend, dtype):
    layer = hra_linear(dtype=dtype)
    x, dy = torch.randn(24, 12, 2).to(dtype), torch.randn(16).to(dtype)
    strided, expanded = x.permute(1, 2, 0)[::2], dy.expand(6, 2, 16)
    seen = gradients(layer, strided.contiguous(), expanded.contiguous())
    leaf = x.clone().requires_grad_()
    y = layer(leaf.permute(1, 2, 0)[::2])
    dx, du = torch.autograd.grad(y, (leaf, layer.hra_u), expanded)
    assert torch.equal(y, seen[0]) and torch.equal(dx.permute(1, 2, 0)[::2], seen[1]) and torch.equal(du, seen[2])


@pytest.mark.parametrize("make", [hra_linear, hra_conv])
def test_two_runs_are_bitwise_equal(backend, make):
    layer = make(dtype=torch.bfloat16)
    x = (torch.randn(70, 24) if make is hra_linear else torch.randn(2, 3, 9, 8)).bfloat16()
    dy = torch.randn_like(layer.base_layer(x))
    assert all(torch.equal(a, b) for a, b in zip(gradients(layer, x, dy), gradients(layer, x, dy), strict=True))
