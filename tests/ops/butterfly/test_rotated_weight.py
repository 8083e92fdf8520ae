"""`fast` where the weight has fewer rows than x: its rotated rows are rounded once, and the scale with them."""

import oracle
import oracle_blocks
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from peftkern.ops import butterfly as bf

HALF = (torch.bfloat16, torch.float16)
# What one rounding leaves, of a number or, in float32 and float64, of sums.
ONCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
NAMES = ("y", "dx", "dweight", "dR", "ds")


def problem(M=90, K=48, N=40, b=4, f=3, dtype=torch.float32, size=0.1, wide=torch.float32):
    """x, weight, boft_R and boft_s, and an incoming gradient."""
    x, weight = torch.randn(M, K), torch.randn(N, K) / K**0.5
    B, s = size * torch.randn(f, K // b, b, b), 1 + size * torch.randn(N, 1)
    return [x.to(dtype), weight.to(dtype), B.to(wide), s.to(wide)], torch.randn(M, N).to(dtype)


def fast(x, weight, B, s):
    return bf.boft_linear(x, weight, None, B, s)


def truth_of(tensors, dy):
    tensors = [t.double() for t in tensors]
    return oracle.value_and_gradients(lambda x, W, B, s: oracle_blocks.boft(x, W, None, B, s), tensors, dy)


def of_peft(tensors, dy):
    return oracle.value_and_gradients(lambda x, W, B, s: oracle_blocks.peft_boft(x, W, None, B, s), tensors, dy)


@pytest.mark.parametrize("transpose_weight", (False, True))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, *HALF))
@pytest.mark.parametrize("N, K, b, f", ((21, 48, 8, 2), (64, 32, 4, 4), (3, 28, 14, 1), (70, 256, 8, 5)))
def test_the_weight_is_rotated_and_scaled_with_one_rounding(backend, N, K, b, f, dtype, transpose_weight):
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    W, s = torch.randn(N, K).to(dtype), torch.randn(N).to(wide)
    W = W.T.contiguous().T if transpose_weight else W
    R = bf.butterfly_blocks(torch.randn(f, K // b, b, b, dtype=wide))
    truth = (W.double() @ oracle_blocks.butterfly(R).T) * s.double()[:, None]
    seen = torch.ops.peftkern.butterfly_rotate_weight(W, s, R)
    assert seen.dtype is dtype and seen.is_contiguous()
    once = {torch.float64: 1e-13, torch.float32: 1e-6}.get(dtype, 1.02 * oracle.error(truth.to(dtype), truth))
    assert oracle.error(seen, truth) <= once


def test_it_is_the_form_of_few_rows_of_the_weight_alone(backend):
    (x, weight, B, s), _ = problem(dtype=torch.bfloat16)
    R = bf.butterfly_blocks(B)
    scaled = torch.ops.peftkern.butterfly_rotate_weight(weight, s.reshape(-1), R)
    rotated, bias = bf.butterfly_rotate(weight, R, True), torch.randn(40).bfloat16()
    assert torch.equal(fast(x, weight, B, s), F.linear(x, scaled))
    assert torch.equal(bf.boft_linear(x, weight, None, B), F.linear(x, rotated))
    expected = bf.scale_outputs(F.linear(x, rotated, bias), s, bias)
    assert torch.equal(bf.boft_linear(x, weight, bias, B, s), expected)
    few = x[:40]
    expected = bf.scale_outputs(F.linear(bf.butterfly_rotate(few, R), weight), s)
    assert torch.equal(fast(few, weight, B, s), expected)
    # float16 has no room for small scales in the weight.
    x, weight = x.half(), weight.half()
    expected = bf.scale_outputs(F.linear(x, bf.butterfly_rotate(weight, R, True)), s)
    assert torch.equal(fast(x, weight, B, s), expected)


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("scaled", (True, False))
@pytest.mark.parametrize("shape", ((21,), (3, 7)))
def test_values_and_gradients_equal_the_oracle(backend, shape, scaled, bias):
    (x, weight, B, s), _ = problem(21, 24, 11, 6, 2, torch.float64, 0.4, torch.float64)
    x, b, dy = x.reshape(*shape, 24), torch.randn(11).double(), torch.randn(*shape, 11).double()
    tensors = [x, weight, B, *((s,) if scaled else ()), *((b,) if bias else ())]

    def arguments(x, weight, B, *rest):
        rest = list(rest)
        s = rest.pop(0) if scaled else None
        return x, weight, rest[0] if bias else None, B, s

    truth = oracle.value_and_gradients(lambda *t: oracle_blocks.boft(*arguments(*t)), tensors, dy)
    seen = oracle.value_and_gradients(lambda *t: bf.boft_linear(*arguments(*t)), tensors, dy)
    for ours, exact in zip(seen, truth, strict=True):
        assert ours.shape == exact.shape and oracle.error(ours, exact) < 1e-12


@pytest.mark.parametrize("dtype", (torch.float32, *HALF))
@pytest.mark.parametrize("b, f", ((4, 3), (12, 1)))
def test_errors_are_those_of_peft(backend, b, f, dtype):
    tensors, dy = problem(b=b, f=f, dtype=dtype)
    seen = oracle.value_and_gradients(fast, tensors, dy)
    assert [t.dtype for t in seen[1:]] == [t.dtype for t in tensors]
    oracle.assert_as_good_as(NAMES, seen, of_peft(tensors, dy), truth_of(tensors, dy), 90)


def gain(y, base, update):
    """How much of an update arrives: 1 is all of it, on average over the outputs."""
    return (((y.double() - base) * update).sum() / update.square().sum()).item()


@pytest.mark.parametrize("of", ("the rotation", "the scale", "both"))
@pytest.mark.parametrize("size", (3e-4, 1e-3, 1e-2))
@pytest.mark.parametrize("dtype", HALF)
def test_it_keeps_as_much_of_small_updates_as_peft(backend, dtype, size, of):
    (x, weight, B, s), _ = problem(768, 128, 256, 8, 3, dtype, size)
    base = x.double() @ weight.double().T
    B, s = B * (of != "the scale"), 1 + (s - 1) * (of != "the rotation")
    for _ in range(3):
        update = oracle_blocks.boft(x, weight, None, B, s) - base
        times = (size * base.norm() / update.norm()).item()
        B, s = B * times, 1 + (s - 1) * times
    update = oracle_blocks.boft(x, weight, None, B, s) - base
    kept, theirs = (gain(f(x, weight, None, B, s), base, update) for f in (bf.boft_linear, oracle_blocks.peft_boft))
    # One rounding or the other loses as much, but for which numbers it happens to meet.
    assert kept >= theirs - 0.02


@pytest.mark.parametrize("value", (0.0, -0.0, 1e-45, -1e-30, 1e-15, 1e-3, -1.0, 1e4))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
def test_scales_of_any_size_and_sign_have_their_gradients(backend, dtype, value):
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    tensors, dy = problem(dtype=dtype, wide=wide)
    tensors[3][::2] = value
    seen, truth = oracle.value_and_gradients(fast, tensors, dy), truth_of(tensors, dy)
    for i in (0, 1):
        some = [[t.T[i::2] for t in (seen[0], truth[0])], [t[i::2] for t in (seen[4], truth[4])]]
        for (ours, exact), name in zip(some, ("y", "ds"), strict=True):
            if name == "y" and not i and abs(value) < 2.0**-60:
                # Nothing that a sum with other numbers would notice.
                assert ours.abs().max() < 2e-17
            else:
                assert oracle.error(ours, exact) < ONCE[dtype]
    if dtype is not torch.float64:
        oracle.assert_as_good_as(NAMES[1:], seen[1:], of_peft(tensors, dy)[1:], truth[1:], 90)


@pytest.mark.parametrize("dtype", (torch.float32, *HALF))
def test_rows_that_add_up_leave_no_more_than_one_rounding_of_the_scales_gradient(backend, dtype):
    """What rounds the weight is the same for all rows: unlike the rounding of x it does not average out."""
    tensors, dy = problem(dtype=dtype)
    tensors[0] = tensors[0] + 1
    seen, truth = oracle.value_and_gradients(fast, tensors, torch.ones_like(dy)), truth_of(tensors, torch.ones_like(dy))
    assert oracle.error(seen[4], truth[4]) < ONCE[dtype]


def leaves():
    tensors, _ = problem(7, 8, 3, 2, 2, torch.float64, 0.4, torch.float64)
    return [t.requires_grad_() for t in tensors]


def test_gradcheck(backend):
    assert torch.autograd.gradcheck(fast, leaves(), fast_mode=backend in ("triton", "cuda"))


def test_gradgradcheck(backend):
    assert torch.autograd.gradgradcheck(fast, leaves(), fast_mode=backend in ("triton", "cuda"))


def test_torch_func_sees_the_same_function():
    tensors = [t.detach() for t in leaves()]
    y, cotangent = fast(*tensors), torch.randn(7, 3).double()
    assert oracle.error(torch.func.vmap(lambda x: fast(x, *tensors[1:]))(tensors[0][None])[0], y) < 1e-14
    _, backward = torch.func.vjp(fast, *tensors)
    active = [t.requires_grad_() for t in tensors]
    for ours, theirs in zip(torch.autograd.grad(fast(*active), active, cotangent), backward(cotangent), strict=True):
        assert oracle.error(ours, theirs) < 1e-12


@pytest.mark.parametrize("wanted", range(4))
def test_a_single_gradient_is_the_same_as_among_all(backend, wanted):
    tensors, dy = problem(dtype=torch.bfloat16)
    full = oracle.value_and_gradients(fast, tensors, dy)
    leaf = tensors[wanted].clone().requires_grad_()
    y = fast(*tensors[:wanted], leaf, *tensors[wanted + 1 :])
    assert torch.equal(torch.autograd.grad(y, leaf, dy)[0], full[wanted + 1])


def test_checkpointing_changes_no_bit(backend):
    tensors, dy = problem(dtype=torch.bfloat16)
    plain = oracle.value_and_gradients(fast, tensors, dy)
    again = oracle.value_and_gradients(lambda *t: checkpoint(fast, *t, use_reentrant=False), tensors, dy)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def added_to(*tensors):
    """A residual added in place, as some models do behind a linear layer."""
    y = fast(*tensors)
    y += 1
    return y * y


def through_a_checkpoint(*tensors):
    return checkpoint(added_to, *tensors, use_reentrant=False)


def kept_elsewhere(*tensors):
    with torch.autograd.graph.save_on_cpu():
        return added_to(*tensors)


@pytest.mark.parametrize("function", (added_to, through_a_checkpoint, kept_elsewhere))
@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16))
def test_a_caller_may_write_into_the_output(backend, function, dtype):
    tensors, dy = problem(dtype=dtype, wide=torch.float64 if dtype is torch.float64 else torch.float32)
    tensors[3][3] = 0

    def aside(f):
        return lambda x, W, B, s: (f(x, W, None, B, s) + 1).square()

    seen = oracle.value_and_gradients(function, tensors, dy)
    truth = oracle.value_and_gradients(aside(oracle_blocks.boft), [t.double() for t in tensors], dy)
    if dtype is torch.float64:
        assert all(oracle.error(ours, exact) < 1e-12 for ours, exact in zip(seen, truth, strict=True))
    else:
        plain = oracle.value_and_gradients(aside(oracle_blocks.peft_boft), tensors, dy)
        oracle.assert_as_good_as(NAMES, seen, plain, truth, 90)


