"""The native CPU kernels against the formulas in float64: every instruction set here, odd shapes, strides, threads."""

import functools

import pytest
import torch
import torch.nn.functional as F

from peftkern import _native
from peftkern.ops.householder import cpu_backend as cpu
from peftkern.ops.householder import reference

library, best_level, reason = _native.cpu()
if library is None:
    pytest.skip(f"no native CPU library: {reason}", allow_module_level=True)

LEVELS = library.level_names()[: best_level + 1]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(params=LEVELS)
def level(request, monkeypatch):
    monkeypatch.setattr(cpu, "_level", LEVELS.index(request.param))
    return request.param


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def working(dtype):
    return torch.float64 if dtype is torch.float64 else torch.float32


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def pairs(K, r, gap, seed=0):
    """Neighbouring columns that differ by `gap`: how HRA starts and what it looks like after a few steps."""
    base = normal(K, (r + 1) // 2, seed=seed).repeat_interleave(2, 1)[:, :r]
    return base + gap * normal(K, r, seed=seed + 1)


def error(actual, exact, scale=0.0):
    """Frobenius error relative to the exact result, or to `scale` where that is what cancels in it."""
    return float((actual.double() - exact).norm() / exact.norm().clamp_min(max(scale, 1e-300)))


# One rounding of a result; a sum of n terms may be off by a quarter of eps sqrt(n) more.
FLOOR = {torch.float64: 1e-13, torch.float32: 4e-7, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def floor(dtype, terms=1):
    return FLOOR[dtype] + torch.finfo(working(dtype)).eps * terms**0.5 / 4


def no_worse_than_torch(actual, plain, exact, floors, scales=None):
    """At most twice the error of plain torch in the same dtype, both against float64."""
    for a, p, e, f, s in zip(actual, plain, exact, floors, scales or [0.0] * len(exact), strict=True):
        assert a.shape == e.shape
        assert error(a, e, s) <= max(2 * error(p, e, s), f)


def exact_rotation(dz, x, V, T, reverse):
    """(z, P, dx, dV, dT) in float64, and for each the size of the terms that it is the sum of."""
    dz, x, V = dz.double(), x.double(), V.double()
    P = x @ V
    C = T if reverse else T.mT
    Q = dz @ V
    R, S = Q @ C.mT, P @ C
    dV_terms = dz.mT @ S, x.mT @ R
    exact = x - S @ V.mT, P, dz - R @ V.mT, -dV_terms[0] - dV_terms[1], -(P.mT @ Q) if reverse else -(Q.mT @ P)
    return exact, [0.0, 0.0, 0.0, float(dV_terms[0].norm() + dV_terms[1].norm()), 0.0]


SHAPES = [
    # M, K, r: every M, K and r of the list meets several of the others.
    (0, 123, 7), (1, 1, 1), (1, 768, 8), (1, 2051, 31), (3, 5, 2), (3, 768, 128), (17, 123, 3), (17, 2051, 8),
    (33, 1, 2), (33, 5, 7), (33, 768, 16), (33, 768, 32), (33, 123, 31), (33, 2051, 1), (70, 768, 64), (160, 123, 8),
    (33, 2051, 128), (517, 768, 8), (64, 96, 24), (300, 64, 33),
]  # fmt: skip


@functools.cache
def case(M, K, r, dtype):
    """Inputs, the float64 results of both directions and those of the reference backend; shared by the levels."""
    x, dz = normal(M, K, dtype=dtype, seed=1), normal(M, K, dtype=dtype, seed=2)
    V = normal(K, r, dtype=working(dtype), seed=3)
    if r > 3:
        V[:, 1], V[:, 3] = V[:, 0], 0
    T = reference.wy_factor(V.double())
    results = {}
    for reverse in (False, True):
        z, P = reference.rotate(x, V, T, reverse)
        plain = z, P, *reference.rotate_backward(dz, x, P, V, T, reverse, (True, True))
        results[reverse] = exact_rotation(dz, x, V, T, reverse), plain
    return x, dz, V, T, results


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotation_and_its_gradients_match_float64(level, dtype):
    for M, K, r in SHAPES:
        x, dz, V, T, results = case(M, K, r, dtype)
        sums = [floor(V.dtype, terms) for terms in (K, M + K, M + K)]
        floors = [floor(dtype, r), sums[0], floor(dtype, r), *sums[1:]]
        for reverse in (False, True):
            (exact, scales), plain = results[reverse]
            z, P = cpu.rotate(x, V, T, reverse)
            gradients = cpu.rotate_backward(dz, x, P, V, T, reverse, (True, True))
            no_worse_than_torch((z, P, *gradients), plain, exact, floors, scales)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_projection_and_its_gradients_match_float64(level, dtype):
    for M, K, r in SHAPES:
        x, _, V, _, _ = case(M, K, r, dtype)
        dP = normal(M, r, dtype=V.dtype, seed=4)
        dx, dV = cpu.project_backward(dP, x, V, (True, True))
        assert error(cpu.project(x, V), x.double() @ V.double()) <= floor(V.dtype, K)
        assert error(dx, dP.double() @ V.double().mT) <= floor(dtype, r)
        assert error(dV, x.double().mT @ dP.double()) <= floor(V.dtype, M)


@pytest.mark.parametrize("mask", [(True, False), (False, True), (False, False)])
def test_unwanted_gradients_come_back_empty_and_wanted_ones_unchanged(level, mask):
    x, dz, V, T, _ = case(517, 768, 8, torch.bfloat16)
    P = cpu.project(x, V)
    both = cpu.rotate_backward(dz, x, P, V, T, False, (True, True))
    some = cpu.rotate_backward(dz, x, P, V, T, False, mask)
    for tensor, full, wanted in zip(some, both, (mask[0], mask[1], mask[1]), strict=True):
        assert torch.equal(tensor, full) if wanted else tensor.shape == (0,)


def strided_forms(x, around=float("nan")):
    """The values of x [M, K] in every memory layout a caller may hand over, `around` in the memory beside them."""
    M, K = x.shape
    wide = torch.full((M, K + 9), around, dtype=x.dtype)
    wide[:, 4 : 4 + K] = x
    yield "columns of a wider tensor", wide[:, 4 : 4 + K]
    yield "transposed", x.t().contiguous().t()
    yield "every second row", x.repeat_interleave(2, 0)[::2]
    yield "unaligned", torch.cat((x.new_zeros(1), x.flatten()))[1:].view(M, K)
    yield "three dimensions", wide.view(M // 3, 3, K + 9)[:, :, 4 : 4 + K]
    yield "three dimensions, swapped", x.view(3, M // 3, K).transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_strides_of_the_inputs_do_not_change_a_bit(level, dtype):
    x, dz, V = normal(33, 123, dtype=dtype), normal(33, 123, dtype=dtype, seed=1), normal(123, 7, seed=2)
    T = cpu.wy_factor(V)
    z, P = cpu.rotate(x, V, T, False)
    gradients = cpu.rotate_backward(dz, x, P, V, T, False, (True, True))
    V_forms = [("plain", V), ("transposed", V.t().contiguous().t()), ("sliced", torch.stack((V, V), 2)[:, :, 1])]
    for (_, x_form), (_, dz_form) in zip(strided_forms(x), strided_forms(dz), strict=True):
        for _, V_form in V_forms:
            assert torch.equal(cpu.wy_factor(V_form), T)
            z_form, P_form = cpu.rotate(x_form, V_form, T, False)
            assert z_form.is_contiguous() and z_form.shape == x_form.shape
            assert torch.equal(z_form.reshape(z.shape), z) and torch.equal(P_form, P)
            forms = cpu.rotate_backward(dz_form, x_form, P, V_form, T, False, (True, True))
            assert all(torch.equal(f.reshape(g.shape), g) for f, g in zip(forms, gradients, strict=True))


def test_expanded_rows_are_read_through_their_zero_stride(level):
    V, row = normal(96, 4), normal(1, 96, seed=1)
    z, P = cpu.rotate(row.expand(40, 96), V, cpu.wy_factor(V), False)
    assert torch.equal(z, z[:1].expand_as(z)) and torch.equal(P, P[:1].expand_as(P))


@pytest.mark.parametrize("K, r", [(5, 1), (5, 2), (768, 8), (768, 31), (2051, 7), (2051, 32), (2051, 128)])
def test_wy_factor_and_its_gradient_match_float64(level, K, r):
    V, dT = normal(K, r), normal(r, r, dtype=torch.float64, seed=1)
    T = cpu.wy_factor(V)
    exact = reference.wy_factor(V.double())
    assert error(T, exact) <= 1e-13
    assert torch.equal(T, T.triu())
    dV = reference.wy_factor_backward(dT, V.double(), exact)
    plain = reference.wy_factor_backward(dT, V, T)
    no_worse_than_torch((cpu.wy_factor_backward(dT, V, T),), (plain,), (dV,), (FLOOR[torch.float32],))


def test_zero_columns_are_identity_reflections(level):
    V = normal(50, 6)
    V[:, 0] = V[:, 4] = 0
    T = cpu.wy_factor(V)
    assert (T[[0, 4]] == 0).all() and (T[:, [0, 4]] == 0).all()
    keep = [1, 2, 3, 5]
    assert error(T[keep][:, keep], reference.wy_factor(V[:, keep].double())) <= 1e-13
    dV = cpu.wy_factor_backward(torch.ones_like(T), V, T)
    assert dV.isfinite().all()


@pytest.mark.parametrize("gap", (0, 1e-6, 1e-4, 1e-2, 1))
def test_rotation_stays_orthogonal_for_near_parallel_vectors(level, gap):
    V = pairs(256, 32, gap)
    T = cpu.wy_factor(V)
    H = cpu.rotate(torch.eye(256), V, T, True)[0].double()
    assert float((H.mT @ H - torch.eye(256)).norm(2)) <= 5e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_pairs_are_the_identity(level, dtype):
    x = normal(40, 768, dtype=dtype)
    V = pairs(768, 8, 0).to(working(dtype))
    z = cpu.rotate(x, V, cpu.wy_factor(V), False)[0]
    if dtype in HALF:
        assert torch.equal(z, x)
    else:
        assert error(z, x.double()) <= torch.finfo(dtype).eps


@pytest.mark.parametrize("squared", (True, False))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_penalty_and_its_gradient_match_float64(level, dtype, squared):
    for K, r in ((1, 1), (5, 3), (123, 8), (768, 31)):
        V = normal(K, r, dtype=dtype)
        exact = V.double().requires_grad_()
        U = exact / exact.norm(dim=0)
        value = (torch.eye(r) - U.mT @ U).norm()
        value = value.square() if squared else value
        grad = torch.autograd.grad(value, exact)[0] if float(value.detach()) > 1e-12 else torch.zeros_like(exact)
        assert torch.allclose(cpu.orthogonality_penalty(V, squared).double(), value.detach(), rtol=4e-7, atol=1e-14)
        dV = cpu.orthogonality_penalty_backward(torch.tensor(0.5, dtype=dtype), V, squared)
        assert error(dV, grad / 2) <= (1e-12 if dtype is torch.float64 else 4e-7) or float(grad.norm()) == 0


@pytest.mark.parametrize("squared", (True, False))
def test_penalty_of_orthogonal_and_zero_columns_is_zero_with_zero_gradient(level, squared):
    V = torch.eye(6)[:, :4] * 3
    V[:, 2] = 0
    assert float(cpu.orthogonality_penalty(V, squared)) == 0
    assert not cpu.orthogonality_penalty_backward(torch.tensor(1.0), V, squared).any()


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotated_linear_rounds_once(level, dtype, bias):
    shapes = (0, 123, 5, 3), (1, 768, 33, 8), (5, 123, 7, 1), (12, 2051, 20, 7), (13, 64, 9, 2), (33, 123, 40, 31)
    for M, K, N, r in (*shapes, (70, 768, 96, 8)):
        x, W = normal(M, K, dtype=dtype), normal(N, K, dtype=dtype, seed=1)
        b = normal(N, dtype=dtype, seed=2) if bias else None
        V = normal(K, r, dtype=working(dtype), seed=3)
        T = cpu.wy_factor(V)
        z = exact_rotation(x, x, V, T, False)[0][0]
        exact = F.linear(z, W.double(), None if b is None else b.double())
        plain = F.linear(z.to(dtype), W, b)
        for x_form in (x, torch.cat((x, x), 1)[:, :K]):
            b_form = torch.stack((b, b), 1)[:, 0] if bias and x_form is not x else b
            y, P, B = cpu.rotated_linear(x_form, W, b_form, V, T, True)
            no_worse_than_torch((y,), (plain,), (exact,), (floor(dtype, K),))
            assert y.dtype is dtype and error(P, x.double() @ V.double()) <= floor(V.dtype, K)
            if dtype in HALF:
                assert error(B, W.double() @ reference.pairs(V.double())) <= floor(V.dtype, K)


UPDATE_SHAPES = [  # M, K, N, r, with few and with many columns for the width
    (17, 123, 33, 2), (33, 64, 37, 64), (40, 8, 16, 8), (130, 32, 96, 31), (33, 33, 40, 32), (16, 128, 50, 128),
    (70, 96, 5, 1), (17, 20, 130, 16), (64, 256, 64, 24),
]  # fmt: skip


@pytest.mark.parametrize("gap", (1, 1e-3))
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_rotated_linear_rounds_y_once_and_the_update_by_itself(level, dtype, gap):
    for M, K, N, r in UPDATE_SHAPES:
        x, W, V = normal(M, K, dtype=dtype), (normal(N, K, seed=1) / K**0.5).to(dtype), pairs(K, r, gap, seed=3)
        T = reference.wy_factor(V.double())
        exact, base = exact_rotation(x, x, V, T, False)[0][0] @ W.double().mT, x.double() @ W.double().mT
        y, P, _ = cpu.rotated_linear(x, W, None, V, T, False)
        # Few reflections: the accumulator of the base product starts from the update as it was written down.
        summed = base + (exact - base).to(dtype).double() if 16 * r <= K else exact
        assert error(y, exact) <= 1.01 * error(summed.to(dtype), exact), (M, K, N, r)
        assert error(P, x.double() @ V.double()) <= floor(V.dtype, K)


BACKWARD_SHAPES = [  # M, K, N, r
    (0, 123, 40, 7), (1, 1, 1, 1), (1, 768, 96, 8), (17, 123, 33, 2), (17, 96, 64, 16), (33, 256, 15, 7),
    (33, 64, 37, 31), (33, 96, 96, 1), (130, 123, 64, 64), (130, 160, 200, 32), (200, 96, 544, 2), (33, 1027, 97, 8),
]  # fmt: skip


@functools.cache
def backward_case(M, K, N, r, dtype, gap):
    """dy, x, W, P, B, V, T; the float64 gradients, the size of their terms and those of the reference backend."""
    dy, x = normal(M, N, dtype=dtype, seed=1), normal(M, K, dtype=dtype, seed=2)
    W, V = (normal(N, K, seed=3) / K**0.5).to(dtype), pairs(K, r, gap, seed=4)
    T = reference.wy_factor(V.double())
    dz = dy.double() @ W.double()
    (_, P, *exact), (*_, dV_size, _) = exact_rotation(dz, x, V, T, False)
    # |Q^T P| for rows that do not cancel.
    dT_size = float((dz @ V.double()).norm() * P.norm()) / max(M, 1) ** 0.5
    inputs = dy, x, W, P.float(), (W.double() @ reference.pairs(V.double())).float(), V, T
    return inputs, exact, [0.0, dV_size, dT_size], reference.rotated_linear_backward(*inputs, (True, True))


@pytest.mark.parametrize("gap", (1, 1e-3))
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_gradients_of_rotated_linear_match_float64(level, dtype, gap):
    for M, K, N, r in BACKWARD_SHAPES:
        inputs, exact, scales, plain = backward_case(M, K, N, r, dtype, gap)
        floors = [floor(dtype, r), *[floor(torch.float32, M + K + N)] * 2]
        gradients = cpu.rotated_linear_backward(*inputs, (True, True))
        assert [g.dtype for g in gradients] == [dtype, torch.float32, torch.float64]
        no_worse_than_torch(gradients, plain, exact, floors, scales)


@pytest.mark.parametrize("mask", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("shape", [(130, 160, 200, 32), (33, 1027, 97, 8)])
def test_unwanted_gradients_of_rotated_linear_come_back_empty(level, shape, mask):
    for dtype in HALF:
        inputs = backward_case(*shape, dtype, 1)[0]
        both = cpu.rotated_linear_backward(*inputs, (True, True))
        some = cpu.rotated_linear_backward(*inputs, mask)
        for tensor, full, wanted in zip(some, both, (mask[0], mask[1], mask[1]), strict=True):
            assert torch.equal(tensor, full) if wanted else tensor.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M, K, r", [(517, 768, 8), (33, 123, 7), (70, 256, 32), (5, 64, 3)])
def test_dx_may_take_the_place_of_dz(level, M, K, r, dtype):
    x, dz, V = normal(M, K, dtype=dtype, seed=1), normal(M, K, dtype=dtype, seed=2), normal(K, r, dtype=working(dtype))
    inputs = x, cpu.project(x, V), V, cpu.wy_factor(V), False
    for mask in ((True, True), (True, False)):
        apart, place = cpu.rotate_backward(dz, *inputs, mask), dz.clone()
        together = cpu._rotate_backward(place, *inputs, mask, place)
        assert together[0] is place and all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))


def exact_product(M, K, N, r, dtype):
    """Inputs of rotated_linear_backward whose dy W is a small integer: the library rounds nothing, in any order."""
    dy, W = (normal(*shape, seed=seed).sign().to(dtype) for shape, seed in (((M, N), 1), ((N, K), 2)))
    x, V = normal(M, K, dtype=dtype, seed=3), normal(K, r, seed=4)
    return dy, x, W, cpu.project(x, V), cpu.project(W, reference.pairs(V)), V, cpu.wy_factor(V)


@pytest.mark.parametrize("K, N, r", [(123, 77, 7), (96, 64, 8), (64, 37, 16)])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_strides_do_not_change_a_bit_of_the_gradients_of_rotated_linear(level, dtype, K, N, r):
    dy, x, W, P, B, V, T = exact_product(33, K, N, r, dtype)
    plain = cpu.rotated_linear_backward(dy, x, W, P, B, V, T, (True, True))
    W_forms = [form[:N] for _, form in strided_forms(torch.cat((W, W[: -N % 3])))][:4]
    # torch's own bfloat16 product reads one element beyond a strided row of odd length, times zero: 7 and not NaN.
    for i, ((_, dy_form), (_, x_form)) in enumerate(zip(strided_forms(dy, 7), strided_forms(x), strict=True)):
        forms = cpu.rotated_linear_backward(dy_form, x_form, W_forms[i % 4], P, B, V, T, (True, True))
        assert forms[0].shape == x_form.shape
        assert all(torch.equal(f.reshape(g.shape), g) for f, g in zip(forms, plain, strict=True))
    one_row = cpu.rotated_linear_backward(dy[:1].expand(33, N), x, W, P, B, V, T, (True, True))
    copied = cpu.rotated_linear_backward(dy[:1].repeat(33, 1), x, W, P, B, V, T, (True, True))
    assert all(torch.equal(f, g) for f, g in zip(one_row, copied, strict=True))


@pytest.mark.parametrize("K, N, r", [(768, 192, 8), (123, 150, 31), (96, 101, 16)])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_any_number_of_threads_gives_the_same_gradients_of_rotated_linear(level, dtype, K, N, r, threads):
    inputs = exact_product(517, K, N, r, dtype)
    threads(1)
    first = cpu.rotated_linear_backward(*inputs, (True, True))
    for count in (1, 2, 3):
        threads(count)
        seen = cpu.rotated_linear_backward(*inputs, (True, True))
        assert all(torch.equal(a, b) for a, b in zip(seen, first, strict=True)), count


@pytest.mark.parametrize("M", (4, 256))
@pytest.mark.parametrize("gap", (3e-4, 1e-3, 1e-2))
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_rotated_linear_keeps_small_updates(level, dtype, gap, M):
    x, W = normal(M, 768, dtype=dtype), (normal(512, 768, seed=1) / 28).to(dtype)
    V = pairs(768, 8, gap, seed=3)
    T = cpu.wy_factor(V)
    base = x.double() @ W.double().mT
    update = exact_rotation(x, x, V, T, False)[0][0] @ W.double().mT - base
    y = cpu.rotated_linear(x, W, None, V, T, False)[0].double()
    gain = float(((y - base) * update).sum() / update.square().sum())
    # The output's own rounding, unbiased, is left: its share of the gain averages out over M * 512 elements.
    noise = torch.finfo(dtype).eps * float(base.norm() / update.norm()) / (M * 512) ** 0.5
    assert abs(gain - 1) <= 0.01 + 2 * noise


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_runs_and_any_number_of_threads_give_the_same_bits(level, dtype, threads):
    x, dz, V, _, _ = case(517, 768, 8, dtype)
    W = normal(80, 768, dtype=dtype, seed=5)

    def run():
        T = cpu.wy_factor(V)
        z, P = cpu.rotate(x, V, T, False)
        gradients = cpu.rotate_backward(dz, x, P, V, T, False, (True, True))
        dP = cpu.project_backward(P, x, V, (True, True))
        linear = cpu.rotated_linear(x[:3], W, None, V, T, True)
        return (T, z, P, *gradients, *dP, *linear, cpu.wy_factor_backward(gradients[2], V, T))

    threads(1)
    first = run()
    for count in (1, 2, 3):
        threads(count)
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True)), count


def test_not_a_number_and_infinity_spread_like_in_the_formulas(level):
    x = normal(40, 96, dtype=torch.bfloat16)
    x[3, 5], x[20, 90] = float("nan"), float("inf")
    V = normal(96, 4)
    T = cpu.wy_factor(V)
    z = cpu.rotate(x, V, T, False)[0]
    finite = z.isfinite().all(1)
    assert not finite[3] and not finite[20] and finite.sum() == 38
    V[7, 1] = float("nan")
    assert not cpu.wy_factor(V).isfinite().all()


def test_support_is_refused_with_a_reason_beyond_the_largest_rank():
    V = normal(300, library.MAX_RANK + 1)
    ok, why = cpu.supports("wy_factor", V)
    assert not ok and str(library.MAX_RANK) in why
    with pytest.raises(ValueError, match="128"):
        cpu.wy_factor(V)
