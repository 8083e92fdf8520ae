"""The orthogonality penalty and its gradient, squared and not, at the optimum and at degenerate columns."""

import oracle
import pytest
import torch

import peftkern


@pytest.mark.parametrize("squared", (True, False))
@pytest.mark.parametrize("K, r", ((13, 2), (31, 3), (64, 8), (5, 9), (123, 128)))
def test_value_and_gradient_equal_the_oracle(backend, K, r, squared):
    u, incoming = torch.randn(K, r, dtype=torch.float64), torch.tensor(-1.7)
    truth = oracle.value_and_gradients(lambda u: 0.3 * oracle.penalty(u, squared), (u,), incoming)
    seen = oracle.value_and_gradients(lambda u: peftkern.orthogonality_penalty(u, 0.3, squared), (u,), incoming)
    assert seen[0].shape == () and oracle.error(seen[0], truth[0]) < 1e-13
    assert oracle.error(seen[1], truth[1]) < 1e-12


@pytest.mark.parametrize("squared", (True, False))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_it_is_as_accurate_as_plain_torch(backend, dtype, squared):
    u, incoming = torch.randn(200, 16).to(dtype), torch.tensor(1.0)

    def plain(u):
        U = u / u.norm(dim=0)
        total = (torch.eye(16, dtype=u.dtype) - U.T @ U).square().sum()
        return total if squared else total.sqrt()

    truth = oracle.value_and_gradients(lambda u: oracle.penalty(u, squared), (u.double(),), incoming)
    theirs = oracle.value_and_gradients(plain, (u,), incoming)
    seen = oracle.value_and_gradients(lambda u: peftkern.orthogonality_penalty(u, squared=squared), (u,), incoming)
    assert seen[0].dtype is torch.float32 and seen[1].dtype is dtype
    oracle.assert_as_good_as(("value", "du"), seen, theirs, truth, 200)


@pytest.mark.parametrize("squared", (True, False))
def test_orthogonal_columns_cost_nothing_and_are_left_alone(backend, squared):
    """The root has 0/0 here; its gradient is taken as 0."""
    u = (torch.eye(9, 4) * torch.tensor([1e-3, 1, 2, 1e3])).requires_grad_()
    value = peftkern.orthogonality_penalty(u, squared=squared)
    value.backward()
    assert value == 0 and not u.grad.any() and u.grad.isfinite().all()


@pytest.mark.parametrize("squared", (True, False))
def test_one_column_and_zero_columns_count_nothing(backend, squared):
    single = torch.randn(9, 1, requires_grad=True)
    peftkern.orthogonality_penalty(single, squared=squared).backward()
    assert not single.grad.any()
    u = torch.randn(9, 5, dtype=torch.float64)
    u[:, (1, 4)] = 0
    seen = oracle.value_and_gradients(
        lambda u: peftkern.orthogonality_penalty(u, squared=squared), (u,), torch.ones(())
    )
    truth = oracle.value_and_gradients(lambda u: oracle.penalty(u, squared), (u[:, (0, 2, 3)],), torch.ones(()))
    assert oracle.error(seen[0], truth[0]) < 1e-13
    assert oracle.error(seen[1][:, (0, 2, 3)], truth[1]) < 1e-12 and not seen[1][:, (1, 4)].any()


def test_equal_pairs_cost_two_each(backend):
    """PEFT's initial value with orthogonal halves: two off-diagonal cosines of 1 for each pair."""
    u = torch.eye(12, 3).repeat_interleave(2, 1)
    assert peftkern.orthogonality_penalty(u) == 6
    assert peftkern.orthogonality_penalty(u, weight=0.5) == 3


def test_the_gradient_is_orthogonal_to_every_column_and_scales_inversely(backend):
    u = torch.randn(30, 6, dtype=torch.float64)
    du = oracle.value_and_gradients(peftkern.orthogonality_penalty, (u,), torch.ones(()))[1]
    assert (u * du).sum(0).abs().max() < 1e-13 * du.norm()
    du2 = oracle.value_and_gradients(peftkern.orthogonality_penalty, (u * 1e3,), torch.ones(()))[1]
    assert oracle.error(du2 * 1e3, du) < 1e-12


@pytest.mark.big
def test_descending_it_makes_the_columns_orthogonal(backend):
    u = torch.randn(16, 5, dtype=torch.float64, requires_grad=True)
    for _ in range(300):
        (du,) = torch.autograd.grad(peftkern.orthogonality_penalty(u), u)
        u.data -= 0.5 * du
    assert peftkern.orthogonality_penalty(u) < 1e-12