def test_a_backward_under_autocast_is_the_same(backend):
    tensors, dy = problem()
    outside = oracle.value_and_gradients(added_to, tensors, dy)
    active = [t.requires_grad_() for t in tensors]
    y = added_to(*active)
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(y, active, dy)
    assert all(torch.equal(a, b) for a, b in zip(inside, outside[1:], strict=True))


def test_a_graph_that_is_kept_gives_the_same_gradients_twice(backend):
    tensors, dy = problem(dtype=torch.bfloat16)
    active = [t.requires_grad_() for t in tensors]
    y = fast(*active)
    first = torch.autograd.grad(y, active, dy, retain_graph=True)
    penalty = torch.autograd.grad(y, active, dy, create_graph=True)
    second = torch.autograd.grad(y, active, dy, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(oracle.error(a.detach(), b) < 1e-2 and a.requires_grad for a, b in zip(penalty, first, strict=True))
    with torch.no_grad():
        y.zero_()
    third = torch.autograd.grad(y, active, dy)
    assert all(oracle.error(a, b) < 1e-2 for a, b in zip(third, first, strict=True))


@pytest.mark.parametrize("dtype", HALF)
def test_backward_keeps_x_the_product_and_the_blocks_and_no_rotated_weight(dtype):
    (x, weight, B, s), _ = problem(dtype=dtype)
    x.requires_grad_(), B.requires_grad_(), s.requires_grad_()
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        y = fast(x, weight, B, s)
    sizes = sorted(t.numel() for t in saved.values() if t.data_ptr() not in (weight.data_ptr(), s.data_ptr()))
    extra = [s.numel()] if dtype is torch.bfloat16 else []
    assert sizes == sorted([x.numel(), y.numel(), B.numel(), B.numel(), *extra])


def test_nothing_is_kept_where_nothing_is_differentiated(backend):
    (x, weight, B, s), _ = problem(dtype=torch.bfloat16)
    with_graph = fast(x, weight, B.requires_grad_(), s.requires_grad_())
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            y = fast(x, weight, B, s)
            assert torch.equal(y, with_graph) and not y.requires_grad
            assert torch.equal(bf.fast_linear(x, weight, None, bf.butterfly_blocks(B), s), with_graph)


def test_each_of_the_two_forms_is_compiled_once():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def function(*t):
        return added_to(*t)

    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for tokens in (2, 3, 7, 16, 30, 41):
        tensors, dy = problem(tokens, 24, 10, 4, 2)
        seen, wanted = (oracle.value_and_gradients(f, tensors, dy) for f in (compiled, function))
        assert all(oracle.error(a, b) < 1e-6 for a, b in zip(seen, wanted, strict=True))
    assert counter.frame_count <= 3
