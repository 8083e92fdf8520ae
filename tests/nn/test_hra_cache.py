"""The factor kept for generation: never stale, never used for training, and invisible in the results."""

import copy
import pickle
import threading

import pytest
import torch
from adapted import hra_conv, hra_linear, truth
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import peftkern
from peftkern.nn import forward
from peftkern.nn.forward import FactorCache, adapted_linear
from peftkern.ops.householder import cpu_backend


@pytest.fixture
def factored(monkeypatch):
    """The chains that were factored, in order: by themselves, or by the product on its way."""
    calls, factor_chain, columns = [], forward._factor_chain, forward._columns

    def counting(chain, dtype):
        calls.append(chain)
        return factor_chain(chain, dtype)

    def counting_columns(chain, dtype, cache):
        V, T, gs = columns(chain, dtype, cache)
        calls.extend([chain] if T is None else [])
        return V, T, gs

    monkeypatch.setattr(forward, "_factor_chain", counting)
    monkeypatch.setattr(forward, "_columns", counting_columns)
    return calls


def assert_right(layer, x):
    error = (layer(x).double() - truth(layer, x).detach()).norm() / truth(layer, x).detach().norm()
    assert error <= {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[x.dtype]


def write_data_copy(layer, value):
    layer.hra_u.data.copy_(value)


def write_data_add(layer, value):
    layer.hra_u.data.add_(value)


def write_numpy(layer, value):
    layer.hra_u.detach().numpy()[2, 1] += 1.5


def write_state_dict(layer, value):
    layer.load_state_dict({**layer.state_dict(), "hra_u": value})


def write_assign(layer, value):
    layer.load_state_dict({**layer.state_dict(), "hra_u": value}, assign=True)


def write_optimizer_step(layer, value):
    with torch.enable_grad():
        optimizer = torch.optim.AdamW([layer.hra_u], lr=0.3)
        layer(torch.ones(2, layer.base_layer.in_features).to(layer.base_layer.weight.dtype)).float().sum().backward()
        optimizer.step()


def write_swap(layer, value):
    layer.hra_u = nn.Parameter(value.clone())


def write_wider(layer, value):
    layer.hra_u = nn.Parameter(torch.cat((value, value.flip(0)), 1))


def write_gram_schmidt(layer, value):
    layer.apply_gs = True


def write_bfloat16(layer, value):
    layer.hra_u.data = layer.hra_u.data.bfloat16()


def write_tiny(layer, value):
    layer.hra_u.data.view(-1)[0] += 2e-7


WRITES = [v for k, v in list(globals().items()) if k.startswith("write_")]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_way_of_writing_the_parameter_is_noticed(write, mode, dtype, factored):
    layer = hra_linear(dtype=dtype)
    x = torch.randn(1, 24).to(dtype)
    value = torch.randn(24, 4)
    with mode():
        before = layer(x)
    if write is write_optimizer_step:
        write(layer, value)
    else:
        with mode():
            write(layer, value)
    factored.clear()
    with mode():
        after = layer(x)
        assert len(factored) == 1
        assert torch.equal(layer(x), after) and len(factored) == 1
    with mode():
        assert torch.equal(copy.deepcopy(layer)(x), after)
        assert_right(layer, x)
    assert write is write_tiny or not torch.equal(before, after)


@pytest.mark.parametrize("make", [hra_linear, hra_conv])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_result_with_the_cache_is_bitwise_that_without(backend, make, dtype, factored):
    layer = make(dtype=dtype)
    x = (torch.randn(1, 24) if make is hra_linear else torch.randn(1, 3, 9, 8)).to(dtype)
    trained = layer(x).detach()
    with torch.no_grad():
        first, second = layer(x), layer(x)
    assert len(factored) == 2
    assert torch.equal(trained, first) and torch.equal(trained, second)


@pytest.mark.parametrize("precision", ["fast", "exact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_few_tokens_take_one_native_call_with_the_bits_of_the_operation(dtype, precision, monkeypatch):
    if not peftkern.ops.householder.contract.ROTATED_LINEAR.explain_static("cpu")[0][1]:
        pytest.skip("no native CPU library")
    layer = hra_linear(dtype=dtype, precision=precision)
    rows = torch.randn(40, 24).to(dtype)
    calls, call = [], cpu_backend.Generator.__call__
    monkeypatch.setattr(cpu_backend.Generator, "__call__", lambda *args: calls.append(args) or call(*args))
    with torch.no_grad():
        layer(rows[:1])
        for x in (rows[:1], rows[:4], rows[1:3].view(1, 2, 24), rows[7]):
            calls.clear()
            y = layer(x)
            factor = layer.hra_u, cpu_backend.wy_factor(layer.hra_u)
            expected = cpu_backend.rotated_linear(x, layer.base_layer.weight, layer.base_layer.bias, *factor, False)[0]
            assert len(calls) == 1 and torch.equal(y, expected)
        calls.clear()
        assert_right(layer, rows)
        assert_right(layer, rows.view(2, 20, 24)[:, 3])  # strided rows
        assert all(call(*args) is None for args in calls)


@pytest.mark.parametrize("precision", ["fast", "exact"])
def test_a_few_tokens_meet_what_has_happened_to_the_base_layer(precision):
    layer, x = hra_linear(precision=precision), torch.randn(2, 24)
    with torch.no_grad():
        layer(x)
        layer.base_layer.weight.mul_(2)
        assert_right(layer, x)
        layer.base_layer.weight = nn.Parameter(torch.randn(24, 16).mT)
        assert_right(layer, x)
        layer.base_layer.bias = None
        assert_right(layer, x)
        layer.base_layer.register_forward_hook(lambda module, args, y: y + 1)
        assert_right(layer, x)
        with pytest.raises((RuntimeError, ValueError), match="24"):
            layer(x[:, :20])


def test_the_cache_is_not_used_and_not_filled_under_grad(factored):
    layer = hra_linear()
    x = torch.randn(1, 24)
    layer(x), layer(x)
    assert len(factored) == 2 and layer._cache.kept is None
    with torch.no_grad():
        layer(x)
    layer(x).sum().backward()
    assert len(factored) == 4 and layer.hra_u.grad.any()


def test_the_cache_made_under_inference_mode_serves_no_grad_and_the_reverse(factored):
    for first, second in ((torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)):
        layer = hra_linear()
        x = torch.randn(1, 24)
        with first():
            a = layer(x).clone()
        with second():
            b = layer(x)
        assert torch.equal(a, b)
        layer(x).sum().backward()
    assert len(factored) == 4


def test_one_cache_serves_several_adapters_in_their_order(factored):
    base, x, cache = nn.Linear(24, 16), torch.randn(2, 24), FactorCache()
    a, b = torch.randn(24, 4), torch.randn(24, 2)
    with torch.no_grad():
        results = [
            adapted_linear(x, base, chain, cache=cache)
            for chain in ([(a, False)], [(a, False), (b, False)], [(b, False), (a, False)], [(a, False), (b, True)])
        ]
    assert len(factored) == 4
    assert all(not torch.equal(results[i], results[j]) for i in range(4) for j in range(i))


def test_float64_and_float32_inputs_do_not_share_a_factor(factored):
    layer = hra_linear()
    x = torch.randn(1, 24)
    with torch.no_grad():
        single, double = layer(x), layer(x.double())
    assert len(factored) == 2
    assert (double - truth(layer, x)).abs().max() < 1e-12 < (single - truth(layer, x)).abs().max()


def test_the_cache_is_not_copied_with_the_layer():
    cache = FactorCache()
    cache.get([(torch.randn(4, 2), False)], torch.float32)
    assert copy.deepcopy(cache).kept is None and pickle.loads(pickle.dumps(cache)).kept is None


def test_threads_that_share_a_layer_get_their_own_parameter(monkeypatch):
    """A thread stops between looking and keeping; the other one must not take its copy for its own factor."""
    cache, x = FactorCache(), torch.randn(1, 24)
    a, b = torch.randn(24, 4), torch.randn(24, 4)
    base = nn.Linear(24, 16)
    stopped, go_on = threading.Event(), threading.Event()
    original = forward._factor_chain

    def stopping(chain, dtype):
        if torch.equal(chain[0][0], b):
            stopped.set()
            go_on.wait(10)
        return original(chain, dtype)

    def serve(u):
        with torch.no_grad():
            return adapted_linear(x, base, [(u, False)], cache=cache)

    serve(a)
    monkeypatch.setattr(forward, "_factor_chain", stopping)
    thread = threading.Thread(target=serve, args=(b,))
    thread.start()
    stopped.wait(10)
    monkeypatch.setattr(forward, "_factor_chain", original)
    with torch.no_grad():
        expected = adapted_linear(x, base, [(b, False)])
    assert torch.equal(serve(b), expected)
    go_on.set()
    thread.join(10)


def test_fake_tensors_pass_through_without_being_compared():
    with FakeTensorMode(), torch.no_grad():
        layer = hra_linear(dtype=torch.bfloat16)
        assert layer(torch.randn(1, 24, dtype=torch.bfloat16)).shape == (1, 16)
        assert layer(torch.randn(3, 24, dtype=torch.bfloat16)).shape == (3, 16)
