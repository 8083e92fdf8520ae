"""What surrounds a call: gradcheck, what is saved, what is asked for, checkpointing, torch.func, autocast."""

import devices
import oracle
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import peftkern
from peftkern.ops import householder

FUNCTIONS = {
    "rotate": lambda x, W, b, u: peftkern.rotate(x, u),
    "rotate, reversed": lambda x, W, b, u: peftkern.rotate(x, u, reverse=True),
    "fast": lambda x, W, b, u: peftkern.hra_linear(x, W, b, u, precision="fast"),
    "exact": lambda x, W, b, u: peftkern.hra_linear(x, W, b, u, precision="exact"),
    "low_rank_form": lambda x, W, b, u: torch.cat([t.flatten() for t in peftkern.low_rank_form(W, u)]),
    "penalty": lambda x, W, b, u: peftkern.orthogonality_penalty(u, 0.3),
    "root penalty": lambda x, W, b, u: peftkern.orthogonality_penalty(u, 0.3, squared=False),
}


@pytest.fixture(params=FUNCTIONS)
def function(request):
    return FUNCTIONS[request.param]


def tensors(M=5, K=7, N=4, r=3, dtype=torch.float64, requires_grad=True):
    shapes = (M, K), (N, K), (N,), (K, r)
    return [torch.randn(s, dtype=dtype).requires_grad_(requires_grad) for s in shapes]


# Where a simulated device runs them, the Jacobians are compared along random directions instead of entry by entry.
@pytest.mark.parametrize("r", (1, 3, 4))
def test_gradcheck(backend, function, r):
    assert torch.autograd.gradcheck(function, tensors(r=r), fast_mode=devices.simulated(backend))


@pytest.mark.parametrize("r", (2, 3))
def test_gradgradcheck(backend, function, r):
    assert torch.autograd.gradgradcheck(function, tensors(r=r), fast_mode=devices.simulated(backend))


def test_a_gradient_penalty_equals_the_oracle(backend):
    """create_graph, then backward through the gradient: what a gradient penalty or a meta-learner does."""
    x, W, b, u = tensors(M=20, K=31, N=17, r=4)

    def penalised(linear, x, W, b, u):
        (dx, du) = torch.autograd.grad(linear(x, W, b, u).sin().sum(), (x, u), create_graph=True)
        return torch.autograd.grad(dx.square().sum() + (du**3).sum(), (x, W, b, u))

    truth = penalised(oracle.linear, x, W, b, u)
    for precision in ("fast", "exact"):
        seen = penalised(lambda *t, p=precision: peftkern.hra_linear(*t, precision=p), x, W, b, u)
        for ours, exact in zip(seen, truth, strict=True):
            assert oracle.error(ours, exact) < 1e-11


