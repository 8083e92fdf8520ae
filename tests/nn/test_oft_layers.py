"""The OFT and BOFT layers of `peftkern.nn`: values, merging, switching, checkpoints, compiling; judged in float64."""

import copy

import oracle
import oracle_blocks
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.func import functional_call

from peftkern.nn import BOFTConv2d, BOFTLinear, OFTConv2d, OFTEmbedding, OFTLinear, load_adapters, save_adapters, wrap

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALF = (torch.bfloat16, torch.float16)
# Relative errors that the arithmetic of each dtype gives; half precision is that of rounding every factor once.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3}


def _random(layer):
    with torch.no_grad():
        for p in layer.adapter_parameters().values():
            p.normal_(mean=1.0 if p is getattr(layer, "boft_s", None) else 0.0, std=0.2)
    return layer


def linear(kind, dtype=torch.float32, features=(24, 17), bias=True, **options):
    size = {"block_size": 6} if kind is OFTLinear else {"block_size": 4, "n_butterfly_factor": 2}
    return _random(kind(nn.Linear(*features, bias=bias, dtype=dtype), **{**size, **options}))


def conv(kind, dtype=torch.float32, kernel=(3, 2), layer=None, **geometry):
    size = {"block_size": 6} if kind is OFTConv2d else {"block_size": 6, "n_butterfly_factor": 2}
    return _random(kind(nn.Conv2d(4, 5, kernel, dtype=dtype, **geometry), **{**size, **(layer or {})}))


def embedding(dtype=torch.float32, **options):
    return _random(OFTEmbedding(nn.Embedding(11, 24, dtype=dtype), **{"block_size": 6, **options}))


LAYERS = {
    "oft": lambda **o: linear(OFTLinear, **o),
    "oft exact Cayley": lambda **o: linear(OFTLinear, terms=None, **o),
    "oft six terms": lambda **o: linear(OFTLinear, terms=6, **o),
    "oft shared": lambda **o: linear(OFTLinear, block_share=True, **o),
    "boft": lambda **o: linear(BOFTLinear, **o),
    "boft one factor": lambda **o: linear(BOFTLinear, n_butterfly_factor=1, **o),
    "boft three factors": lambda **o: linear(BOFTLinear, **{"block_size": 2, "n_butterfly_factor": 3, **o}),
}
EVERY = {**LAYERS, "oft conv": lambda **o: conv(OFTConv2d, **o), "boft conv": lambda **o: conv(BOFTConv2d, **o)}


def example(layer, rows=3):
    base = layer.base_layer
    shape = (rows, 4, 9, 8) if isinstance(base, nn.Conv2d) else (rows, 5, base.in_features)
    return torch.randn(shape).to(base.weight.dtype)


def dense(layer, parameters):
    """(R [K, K], s) in float64 from the parameters, by explicit matrices."""
    if "boft_R" in parameters:
        R = oracle_blocks.butterfly(oracle_blocks.cayley(oracle_blocks.skew_part(parameters["boft_R"])))
        return R, parameters["boft_s"].reshape(-1)
    (q,) = parameters.values()
    return oracle_blocks.dense(oracle_blocks.blocks(q, layer.block_size, layer.terms), _inputs(layer)), None


def _inputs(layer):
    return layer.base_layer.weight[0].numel()


def truth(layer, x, parameters=None):
    """base_layer with the weight s W R^T (a table: W R), everything in float64."""
    base = copy.deepcopy(layer.base_layer).double()
    own = {name: p.detach().double() for name, p in layer.adapter_parameters().items()}
    R, s = dense(layer, own if parameters is None else parameters)
    rows = base.weight.detach().flatten(1) @ (R if isinstance(base, nn.Embedding) else R.T)
    rows = rows if s is None else rows * s[:, None]
    return functional_call(
        base, {"weight": rows.view(base.weight.shape)}, (x.double() if x.is_floating_point() else x,)
    )


