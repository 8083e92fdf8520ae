"""What autograd sees: saved bytes, checkpointing, double backward, torch.func, trainable bases, hooks of the base."""

import gc

import oracle
import pytest
import torch
from adapted import HALF, hra_conv, hra_linear, truth
from torch import nn
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

from peftkern.nn.forward import readable_weight

BOTH = pytest.mark.parametrize("make", [hra_linear, hra_conv])
WITH_GS = pytest.mark.parametrize("apply_gs", [False, True], ids=["chain", "gram_schmidt"])


def build(make, apply_gs=False, precision="auto", **options):
    adapter = {"apply_gs": apply_gs, "precision": precision}
    return make(**options, **(adapter if make is hra_linear else {"layer": adapter}))


def example(layer, dtype=torch.float32):
    return torch.randn((6, 24) if hasattr(layer.base_layer, "in_features") else (2, 3, 9, 8)).to(dtype)


def saved_bytes(module, x, autocast=False):
    """Bytes kept for backward in memory that neither a parameter nor x owns before the call, and whether x is kept."""
    owned = {p.untyped_storage().data_ptr() for p in module.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = x.detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", enabled=autocast):
        y = module(x)
    return sum(storages.values()), y


def graph_nodes(y):
    nodes, pending = set(), [y.grad_fn]
    while pending:
        node = pending.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            pending += [following for following, _ in node.next_functions]
    return nodes


M, K, N, R = 256, 384, 320, 8


@pytest.mark.parametrize("case", ["float32", "bfloat16", "bfloat16 u", "fast bfloat16", "gram_schmidt", "autocast"])
def test_linear_saves_x_once_and_nothing_of_the_size_of_the_weight(backend_or_automatic, case):
    dtype = torch.bfloat16 if "bfloat16" in case else torch.float32
    layer = hra_linear(
        (K, N),
        dtype,
        R,
        apply_gs=case == "gram_schmidt",
        precision="fast" if "fast" in case else "auto",
        u_dtype=torch.bfloat16 if case == "bfloat16 u" else None,
    )
    x = torch.randn(M, K).to(dtype)
    autocast = case == "autocast"
    frozen, _ = saved_bytes(layer.base_layer, x, autocast)
    ours, y = saved_bytes(layer, x, autocast)
    # x; P in float32 and its rounded copy; V twice (a float32 copy of u, the pair basis); T and its relatives.
    one_x = x.nbytes if not autocast else x.nbytes // 2
    assert ours - frozen <= one_x + 8 * M * R + 8 * K * R + 64 * R * R
    assert ours - frozen >= one_x
    assert_no_tensor_hides(y)


def assert_no_tensor_hides(y):
    """Tensors in attributes of ctx escape checkpointing and offloading."""
    for node in graph_nodes(y):
        held = [v for v in getattr(node, "__dict__", {}).values() if isinstance(v, (torch.Tensor, tuple, list, dict))]
        assert not any(isinstance(t, torch.Tensor) for v in held for t in (v if isinstance(v, (tuple, list)) else [v]))


@pytest.fixture(params=["reference", "automatic"])
def backend_or_automatic(request):
    if request.param == "reference":
        from peftkern import use_backend

        with use_backend("reference"):
            yield
    else:
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("precision", ["fast", "exact"])
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_convolution_saves_x_once_and_nothing_of_the_size_of_the_weight(dtype, precision, autocast):
    layer = hra_conv(dtype, R, (64, 128), (3, 3), padding=1, layer={"precision": precision})
    x = torch.randn(2, 64, 6, 6).to(dtype)
    frozen, _ = saved_bytes(layer.base_layer, x, autocast)
    ours, y = saved_bytes(layer, x, autocast)
    tokens, width = 2 * 6 * 6, 64 * 9
    allowed = x.nbytes + 8 * tokens * R + 16 * (width + 128) * R + 128 * R * R
    assert ours - frozen <= allowed < layer.base_layer.weight.nbytes
    assert_no_tensor_hides(y)


@pytest.mark.parametrize("precision", ["fast", "exact"])
def test_nothing_of_the_size_of_x_or_the_weight_outlives_the_forward_in_python(precision):
    """Closures and attributes, which no saved-tensor hook sees."""
    layer = hra_linear((K, N), torch.bfloat16, R, precision=precision)
    x = torch.randn(M, K).bfloat16()
    layer(x)
    gc.collect()
    before = {id(t) for t in gc.get_objects() if isinstance(t, torch.Tensor)}
    y = layer(x)
    new = [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and id(t) not in before]
    assert all(t.numel() <= max(M, K) * R for t in new if t.data_ptr() != y.data_ptr())


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_activation_checkpointing_changes_no_bit(make, dtype, reentrant, autocast):
    layer = make(dtype=dtype)
    inputs = [example(layer, dtype).requires_grad_() for _ in range(2)]
    inputs[1].data.copy_(inputs[0].data)
    results = []
    for x, checkpointed in zip(inputs, (False, True), strict=True):
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = checkpoint(layer, x, use_reentrant=reentrant) if checkpointed else layer(x)
        y.float().square().sum().backward()
        results.append((y.detach(), x.grad, layer.hra_u.grad.clone()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@WITH_GS
@BOTH
def test_gradients_of_gradients_are_right(make, apply_gs):
    size = {"features": (5, 3)} if make is hra_linear else {"channels": (2, 2), "kernel": (2, 1), "dilation": (1, 2)}
    layer = build(make, apply_gs, dtype=torch.float64, r=2, **size)
    x = torch.randn((2, 5) if make is hra_linear else (1, 2, 3, 2), dtype=torch.float64, requires_grad=True)
    weight, bias = (t.detach().clone().requires_grad_() for t in layer.base_layer.parameters())
    u = layer.hra_u.detach().clone().requires_grad_()

    def call(x, u, weight, bias):
        return functional_call(layer, {"hra_u": u, "base_layer.weight": weight, "base_layer.bias": bias}, (x,))

    assert torch.autograd.gradcheck(call, (x, u, weight, bias), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (x, u, weight, bias), fast_mode=True)


@BOTH
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_gradients_of_gradients_of_the_exact_form_are_those_of_the_formula(make, dtype):
    layer = build(make, precision="exact", dtype=dtype)
    x, dy = example(layer, dtype), None
    results = []
    for u, function in (
        (layer.hra_u, lambda x, u: layer(x).float()),
        (layer.hra_u.detach().double().requires_grad_(), lambda x, u: truth(layer, x, u)),
    ):
        x = x.detach().clone().requires_grad_()
        y = function(x, u)
        dy = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype) if dy is None else dy.to(y.dtype)
        (du,) = torch.autograd.grad(y, u, dy, create_graph=True)
        results.append(torch.autograd.grad(du.square().sum(), (x, u)))
    for ours, exact in zip(*results, strict=True):
        assert oracle.error(ours, exact) <= 24 * torch.finfo(dtype).eps


@WITH_GS
@BOTH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_torch_func_sees_through_the_layer(make, apply_gs, dtype):
    layer = build(make, apply_gs, dtype=dtype)
    x = torch.stack([example(layer, dtype) for _ in range(3)])
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters, x):
        return functional_call(layer, parameters, (x,)).double().square().sum()

    exact = []
    for sample in x:
        u = layer.hra_u.detach().double().requires_grad_()
        exact.append(torch.autograd.grad(truth(layer, sample, u).square().sum(), u)[0])
    tolerance = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 3e-2}[dtype]
    assert oracle.error(grad(loss)(parameters, x[0])["hra_u"], exact[0]) <= tolerance
    per_sample = vmap(grad(loss), in_dims=(None, 0))(parameters, x)["hra_u"]
    assert oracle.error(per_sample, torch.stack(exact)) <= tolerance
    forward = vmap(layer)(x)
    assert forward.dtype is dtype
    assert oracle.error(forward.detach(), torch.stack([truth(layer, s) for s in x]).detach()) <= tolerance