class Calls(TorchDispatchMode):
    """Records the operations of the package that run under it."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "peftkern":
            self.seen.append((op._schema.name.removeprefix("peftkern::"), args))
        return op(*args, **(kwargs or {}))

    def mask(self, name):
        (args,) = [args for seen, args in self.seen if seen == name]
        return tuple(args[-1])


@pytest.mark.parametrize("precision", ("fast", "exact"))
@pytest.mark.parametrize("wanted", ("x", "u", "weight", "bias", "x and u", "none of them"))
def test_only_the_wanted_gradients_are_computed(backend, wanted, precision):
    x, weight, bias, u = tensors(requires_grad=False)
    named = {"x": x, "u": u, "weight": weight, "bias": bias}
    for name in named:
        named[name].requires_grad_(name in wanted.split(" and "))
    y = peftkern.hra_linear(x, weight, bias, u, precision=precision)
    if wanted == "none of them":
        assert not y.requires_grad
        return
    with Calls() as calls:
        y.sum().backward()
    ran = {name for name, _ in calls.seen}
    assert ("wy_factor_backward" in ran) == u.requires_grad
    backward = "rotated_linear_backward"
    assert (backward in ran) == (x.requires_grad or u.requires_grad)
    if backward in ran:
        assert calls.mask(backward) == (x.requires_grad, u.requires_grad)
    for tensor in named.values():
        assert (tensor.grad is not None) == tensor.requires_grad


def test_unwanted_outputs_of_a_backward_are_empty(backend):
    x, V = torch.randn(6, 11), torch.randn(11, 3)
    T = torch.ops.peftkern.wy_factor(V)
    z, P = torch.ops.peftkern.rotate(x, V, T, False)
    both = torch.ops.peftkern.rotate_backward(z, x, P, V, T, False, [True, True])
    only_x = torch.ops.peftkern.rotate_backward(z, x, P, V, T, False, [True, False])
    only_V = torch.ops.peftkern.rotate_backward(z, x, P, V, T, False, [False, True])
    neither = torch.ops.peftkern.rotate_backward(z, x, P, V, T, False, [False, False])
    assert torch.equal(only_x[0], both[0]) and [tuple(t.shape) for t in only_x[1:]] == [(0,), (0,)]
    assert only_V[0].shape == (0,) and torch.equal(only_V[1], both[1]) and torch.equal(only_V[2], both[2])
    assert all(t.shape == (0,) for t in neither)
    half, weight = x.bfloat16(), torch.randn(5, 11).bfloat16()
    dy = torch.randn(6, 5).bfloat16()
    shapes = [
        [tuple(t.shape) for t in torch.ops.peftkern.rotated_linear_backward(dy, half, weight, P, P[:5], V, T, mask)]
        for mask in ([True, False], [False, True], [False, False])
    ]
    assert shapes == [[(6, 11), (0,), (0,)], [(0,), (11, 3), (3, 3)], [(0,), (0,), (0,)]]
    dx, dV = torch.ops.peftkern.project_backward(P, x, V, [True, False])
    assert dx.shape == x.shape and dV.shape == (0,)


def saved_by(function, *leaves):
    """Bytes of each storage that autograd keeps and that is not one of the leaves' own; the graph's custom nodes."""
    own = {t.untyped_storage().data_ptr() for t in leaves}
    kept = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = function()
    nodes, stack = set(), [y.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            stack += [parent for parent, _ in node.next_functions]
    return kept, nodes


@pytest.mark.parametrize("frozen_x", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("precision", ("fast", "exact"))
def test_saved_for_backward_is_x_and_skinny_matrices(backend, precision, dtype, frozen_x):
    """Beyond x, W and u themselves (and in `fast` nothing of W): x V [M, r], T, at most one copy of u and, where the
    product is exact in half precision, W Vp [N, r]."""
    M, K, N, r = 96, 256, 320, 8
    x, weight = torch.randn(M, K).to(dtype).requires_grad_(not frozen_x), torch.randn(N, K).to(dtype)
    u = torch.randn(K, r, requires_grad=True)
    kept, nodes = saved_by(lambda: peftkern.hra_linear(x, weight, None, u, precision=precision), x, weight, u)
    of_weight = 4 * N * r if precision == "exact" and dtype is torch.bfloat16 else 0
    assert sum(kept.values()) <= 4 * M * r + 8 * r * r + 4 * K * r + of_weight
    assert any(type(node).__name__ in ("ReflectBackward", "ReflectedLinearBackward") for node in nodes)
    for node in nodes:
        hidden = [name for name, value in getattr(node, "__dict__", {}).items() if isinstance(value, torch.Tensor)]
        assert not hidden, f"{type(node).__name__} keeps {hidden} outside of save_for_backward"


def test_nothing_is_saved_for_frozen_columns_but_the_factor(backend):
    x, u = torch.randn(96, 256, requires_grad=True), torch.randn(256, 8)
    kept, _ = saved_by(lambda: peftkern.rotate(x, u), x, u)
    assert sum(kept.values()) <= 4 * 96 * 8 + 8 * 8 * 8


@pytest.mark.parametrize("use_reentrant", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_checkpointing_changes_no_bit(backend, function, dtype, use_reentrant):
    inputs = tensors(40, 33, 27, 5, dtype, requires_grad=False)
    inputs[3] = inputs[3].float()

    def run(forward):
        leaves = [t.clone().requires_grad_() for t in inputs]
        y = forward(*leaves)
        y.backward(torch.ones_like(y))
        return [y.detach()] + [t.grad for t in leaves]

    plain = run(function)
    again = run(lambda *t: checkpoint(function, *t, use_reentrant=use_reentrant))
    assert plain[4].any()
    for a, b in zip(plain, again, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_accumulated_gradients_are_sums(backend):
    x, W, b, u = tensors(dtype=torch.float32)
    for _ in range(2):
        peftkern.hra_linear(x, W, b, u).square().sum().backward()
    twice = u.grad.clone()
    u.grad = None
    peftkern.hra_linear(x, W, b, u).square().sum().backward()
    assert torch.equal(twice, 2 * u.grad)


def test_vmap_equals_a_loop(backend, function):
    inputs = [torch.stack([t, t * 0.7 + 0.1, -t]) for t in tensors(requires_grad=False)]
    together = torch.func.vmap(function)(*inputs)
    for i in range(3):
        assert oracle.error(together[i], function(*(t[i] for t in inputs))) < 1e-13
    shared = torch.func.vmap(function, (0, None, None, 0))(inputs[0], inputs[1][0], inputs[2][0], inputs[3])
    assert oracle.error(shared[1], function(inputs[0][1], inputs[1][0], inputs[2][0], inputs[3][1])) < 1e-13


def test_jacrev_and_jvp_equal_autograd(backend, function):
    inputs = tensors(requires_grad=False)
    wanted = torch.autograd.functional.jacobian(lambda u: function(*inputs[:3], u), inputs[3])
    jacobian = torch.func.jacrev(function, 3)(*inputs)
    assert wanted.any() and oracle.error(jacobian, wanted) < 1e-12
    tangent = torch.randn_like(inputs[3])
    moved = torch.func.jvp(lambda u: function(*inputs[:3], u), (inputs[3],), (tangent,))[1]
    assert oracle.error(moved, (wanted * tangent).sum((-2, -1))) < 1e-12
    vectorised = torch.autograd.functional.jacobian(lambda u: function(*inputs[:3], u), inputs[3], vectorize=True)
    assert oracle.error(vectorised, wanted) < 1e-12


def test_forward_mode_dual_numbers(backend):
    x, u, tangent = (torch.randn(s, dtype=torch.float64) for s in ((5, 7), (7, 3), (7, 3)))
    with torch.autograd.forward_ad.dual_level():
        dual = peftkern.rotate(x, torch.autograd.forward_ad.make_dual(u, tangent))
        moved = torch.autograd.forward_ad.unpack_dual(dual).tangent
    step = 1e-6
    difference = (peftkern.rotate(x, u + step * tangent) - peftkern.rotate(x, u - step * tangent)) / (2 * step)
    assert oracle.error(moved, difference) < 1e-8


@pytest.mark.parametrize("name", ("rotate", "exact", "low_rank_form", "penalty", "root penalty"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_autocast_changes_no_bit(backend, name, dtype):
    """The operations compute in the dtypes they are given; `fast` calls a base layer, which autocast may serve."""
    inputs = tensors(40, 33, 27, 5, dtype, requires_grad=False)
    incoming = torch.randn_like(FUNCTIONS[name](*inputs))

    def run(forward_active, backward_active):
        leaves = [t.clone().requires_grad_() for t in inputs]
        with torch.autocast("cpu", torch.bfloat16, enabled=forward_active):
            y = FUNCTIONS[name](*leaves)
        with torch.autocast("cpu", torch.bfloat16, enabled=backward_active):
            return [y.detach(), *torch.autograd.grad(y, leaves, incoming, allow_unused=True)]

    plain = run(False, False)
    for active in ((True, False), (True, True)):
        for a, b in zip(plain, run(*active), strict=True):
            assert (a is None and b is None) or (a.dtype is b.dtype and torch.equal(a, b))


@pytest.mark.parametrize("name", ("rotate", "exact", "low_rank_form", "penalty"))
def test_autocast_leaves_the_formulas_of_torch_func_alone(backend, name):
    inputs = [t[None] for t in tensors(10, 33, 27, 5, torch.float32, requires_grad=False)]
    plain = torch.func.vmap(FUNCTIONS[name])(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(torch.func.vmap(FUNCTIONS[name])(*inputs), plain)


def test_degenerate_columns_have_finite_derivatives_by_every_route(backend):
    u = torch.randn(9, 4, dtype=torch.float64)
    u[:, 1] = 0
    x = torch.randn(5, 9, dtype=torch.float64)
    orthonormal = torch.eye(9, 4, dtype=torch.float64)
    for function, columns in (
        (lambda u: peftkern.rotate(x, u), u),
        (peftkern.orthogonality_penalty, u),
        (lambda u: peftkern.orthogonality_penalty(u, squared=False), u),
        (lambda u: peftkern.orthogonality_penalty(u, squared=False), orthonormal),
    ):
        reverse = torch.autograd.functional.jacobian(function, columns)
        assert reverse.isfinite().all() and torch.func.jacrev(function)(columns).isfinite().all()
        assert not reverse[..., 1].any()
        assert oracle.error(torch.func.jacrev(function)(columns), reverse) < 1e-12


def test_compose_is_the_product_of_the_chains(backend):
    factors = [torch.randn(12, r, dtype=torch.float64) for r in (3, 1, 4)]
    leaves = [u.clone().requires_grad_() for u in factors]
    x, dz = torch.randn(2, 6, 12, dtype=torch.float64)
    V, T = householder.compose([householder.factor(u, torch.float64) for u in leaves])
    z = householder.apply_factor(x, V, T)
    H = oracle.chain(factors[0]) @ oracle.chain(factors[1]) @ oracle.chain(factors[2])
    assert oracle.error(z, x @ H.T) < 1e-13
    assert oracle.error(householder.apply_factor(z, V, T, reverse=True), x) < 1e-13
    assert oracle.error(T, torch.ops.peftkern.wy_factor(torch.cat(factors, 1))) < 1e-13
    seen = torch.autograd.grad(z, leaves, dz)
    truth = oracle.value_and_gradients(lambda *us: oracle.rotate(x, torch.cat(us, 1)), factors, dz)[1:]
    for ours, exact in zip(seen, truth, strict=True):
        assert oracle.error(ours, exact) < 1e-12


def test_factors_of_many_layers_are_those_of_each_with_their_gradients(backend):
    us = [torch.randn(K, r, dtype=torch.float64) for K, r in ((9, 3), (20, 4), (31, 3))]
    dTs = [torch.randn(u.shape[1], u.shape[1], dtype=torch.float64) for u in us]
    results = []
    for function in (householder.factor_many, lambda us, dtype: [householder.factor(u, dtype) for u in us]):
        leaves = [u.clone().requires_grad_() for u in us]
        Ts = [T for _, T in function(leaves, torch.float64)]
        results.append((*Ts, *torch.autograd.grad(Ts, leaves, dTs)))
    for many, one in zip(*results, strict=True):
        assert torch.equal(many, one)