def gradients(layer, x, dy):
    """y and the gradients of <y, dy> in x and the parameters, by name."""
    x = x.detach().clone().requires_grad_()
    parameters = layer.adapter_parameters()
    y = layer(x)
    grads = torch.autograd.grad(y, (x, *parameters.values()), dy.to(y.dtype))
    return dict(zip(("y", "x", *parameters), (y.detach(), *grads), strict=True))


def true_gradients(layer, x, dy):
    x = x.detach().double().requires_grad_()
    parameters = {name: p.detach().double().requires_grad_() for name, p in layer.adapter_parameters().items()}
    y = truth(layer, x, parameters)
    grads = torch.autograd.grad(y, (x, *parameters.values()), dy.double())
    return dict(zip(("y", "x", *parameters), (y.detach(), *grads), strict=True))


def assert_close(seen, exact, tolerance):
    for name, value in exact.items():
        assert seen[name].shape == value.shape, name
        assert oracle.error(seen[name], value) <= tolerance, f"{name}: {oracle.error(seen[name], value):.2e}"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_linear_is_the_base_layer_with_the_rotated_weight(backend, name, dtype):
    layer = LAYERS[name](dtype=dtype)
    x = example(layer)
    dy = torch.randn(*x.shape[:-1], 17).to(dtype)
    seen = gradients(layer, x, dy)
    parameter_dtype = torch.float64 if dtype is torch.float64 else torch.float32
    assert [t.dtype for t in seen.values()] == [dtype, dtype] + [parameter_dtype] * (len(seen) - 2)
    assert_close(seen, true_gradients(layer, x, dy), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_exact_linear_is_right_too(name, dtype):
    layer = LAYERS[name](dtype=dtype, precision="exact")
    x = example(layer)
    dy = torch.randn(*x.shape[:-1], 17).to(dtype)
    assert_close(gradients(layer, x, dy), true_gradients(layer, x, dy), TOLERANCE[dtype])


GEOMETRIES = {
    "plain": {},
    "pointwise": {"kernel": (1, 1), "layer": {"block_size": 2}},
    "stride": {"stride": (2, 3), "padding": 1},
    "dilation": {"dilation": (2, 1), "padding": (1, 2)},
    "same, even kernel": {"kernel": (2, 3), "padding": "same"},
    "circular": {"padding": (2, 1), "padding_mode": "circular"},
    "no bias": {"bias": False, "padding": 1},
}


@pytest.mark.parametrize("precision", ["fast", "exact"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("kind", [OFTConv2d, BOFTConv2d], ids=["oft", "boft"])
def test_convolution_is_the_base_layer_with_the_rotated_kernel(kind, geometry, dtype, precision):
    options = copy.deepcopy(GEOMETRIES[geometry])
    options["layer"] = {**options.get("layer", {}), "precision": precision}
    layer = conv(kind, dtype, **options)
    x = example(layer, 2)
    dy = torch.randn_like(layer.base_layer(x))
    assert_close(gradients(layer, x, dy), true_gradients(layer, x, dy), 1.5 * TOLERANCE[dtype])


def test_a_convolution_with_hooks_is_called_and_an_unbatched_image_served():
    for kind in (OFTConv2d, BOFTConv2d):
        layer, seen = conv(kind), []
        x = example(layer)[0]
        exact = truth(layer, x).detach()
        layer.base_layer.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        assert oracle.error(layer(x).detach(), exact) <= 3e-6 and seen == [1]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_embedding_rotates_the_rows_it_looks_up(dtype):
    layer, ids = embedding(dtype), torch.randint(0, 11, (3, 5))
    y = layer(ids)
    assert y.dtype is dtype and oracle.error(y.detach(), truth(layer, ids).detach()) <= TOLERANCE[dtype]
    layer.merge()
    assert oracle.error(layer(ids).detach(), y.detach()) <= 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_fast_errs_at_most_twice_as_much_as_the_formula_with_a_rounded_x(name, dtype):
    layer = LAYERS[name](dtype=dtype, features=(96, 80), block_size=8)
    x = torch.randn(64, 96).to(dtype)
    parameters = {name: p.detach().double() for name, p in layer.adapter_parameters().items()}
    R, s = dense(layer, parameters)
    z = (x.double() @ R).to(dtype)
    plain = layer.base_layer(z).detach()
    if s is not None:
        bias = layer.base_layer.bias
        plain = ((plain - bias).float() * s.float() + bias).to(dtype)
    exact = truth(layer, x).detach()
    assert oracle.error(layer(x).detach(), exact) <= 2 * oracle.error(plain, exact)


@pytest.mark.parametrize("update", [3e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("name", ["oft", "boft", "boft three factors"])
def test_exact_keeps_small_updates_that_rounding_loses(name, update):
    size = {} if "three" in name else {"block_size": 8}
    layer = LAYERS[name](dtype=torch.bfloat16, features=(256, 256), bias=False, precision="exact", **size)
    x, base = torch.randn(512, 256).bfloat16(), layer.base_layer.weight.detach().double().T
    y0 = x.double() @ base
    parameters, step = layer.adapter_parameters(), 1e-4
    directions = {key: torch.randn_like(p) for key, p in parameters.items()}
    with torch.no_grad():
        for _ in range(4):
            for key, p in parameters.items():
                p.copy_(step * directions[key] + (key == "boft_s"))
            delta = truth(layer, x) - y0
            step *= update / float(delta.norm() / y0.norm())
        gain = float(((layer(x).double() - y0) * delta).sum() / delta.square().sum())
        layer.precision = "fast"
        lost = float(((layer(x).double() - y0) * delta).sum() / delta.square().sum())
    assert 0.94 < gain < 1.06
    assert update > 3e-4 or lost < 0.8


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_merge_is_the_forward_and_unmerge_its_exact_inverse(name, dtype):
    layer = EVERY[name](dtype=dtype)
    x = example(layer)
    before, y = layer.base_layer.weight.detach().clone(), layer(x)
    layer.merge()
    assert "merged" in repr(layer) and oracle.error(layer(x).detach(), y.detach()) <= 2 * TOLERANCE[dtype]
    layer.merge()
    layer.unmerge()
    assert oracle.error(layer.base_layer.weight.detach(), before) <= 2 * TOLERANCE[dtype]
    assert oracle.error(layer(x).detach(), y.detach()) <= 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("name", EVERY)
def test_merge_refuses_what_is_not_finite_and_disable_passes_through(name):
    layer = EVERY[name]()
    x = example(layer)
    layer.disable()
    assert torch.equal(layer(x), layer.base_layer(x)) and "disabled" in repr(layer)
    with pytest.raises(RuntimeError, match="the adapter is disabled"):
        layer.merge()
    layer.enable()
    with torch.no_grad():
        next(iter(layer.adapter_parameters().values())).view(-1)[1] = float("nan")
    before = layer.base_layer.weight.detach().clone()
    with pytest.raises(ValueError, match="the merged weight is not finite; nothing was changed"):
        layer.merge()
    assert not layer.merged and torch.equal(layer.base_layer.weight, before)


@pytest.mark.parametrize("name", EVERY)
def test_the_initialisation_is_the_identity(name):
    layer = EVERY[name]()
    layer.reset_parameters()
    x = example(layer)
    torch.testing.assert_close(layer(x), layer.base_layer(x))
    layer.init_weights = False
    layer.reset_parameters()
    assert (layer(x) - layer.base_layer(x)).abs().max() > 1e-3


def test_coft_keeps_the_parameter_within_its_radius_and_the_gradient_of_every_block():
    layer = linear(OFTLinear, coft_eps=1e-2)
    x = example(layer)
    first = layer(x)
    layer(x).sum().backward()
    q = layer.oft_R.weight
    assert torch.all(q.norm(dim=1) * 2**0.5 <= 1.0001 * 1e-2 / 2) and q.grad.any(1).all()
    first.sum().backward()


def test_dropout_of_butterfly_blocks_is_of_training_alone_and_drops_whole_blocks():
    layer = linear(BOFTLinear, n_butterfly_factor=1, dropout=0.5)
    x = example(layer)
    layer.eval()
    assert torch.equal(layer(x), layer(x)) and oracle.error(layer(x).detach(), truth(layer, x).detach()) <= 3e-6
    layer.train()
    layer(x).sum().backward()
    dropped = ~layer.boft_R.grad[0].flatten(1).any(1)
    assert dropped.sum() == 3


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: OFTLinear(nn.Conv2d(4, 4, 1)), TypeError, "OFTLinear: base_layer must be a Linear; got Conv2d"),
        (lambda: OFTLinear(nn.Linear(30, 4)), ValueError, "block_size must be a divisor of the 30 inputs"),
        (lambda: OFTLinear(nn.Linear(32, 4), 1), ValueError, "at least 2; got 1"),
        (lambda: OFTLinear(nn.Linear(32, 4), terms=1.5), TypeError, "terms must be an integer, or None"),
        (lambda: OFTLinear(nn.Linear(32, 4), coft_eps=0), ValueError, "coft_eps must be a radius above 0"),
        (lambda: OFTLinear(nn.Linear(32, 4), precision="best"), ValueError, "precision must be one of"),
        (lambda: OFTConv2d(nn.Conv2d(8, 4, 1, groups=2), 2), ValueError, "OFTConv2d: groups must be 1"),
        (lambda: BOFTLinear(nn.Linear(24, 4), 4, 4), ValueError, r"K must be a multiple of b 2\^\(f-1\) = 32"),
        (lambda: BOFTLinear(nn.Linear(24, 4), 3, 2), ValueError, "block size must be even for 2 stages"),
        (lambda: BOFTLinear(nn.Linear(24, 4), 5), ValueError, "must be a multiple of"),
        (lambda: BOFTLinear(nn.Linear(24, 4), 4, 0), ValueError, "n_butterfly_factor must be an integer of at least 1"),
        (lambda: BOFTLinear(nn.Linear(24, 4), dropout=2), ValueError, "dropout must be a fraction from 0 to 1"),
    ],
)
def test_bad_arguments_are_refused_in_a_sentence(make, error, message):
    with pytest.raises(error, match=message) as raised:
        make()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["oft", "boft"])
def test_bad_inputs_are_refused_in_a_sentence(name):
    layer = LAYERS[name]()
    with pytest.raises(TypeError, match=f"{name.upper()}: the input must be floating; got torch.int64"):
        layer(torch.ones(2, 24, dtype=torch.int64))
    with pytest.raises(ValueError, match="columns"):
        layer(torch.randn(2, 23))
    with pytest.raises(ValueError, match="the input is on meta, the adapter on cpu; move one of them"):
        layer(torch.randn(2, 24, device="meta"))


def model():
    return nn.ModuleDict({"fc1": nn.Linear(24, 16), "conv": nn.Conv2d(4, 6, 3), "table": nn.Embedding(9, 24)})


@pytest.mark.parametrize(
    ("method", "targets", "options", "keys"),
    [
        (
            "oft",
            ["fc1", "conv", "table"],
            {"block_size": 6},
            {"fc1.oft_R.weight", "conv.oft_R.weight", "table.oft_embedding_R.weight"},
        ),
        (
            "boft",
            ["fc1", "conv"],
            {"block_size": 4},
            {"fc1.boft_R", "fc1.boft_s", "conv.boft_R", "conv.boft_s"},
        ),
    ],
)
def test_wrapped_adapters_round_trip_under_pefts_names(method, targets, options, keys, tmp_path):
    first, second = model(), model()
    for net in (first, second):
        assert wrap(net, targets, method=method, **options) == targets
        assert {n for n, p in net.named_parameters() if p.requires_grad} == keys
    for name in targets:
        _random(first[name])
    save_adapters(first, tmp_path / "adapter.safetensors")
    stored = safetensors.torch.load_file(tmp_path / "adapter.safetensors")
    assert set(stored) == {f"base_model.model.{key}" for key in keys}
    load_adapters(second, tmp_path / "adapter.safetensors")
    for key in keys:
        assert torch.equal(second.get_parameter(key), first.get_parameter(key))


def test_wrap_names_the_method_and_the_kinds_it_takes():
    with pytest.raises(ValueError, match="method must be one of hra, oft, boft; got 'lora'"):
        wrap(model(), ["fc1"], method="lora")
    with pytest.raises(TypeError, match=r"table must be nn\.Linear or nn\.Conv2d; got Embedding"):
        wrap(model(), ["table"], method="boft")


@pytest.mark.parametrize("precision", ["fast", "exact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["oft", "oft exact Cayley", "boft three factors", "oft conv", "boft conv"])
def test_layers_compile_whole_into_eagers_results(name, dtype, precision):
    torch._dynamo.reset()
    if "conv" in name:
        layer = EVERY[name](dtype=dtype, layer={"precision": precision})
    else:
        layer = EVERY[name](dtype=dtype, precision=precision)
    x = example(layer)
    dy = torch.randn_like(layer(x))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected = gradients(layer, x, dy)
    xs = x.clone().requires_grad_()
    y = compiled(xs)
    grads = torch.autograd.grad(y, (xs, *layer.adapter_parameters().values()), dy)
    for value, other in zip((y.detach(), *grads), expected.values(), strict=True):
        assert torch.equal(value, other)


@pytest.mark.parametrize("name", LAYERS)
def test_nothing_but_x_and_small_blocks_is_saved_for_backward(name):
    layer = LAYERS[name](features=(256, 256), bias=False, **({} if "three" in name else {"block_size": 8}))
    x = torch.randn(40, 256, requires_grad=True)
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        layer(x)
    known = {p.data_ptr() for p in layer.parameters()}
    sizes = [t.numel() for pointer, t in saved.items() if pointer not in known and pointer != x.data_ptr()]
    assert x.data_ptr() in saved and max(sizes) <= 40 * 256
    # The output scale of BOFT needs the product that it multiplies.
    assert sum(size == 40 * 256 for size in sizes) <= ("boft" in name)


@pytest.mark.parametrize("rows", (3, 40))
@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_more_rows_than_the_weight_has_give_the_same_layer(backend, name, dtype, bias, rows):
    """The other form of `fast`, trained and not."""
    layer = LAYERS[name](dtype=dtype, bias=bias)
    x = torch.randn(rows, 5, 24).to(dtype)
    dy = torch.randn(rows, 5, 17).to(dtype)
    seen = gradients(layer, x, dy)
    assert_close(seen, true_gradients(layer, x, dy), TOLERANCE[dtype])
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(layer(x), seen["y"])
    if rows == 40 and dtype is not torch.float16 and not ("boft" in name and bias):
        layer.merge()
        assert oracle.error(layer(x).detach(), seen["y"]) <= 1e-6


@pytest.mark.parametrize("rows", (3, 40))
@pytest.mark.parametrize("precision", ("fast", "exact"))
@pytest.mark.parametrize("name", ("oft", "boft", "boft one factor"))
def test_autocast_that_has_nothing_to_cast_changes_no_bit(name, precision, rows):
    layer = LAYERS[name](dtype=torch.bfloat16, bias=False, precision=precision)
    x, dy = torch.randn(rows, 24).bfloat16(), torch.randn(rows, 17).bfloat16()
    outside = gradients(layer, x, dy)
    with torch.autocast("cpu", torch.bfloat16):
        inside = gradients(layer, x, dy)
        with torch.no_grad():
            assert torch.equal(layer(x), outside["y"])
        # Rotated in float32, and cast by autocast.
        wide = gradients(layer, x.float(), dy)
    assert all(torch.equal(inside[key], value) for key, value in outside.items())
    assert wide["x"].dtype is torch.float32
    assert_close(wide, true_gradients(layer, x.float(), dy), TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("name", ["oft", "boft"])
def test_the_cache_of_decoding_is_bitwise_the_layer_and_never_stale(name):
    layer = LAYERS[name]()
    x = example(layer)
    for _ in range(2):
        expected = layer(x).detach()
        with torch.no_grad():
            assert torch.equal(layer(x), expected) and torch.equal(layer(x), expected)
            assert layer._cache.kept is not None
            next(iter(layer.adapter_parameters().values())).add_(0.1)
