"""The exact low-rank form W H = W + B A: exactness, gradients, rounding of A and B, Gram-Schmidt."""

import oracle
import pytest
import torch

import peftkern


@pytest.mark.parametrize("N, K, r", ((7, 13, 1), (30, 31, 3), (64, 48, 8), (5, 64, 33), (0, 6, 2), (3, 4, 6)))
def test_it_is_exact(backend, N, K, r):
    weight, u = torch.randn(N, K, dtype=torch.float64), torch.randn(K, r, dtype=torch.float64)
    A, B = peftkern.low_rank_form(weight, u)
    assert A.shape == (r, K) and B.shape == (N, r)
    assert oracle.error(weight + B @ A, weight @ oracle.chain(u)) < 1e-13


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("u_dtype", (torch.float64, torch.float32, torch.bfloat16))
def test_factors_are_float32_unless_an_argument_is_float64(backend, dtype, u_dtype):
    weight, u = torch.randn(20, 33).to(dtype), torch.randn(33, 5).to(u_dtype)
    A, B = peftkern.low_rank_form(weight, u)
    wanted = torch.float64 if torch.float64 in (dtype, u_dtype) else torch.float32
    assert A.dtype is wanted and B.dtype is wanted
    merged = weight.double() + B.double() @ A.double()
    assert oracle.error(merged, weight.double() @ oracle.chain(u)) < (1e-13 if wanted is torch.float64 else 1e-6)


@pytest.mark.parametrize("gap", (1e-5, 1e-3, 1e-1))
def test_a_small_update_survives_half_precision_factors(backend, gap):
    """The update of almost equal pairs: A and B may be rounded to bfloat16 and still hold it to bfloat16's accuracy."""
    weight, half = torch.randn(40, 64), torch.randn(64, 4)
    u = half.repeat_interleave(2, 1) + gap * torch.randn(64, 8)
    update = weight.double() @ (oracle.chain(u) - torch.eye(64))
    A, B = peftkern.low_rank_form(weight, u)
    rounded = B.bfloat16().double() @ A.bfloat16().double()
    assert oracle.error(rounded, update) < 1e-2
    assert oracle.error(B.double() @ A.double(), update) < 1e-5


def test_gradients_of_the_merged_weight_equal_the_oracle(backend):
    weight, u, incoming = (torch.randn(s, dtype=torch.float64) for s in ((9, 14), (14, 5), (9, 14)))

    def merged(weight, u):
        A, B = peftkern.low_rank_form(weight, u)
        return weight + B @ A

    truth = oracle.value_and_gradients(lambda W, u: W @ oracle.chain(u), (weight, u), incoming)
    seen = oracle.value_and_gradients(merged, (weight, u), incoming)
    for ours, exact in zip(seen, truth, strict=True):
        assert oracle.error(ours, exact) < 1e-12


@pytest.mark.parametrize("r", (1, 3))
def test_gram_schmidt_is_exact_and_each_factor_is_differentiable(r):
    weight, u = torch.randn(3, 6, dtype=torch.float64), torch.randn(6, r, dtype=torch.float64)
    A, B = peftkern.low_rank_form(weight, u, gram_schmidt=True)
    assert oracle.error(weight + B @ A, weight @ oracle.gram_schmidt_chain(u)) < 1e-13
    leaves = weight.requires_grad_(), u.requires_grad_()
    assert torch.autograd.gradcheck(lambda W, u: peftkern.low_rank_form(W, u, gram_schmidt=True), leaves)
    assert torch.autograd.gradgradcheck(lambda W, u: peftkern.low_rank_form(W, u, gram_schmidt=True), leaves)


@pytest.mark.parametrize("kappa", (1, 1e3, 1e5))
def test_gram_schmidt_in_float32_does_not_mind_nearly_dependent_columns(kappa):
    weight, u = torch.randn(20, 48), torch.randn(48, 1) + torch.randn(48, 4) / kappa
    A, B = peftkern.low_rank_form(weight, u, gram_schmidt=True)
    merged = weight.double() + B.double() @ A.double()
    assert oracle.error(merged, weight.double() @ oracle.gram_schmidt_chain(u)) < 2e-6


def test_it_describes_the_layer_it_came_from(backend):
    x, weight, u = (torch.randn(s, dtype=torch.float64) for s in ((6, 14), (9, 14), (14, 5)))
    A, B = peftkern.low_rank_form(weight, u)
    assert oracle.error(x @ weight.T + x @ A.T @ B.T, peftkern.hra_linear(x, weight, None, u)) < 1e-13
