"""The layers under torch.compile(fullgraph=True): eager's results, few compilations, nothing baked in."""

import oracle
import pytest
import torch
from adapted import hra_conv, hra_linear
from torch._dynamo.testing import CompileCounterWithBackend

BATCHES = (2, 3, 7, 16)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(layer, backend="aot_eager"):
    counter = CompileCounterWithBackend(backend)
    return torch.compile(layer, fullgraph=True, backend=counter), counter


def value_and_gradients(call, layer, x, dy):
    x = x.detach().clone().requires_grad_()
    y = call(x)
    return y.detach(), *torch.autograd.grad(y, (x, layer.hra_u), dy)


def assert_equal_to_eager(call, layer, shape, tolerance=0.0):
    dtype = layer.base_layer.weight.dtype
    for batch in BATCHES:
        x = torch.randn(batch, *shape).to(dtype)
        dy = torch.randn_like(layer(x))
        eager, seen = (value_and_gradients(f, layer, x, dy) for f in (layer, call))
        for a, b in zip(seen, eager, strict=True):
            assert a.dtype is b.dtype and a.shape == b.shape and oracle.error(a, b) <= tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"apply_gs": True}, {"precision": "fast"}], ids=str)
def test_linear_compiles_whole_and_at_most_twice_for_four_batch_sizes(dtype, options):
    layer = hra_linear(dtype=dtype, **options)
    call, counter = compiled(layer)
    assert_equal_to_eager(call, layer, (5, 24))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("precision", ["fast", "exact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_convolution_compiles_whole_and_no_more_often_than_its_base(dtype, precision):
    layer = hra_conv(dtype, padding=(2, 1), layer={"precision": precision})
    call, counter = compiled(layer)
    assert_equal_to_eager(call, layer, (3, 9, 8))
    base, base_counter = compiled(layer.base_layer)
    for batch in BATCHES:
        base(torch.randn(batch, 3, 9, 8).to(dtype).requires_grad_())
    assert counter.frame_count <= base_counter.frame_count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inductor_gives_eagers_numbers(dtype):
    layer = hra_linear(dtype=dtype)
    call, counter = compiled(layer, "inductor")
    assert_equal_to_eager(call, layer, (5, 24), 4 * torch.finfo(dtype).eps)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("grad", [True, False])
def test_a_compiled_layer_follows_its_parameter_without_another_compilation(grad):
    layer = hra_linear()
    call, counter = compiled(layer)
    x = torch.randn(5, 24)  # up to 4 rows eager code takes a product of its own
    with torch.set_grad_enabled(grad):
        outputs = []
        for _ in range(3):
            outputs.append(call(x).detach().clone())
            assert torch.equal(outputs[-1], layer(x))
            layer.hra_u.data.normal_()
    assert counter.frame_count == 1 and not torch.equal(outputs[0], outputs[1])


def test_a_compiled_layer_can_be_disabled_enabled_and_merged():
    layer = hra_linear()
    call, _ = compiled(layer)
    x = torch.randn(4, 24)
    adapted = call(x)
    layer.disable()
    assert torch.equal(call(x), layer.base_layer(x))
    layer.enable()
    assert torch.equal(call(x), adapted)
    layer.merge()
    assert torch.equal(call(x), layer.base_layer(x)) and oracle.error(call(x).detach(), adapted.detach()) <= 1e-6


@pytest.mark.parametrize("precision", ["fast", "exact"])
def test_autocast_compiles_to_eagers_numbers(precision):
    layer = hra_linear(precision=precision)
    call, counter = compiled(layer)
    x, dy = torch.randn(6, 24), torch.randn(6, 16)
    results = []
    for function in (layer, call):
        with torch.autocast("cpu", torch.bfloat16):
            results.append(value_and_gradients(function, layer, x, dy))
    assert all(a.dtype is b.dtype and torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert counter.frame_count == 1


def test_a_layer_is_exported_with_its_operations():
    layer = hra_linear()
    x = torch.randn(4, 24)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    assert "peftkern.rotate" in str(program.graph)
    longer = torch.randn(9, 24)
    assert oracle.error(program.module()(longer).detach(), layer(longer).detach()) <= 1e-6