@BOTH
def test_forward_mode_and_reverse_mode_agree(make):
    layer = make(dtype=torch.float64)
    x, tangent = example(layer, torch.float64), torch.randn_like(layer.hra_u)

    def call(u):
        return functional_call(layer, {"hra_u": u}, (x,))

    u = layer.hra_u.detach()
    _, forward = jvp(call, (u,), (tangent,))
    reverse = torch.einsum("...kr,kr->...", jacrev(call)(u), tangent)
    exact = torch.autograd.functional.jvp(lambda u: truth(layer, x, u), u, tangent)[1]
    assert oracle.error(forward, exact) <= 1e-12 and oracle.error(reverse, exact) <= 1e-12


@BOTH
@pytest.mark.parametrize("precision", ["fast", "exact"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_trainable_base_gets_its_gradients(make, precision, dtype):
    layer = build(make, precision=precision, dtype=dtype)
    layer.base_layer.requires_grad_(True)
    x = example(layer, dtype)
    dy = torch.randn_like(layer.base_layer(x))
    layer(x).backward(dy)
    exact = [t.detach().double().requires_grad_() for t in (layer.base_layer.weight, layer.base_layer.bias)]
    truth(layer, x, None, *exact).backward(dy.double())
    tolerance = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 1.2e-2}[dtype]
    for ours, theirs in zip(layer.base_layer.parameters(), exact, strict=True):
        assert ours.grad.dtype is dtype and oracle.error(ours.grad, theirs.grad) <= tolerance


@BOTH
@pytest.mark.parametrize("frozen", ["u", "x"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_needs_no_gradient_gets_none_and_costs_the_rest_nothing(make, frozen, dtype):
    layer = make(dtype=dtype)
    x = example(layer, dtype).requires_grad_()
    both = torch.autograd.grad(layer(x).float().sum(), (x, layer.hra_u))
    if frozen == "u":
        layer.hra_u.requires_grad_(False)
        y = layer(x)
        y.float().sum().backward()
        assert layer.hra_u.grad is None and torch.equal(x.grad, both[0])
    else:
        layer(x.detach()).float().sum().backward()
        assert torch.equal(layer.hra_u.grad, both[1])


def _forward_hook(base, calls):
    base.register_forward_hook(lambda *_: calls.append("forward"))


def _forward_pre_hook(base, calls):
    base.register_forward_pre_hook(lambda *_: calls.append("pre"))


def _backward_hook(base, calls):
    base.register_full_backward_hook(lambda *_: calls.append("backward"))


def _backward_pre_hook(base, calls):
    base.register_full_backward_pre_hook(lambda *_: calls.append("backward pre"))


def _replaced_forward(base, calls):
    """As accelerate's add_hook_to_module does it: the instance gets a forward of its own."""
    original = base.forward

    def forward(*args, **kwargs):
        calls.append("replaced")
        return original(*args, **kwargs)

    base.forward = forward


def _parametrization(base, calls):
    class Counted(nn.Module):
        def forward(self, weight):
            calls.append("parametrization")
            return weight * 1

    nn.utils.parametrize.register_parametrization(base, "weight", Counted())


INTERVENTIONS = [_forward_hook, _forward_pre_hook, _backward_hook, _backward_pre_hook, _replaced_forward]


@pytest.mark.parametrize("intervene", [*INTERVENTIONS, _parametrization])
@pytest.mark.parametrize("precision", ["auto", "exact"])
def test_hooks_of_the_base_layer_fire_and_switch_exact_to_fast(intervene, precision):
    x = torch.randn(6, 24).bfloat16()
    torch.manual_seed(1)
    layer = hra_linear(dtype=torch.bfloat16, precision=precision)
    torch.manual_seed(1)
    fast = hra_linear(dtype=torch.bfloat16, precision="fast")
    assert not torch.equal(layer(x), fast(x))
    calls = []
    intervene(layer.base_layer, calls)
    assert readable_weight(layer.base_layer)[0] is None
    calls.clear()
    y = layer(x.requires_grad_())
    y.sum().backward()
    assert calls and torch.equal(y, fast(x))


@pytest.mark.parametrize("intervene", INTERVENTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hooks_of_a_base_convolution_fire(intervene, dtype):
    layer = hra_conv(dtype, layer={"precision": "exact"})
    calls = []
    intervene(layer.base_layer, calls)
    x = torch.randn(2, 3, 9, 8).to(dtype).requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert calls
    assert oracle.error(y.detach(), truth(hookless(layer), x.detach()).detach()) <= 4 * torch.finfo(dtype).eps


def hookless(layer):
    other = hra_conv(layer.base_layer.weight.dtype)
    other.load_state_dict(layer.state_dict())
    return other


@pytest.mark.parametrize(
    ("register", "call"),
    [
        (nn.modules.module.register_module_forward_hook, "forward"),
        (nn.modules.module.register_module_forward_pre_hook, "pre"),
        (nn.modules.module.register_module_full_backward_hook, "backward"),
        (nn.modules.module.register_module_full_backward_pre_hook, "backward pre"),
    ],
)
def test_global_hooks_see_the_base_layer(register, call):
    layer = hra_linear(dtype=torch.bfloat16)
    x = torch.randn(6, 24).bfloat16().requires_grad_()
    seen = []
    handle = register(lambda module, *_: seen.append(module) and None)
    try:
        assert readable_weight(layer.base_layer)[1] == "the base layer has hooks"
        layer(x).sum().backward()
    finally:
        handle.remove()
    assert layer.base_layer in seen
    assert readable_weight(layer.base_layer)[0] is layer.base_layer.weight


def test_the_reason_for_not_reading_a_weight_is_a_clause():
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x)

    parametrised = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    assert readable_weight(Own(4, 4))[1] == "the forward of the base layer (Own) is not that of Linear"
    assert readable_weight(parametrised)[1] == "the base weight is parametrised"
    assert readable_weight(nn.Linear(4, 4)) != (None, None)


def test_a_subclass_with_a_forward_of_its_own_is_called():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    plain = hra_linear(dtype=torch.bfloat16, precision="fast")
    layer = hra_linear(dtype=torch.bfloat16)
    layer.load_state_dict(plain.state_dict())
    layer.base_layer.__class__ = Doubled
    x = torch.randn(6, 24).bfloat16()
    assert torch.equal(layer(x), 2 * plain(x))


def test_arguments_beside_x_reach_the_base_layer():
    class Scaled(nn.Linear):
        def forward(self, x, scale=1.0):
            return scale * super().forward(x)

    layer = hra_linear()
    layer.base_layer.__class__ = Scaled
    x = torch.randn(6, 24)
    assert torch.equal(layer(x, 3.0), 3 * layer(x)) and torch.equal(layer(x, scale=3.0), 3 * layer(x))
