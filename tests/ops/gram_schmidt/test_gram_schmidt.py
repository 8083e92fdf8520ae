"""Orthonormalised reflections against modified Gram-Schmidt in float64, over the whole range of condition numbers."""

import devices
import oracle
import pytest
import torch

from peftkern.ops import householder


def chain(u, dtype=None):
    """H [K, K] as the package applies it."""
    dtype = dtype or u.dtype
    return householder.apply_factor(torch.eye(len(u), dtype=dtype), *householder.factor(u, dtype, True), reverse=True)


def rotate(x, u, reverse=False):
    return householder.apply_factor(x, *householder.factor(u, x.dtype, True), reverse)


def conditioned(K, r, kappa, dtype=torch.float64):
    """Columns whose singular values fall from 1 to 1 / kappa."""
    left = torch.linalg.qr(torch.randn(K, r, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(r, r, dtype=torch.float64))[0]
    return (left * kappa ** -torch.linspace(0, 1, r, dtype=torch.float64) @ right).to(dtype)


@pytest.mark.parametrize("reverse", (False, True))
@pytest.mark.parametrize("shape, r", (((5, 123, 123), 8), ((7, 127), 1), ((3, 2, 31), 5), ((4, 6), 5), ((0, 9), 3)))
def test_value_and_gradients_equal_gram_schmidt(backend, shape, r, reverse):
    x, dz = torch.randn(2, *shape, dtype=torch.float64)
    u = torch.randn(shape[-1], r, dtype=torch.float64)
    truth = oracle.value_and_gradients(lambda x, u: x @ oracle.gram_schmidt_chain(u), (x, u), dz)
    seen = oracle.value_and_gradients(lambda x, u: rotate(x, u, reverse), (x, u), dz)
    for ours, exact in zip(seen, truth, strict=True):
        assert ours.shape == exact.shape and oracle.error(ours, exact) < 1e-11


def test_gradients_equal_those_through_qr(backend):
    x, dz = torch.randn(2, 20, 33, dtype=torch.float64)
    u = torch.randn(33, 6, dtype=torch.float64)

    def through_qr(x, u):
        Q = torch.linalg.qr(u)[0]
        return x - 2 * x @ Q @ Q.T

    truth = oracle.value_and_gradients(through_qr, (x, u), dz)
    seen = oracle.value_and_gradients(rotate, (x, u), dz)
    assert all(oracle.error(ours, exact) < 1e-12 for ours, exact in zip(seen, truth, strict=True))


def test_gradcheck_and_gradgradcheck(backend):
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    u = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    fast = devices.simulated(backend)
    assert torch.autograd.gradcheck(rotate, (x, u), fast_mode=fast)
    assert torch.autograd.gradgradcheck(rotate, (x, u), fast_mode=fast)


# In float32 the rotation costs what an orthonormal basis costs, whatever the condition of the columns it came from.
@pytest.mark.parametrize("K, r", ((64, 8), (257, 33), (160, 17)))
@pytest.mark.parametrize("kappa", (1.0, 1e1, 3e1, 1e2, 3e2, 1e3, 1e4, 1e5, 1e6))
def test_the_rotation_is_exact_over_condition_numbers(backend, K, r, kappa):
    u = conditioned(K, r, kappa)
    H, truth = chain(u), oracle.gram_schmidt_chain(u)
    assert oracle.orthogonality_error(H) < 1e-13
    assert (H - truth).norm() < 1e-14 + 1e-15 * kappa
    u = u.float()
    H, Q = chain(u), oracle.orthonormal_basis(u)
    assert Q.shape[1] == r
    truth = torch.eye(K, dtype=torch.float64) - 2 * Q @ Q.T
    assert oracle.orthogonality_error(H) < 5e-6
    assert (H.double() - truth).norm() < 5e-6


@pytest.mark.parametrize("kappa", (1.0, 1e2, 1e4))
def test_float32_gradients_are_as_accurate_as_through_qr(backend, kappa):
    x, dz = torch.randn(2, 50, 96)
    u = conditioned(96, 6, kappa, torch.float32)

    def through_qr(x, u):
        Q = torch.linalg.qr(u)[0]
        return x - 2 * x @ Q @ Q.T

    truth = oracle.value_and_gradients(through_qr, (x.double(), u.double()), dz)
    plain = oracle.value_and_gradients(through_qr, (x, u), dz)
    seen = oracle.value_and_gradients(rotate, (x, u), dz)
    oracle.assert_as_good_as(("z", "dx", "du"), seen, plain, truth, 96)


def test_orthogonal_columns_give_the_chain_of_reflections(backend):
    u = torch.linalg.qr(torch.randn(40, 7, dtype=torch.float64))[0] * torch.rand(7, dtype=torch.float64)
    assert oracle.error(chain(u), oracle.chain(u)) < 1e-13


def test_the_order_and_length_of_the_columns_do_not_matter(backend):
    x, u = torch.randn(9, 30, dtype=torch.float64), torch.randn(30, 5, dtype=torch.float64)
    assert oracle.error(rotate(x, u.flip(1)), rotate(x, u)) < 1e-13
    assert oracle.error(rotate(x, u * torch.tensor([1e-6, 1e6, 1, -1, 1e3]).double()), rotate(x, u)) < 1e-13


def test_reverse_is_the_same_rotation(backend):
    x, u = torch.randn(9, 30, dtype=torch.float64), torch.randn(30, 5, dtype=torch.float64)
    assert oracle.error(rotate(x, u, reverse=True), rotate(x, u)) < 1e-14
    assert oracle.error(rotate(rotate(x, u), u), x) < 1e-14


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("what", ("duplicated", "scaled", "zero", "sum of others"))
def test_a_dependent_column_is_dropped_with_no_gradient(backend, what, dtype):
    """PEFT divides 0 by 0 here, at its own initial value. The earlier column stays, the later one is the identity."""
    x, dz = torch.randn(2, 12, 50, dtype=dtype)
    u = torch.randn(50, 4, dtype=dtype)
    u[:, 2] = {
        "duplicated": u[:, 0],
        "scaled": -8 * u[:, 0],
        "zero": torch.zeros(50, dtype=dtype),
        "sum of others": (u[:, 0].round() + u[:, 1].round()) / 2,
    }[what]
    if what == "sum of others":
        u[:, :2] = u[:, :2].round()
    seen = oracle.value_and_gradients(rotate, (x, u), dz)
    others = oracle.value_and_gradients(rotate, (x, u[:, (0, 1, 3)]), dz)
    tolerance = 1e-12 if dtype is torch.float64 else 2e-6
    assert oracle.error(seen[0], others[0]) < tolerance and oracle.error(seen[1], others[1]) < tolerance
    assert oracle.error(seen[2][:, (0, 1, 3)], others[2]) < tolerance
    assert not seen[2][:, 2].any()
    assert oracle.orthogonality_error(chain(u)) < 5e-6


def test_equal_pairs_give_half_as_many_reflections(backend):
    half = torch.randn(64, 3)
    H = chain(half.repeat_interleave(2, 1))
    assert oracle.error(H, oracle.gram_schmidt_chain(half)) < 1e-6


def test_more_columns_than_dimensions_reflect_everything(backend):
    x = torch.randn(5, 4, dtype=torch.float64)
    assert oracle.error(rotate(x, torch.randn(4, 7, dtype=torch.float64)), -x) < 1e-13


@pytest.mark.parametrize("gap", (1e-5, 1e-4, 1e-2))
def test_near_parallel_columns_are_told_apart(backend, gap):
    """Further apart than the threshold (a relative residual of 3e-7 here): both kept, and H still orthogonal."""
    first, move = torch.randn(2, 48, 1)
    u = torch.cat((first, first + gap * move), 1)
    H = chain(u)
    assert oracle.orthogonality_error(H) < 2e-6
    assert oracle.error(H, oracle.gram_schmidt_chain(u)) < 2e-6
    assert H.double().trace() == pytest.approx(48 - 4, abs=1e-4)


def test_the_gradient_stays_within_what_the_span_allows(backend):
    """H depends on the span alone: moving the columns within it changes nothing, so U^T dU = 0."""
    x, dz = torch.randn(2, 12, 50, dtype=torch.float64)
    u = torch.randn(50, 4, dtype=torch.float64)
    du = oracle.value_and_gradients(rotate, (x, u), dz)[2]
    assert (u.T @ du).norm() < 1e-12 * u.norm() * du.norm()


def test_a_non_finite_parameter_is_not_hidden(backend):
    u = torch.randn(20, 3)
    u[4, 1] = torch.nan
    assert not rotate(torch.randn(5, 20), u).isfinite().any()


def test_vmap_and_jacrev_equal_a_loop(backend):
    x, u = torch.randn(3, 4, 9, dtype=torch.float64), torch.randn(3, 9, 2, dtype=torch.float64)
    together = torch.func.vmap(rotate)(x, u)
    for i in range(3):
        assert oracle.error(together[i], rotate(x[i], u[i])) < 1e-14
    jacobian = torch.func.jacrev(rotate, 1)(x[0], u[0])
    assert oracle.error(jacobian, torch.autograd.functional.jacobian(lambda u: rotate(x[0], u), u[0])) < 1e-13
    tangent = torch.randn_like(u[0])
    moved = torch.func.jvp(lambda u: rotate(x[0], u), (u[0],), (tangent,))[1]
    assert oracle.error(moved, (jacobian * tangent).sum((-2, -1))) < 1e-13
