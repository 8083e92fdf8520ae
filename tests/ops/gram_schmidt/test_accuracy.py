"""Errors against float64 beside those of PEFT's own Gram-Schmidt in the same dtypes, over condition numbers."""

import oracle
import pytest
import torch
from test_orthonormal_factor import conditioned

import peftkern
from peftkern.ops import householder

DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float16, torch.float32)]
SHAPES = [(61, 127, 97, 7), (40, 96, 130, 8), (33, 64, 40, 33), (70, 160, 64, 128)]  # M, K, N, r


def peft_linear(x, weight, u):
    """PEFT's HRALinear.forward with apply_GS: everything in the parameter's dtype, cast back at the end."""
    basis = []
    for column in u.unbind(1):
        for q in basis:
            column = column - (q @ column) * q
        basis.append(column / column.norm())
    Q = torch.stack(basis, 1)
    H = torch.eye(len(u), dtype=u.dtype) - 2 * Q @ Q.T
    return torch.nn.functional.linear(x.to(u.dtype), weight.to(u.dtype) @ H).to(x.dtype)


def exact_linear(x, weight, u):
    return x.double() @ (weight.double() @ oracle.gram_schmidt_chain(u)).T


def linear(x, weight, u, precision="auto"):
    V, T = householder.factor(u, gram_schmidt=True)
    if x.dtype in householder.HALF and precision == "auto":
        return householder.apply_factor_linear(x, weight, None, V, T)
    return torch.nn.functional.linear(householder.apply_factor(x, V, T), weight)


def problem(M, K, N, u, dtype):
    x, weight, dy = torch.randn(M, K), torch.randn(N, K) / K**0.5, torch.randn(M, N)
    return (x.to(dtype), weight.to(dtype), u), dy.to(dtype)


@pytest.mark.parametrize("dtype, u_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M, K, N, r", SHAPES)
def test_values_and_gradients_are_as_accurate_as_those_of_peft(backend, M, K, N, r, dtype, u_dtype):
    tensors, dy = problem(M, K, N, torch.randn(K, r).to(u_dtype), dtype)
    truth = oracle.value_and_gradients(exact_linear, [t.double() for t in tensors], dy)
    plain = oracle.value_and_gradients(peft_linear, tensors, dy)
    seen = oracle.value_and_gradients(linear, tensors, dy)
    oracle.assert_as_good_as(("y", "dx", "dweight", "du"), seen, plain, truth, max(M, K, N))


@pytest.mark.parametrize("kappa", (1e1, 1e2, 1e3, 1e4, 1e6))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_no_accuracy_is_lost_to_the_condition_of_the_columns(backend, dtype, kappa):
    """PEFT's errors grow with kappa, to 7e-2 of du at 1e6; here each stays what PEFT has for orthonormal columns."""
    M, K, N, r = 61, 128, 97, 7
    tensors, dy = problem(M, K, N, conditioned(K, r, kappa, torch.float32), dtype)
    truth = oracle.value_and_gradients(exact_linear, [t.double() for t in tensors], dy)
    seen = oracle.value_and_gradients(linear, tensors, dy)
    easy, dy = problem(M, K, N, conditioned(K, r, 1, torch.float32), dtype)
    easy_truth = oracle.value_and_gradients(exact_linear, [t.double() for t in easy], dy)
    for ours, exact, plain, easy_exact in zip(
        seen, truth, oracle.value_and_gradients(peft_linear, easy, dy), easy_truth, strict=True
    ):
        assert oracle.error(ours, exact) < 2 * oracle.error(plain, easy_exact)


def test_half_precision_columns_lose_nothing_but_their_own_rounding(backend):
    u = torch.randn(96, 8).bfloat16()
    tensors, dy = problem(40, 96, 50, u, torch.bfloat16)
    seen = oracle.value_and_gradients(linear, tensors, dy)
    wide = oracle.value_and_gradients(linear, (*tensors[:2], u.float()), dy)
    assert torch.equal(seen[0], wide[0]) and torch.equal(seen[3], wide[3].bfloat16())


def test_low_rank_form_of_orthonormalised_columns_is_the_same_map(backend):
    weight, u = torch.randn(30, 24), torch.randn(24, 5)
    A, B = householder.low_rank_form(weight, u, gram_schmidt=True)
    assert oracle.error(weight + B @ A, weight.double() @ oracle.gram_schmidt_chain(u)) < 1e-6
    with peftkern.use_backend("reference"):
        wanted = householder.low_rank_form(weight, u, gram_schmidt=True)
    assert oracle.error(A, wanted[0]) < 1e-6 and oracle.error(B, wanted[1]) < 1e-6
