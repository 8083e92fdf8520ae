"""The operations themselves: Q = V B with orthonormal columns, T = 2 I to rounding, and dependent columns."""

import re
from pathlib import Path

import oracle
import pytest
import torch

import peftkern
from peftkern.ops import gram_schmidt
from peftkern.ops.gram_schmidt import reference

ops = torch.ops.peftkern
DTYPES = pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
SHAPES = pytest.mark.parametrize("K, r", ((1, 1), (5, 3), (40, 8), (123, 17), (70, 32), (300, 45), (200, 128)))
EPS = {torch.float32: 1.2e-7, torch.float64: 2.3e-16}


def conditioned(K, r, kappa, dtype=torch.float64):
    """Columns whose singular values fall from 1 to 1 / kappa."""
    left = torch.linalg.qr(torch.randn(K, r, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(r, r, dtype=torch.float64))[0]
    return (left * kappa ** -torch.linspace(0, 1, r, dtype=torch.float64) @ right).to(dtype)


def spectral(A):
    return torch.linalg.matrix_norm(A, 2).item()


@DTYPES
@SHAPES
def test_the_columns_are_orthonormal_and_span_the_same_space(backend, K, r, dtype):
    V = torch.randn(K, r, dtype=dtype) * torch.rand(r, dtype=dtype) * 10
    Q, T, B = ops.orthonormal_factor(V)
    eye = torch.eye(r, dtype=torch.float64)
    assert spectral(Q.double().T @ Q.double() - eye) < (8 if dtype is torch.float32 else r + 8) * EPS[dtype]
    assert spectral(T - 2 * eye) < (8 if dtype is torch.float32 else r + 8) * EPS[dtype]
    assert torch.equal(B, B.triu()) and oracle.error(T, T.T) < 1e-15
    assert oracle.error(Q, V.double() @ B) < EPS[dtype] + 1e-15
    assert oracle.error(Q, oracle.orthonormal_basis(V)) < 1e-6 if dtype is torch.float32 else 1e-11


@SHAPES
def test_the_gradient_is_that_of_the_formula(backend, K, r):
    V, dQ = torch.randn(2, K, r, dtype=torch.float64)
    dT = torch.randn(r, r, dtype=torch.float64)
    B = torch.linalg.inv(torch.linalg.qr(V)[1])
    Q = V @ B
    truth = (dQ - 2 * Q @ (dT + dT.T)) @ B.T
    assert oracle.error(ops.orthonormal_factor_backward(dQ, dT, Q, B), truth) < 1e-12
    seen = ops.orthonormal_factor_backward(dQ.float(), dT, Q.float(), B)
    assert seen.dtype is torch.float32 and oracle.error(seen, truth) < 1e-6


@DTYPES
@pytest.mark.parametrize(
    "columns, kept",
    (
        ((0, 0, 1, 1, 2, 2), (0, 2, 4)),
        ((-1, 0, -1, 1), (1, 3)),
        ((-1, -1, -1), ()),
        ((0, 1, 0, 2, 1, 0, 3, -1, 3), (0, 1, 3, 6)),
        ((0,) * 20, (0,)),
    ),
)
def test_dependent_and_zero_columns_are_zero_everywhere(backend, columns, kept, dtype):
    """columns: which of several random vectors each column is, -1 for none; kept: those that Gram-Schmidt keeps."""
    vectors = torch.cat((torch.randn(30, 4, dtype=dtype), torch.zeros(30, 1, dtype=dtype)), 1)
    V, r = vectors[:, list(columns)], len(columns)
    dropped = [j for j in range(r) if j not in kept]
    Q, T, B = ops.orthonormal_factor(V)
    assert not Q[:, dropped].any() and not B[:, dropped].any() and not B[dropped].any()
    assert not T[:, dropped].any() and not T[dropped].any()
    alone = ops.orthonormal_factor(V[:, list(kept)].contiguous()) if kept else ()
    for whole, part in zip((Q, T, B), alone, strict=False):
        part_of_whole = whole[:, list(kept)] if whole is Q else whole[list(kept)][:, list(kept)]
        assert oracle.error(part_of_whole, part) < 1e-7
    dV = ops.orthonormal_factor_backward(torch.randn_like(Q), torch.randn_like(T), Q, B)
    assert not dV[:, dropped].any() and dV[:, list(kept)].all()


@pytest.mark.parametrize("gap, both", ((0.0, False), (1e-9, False), (1e-6, True), (1e-3, True)))
def test_the_threshold_is_an_angle_of_the_root_of_the_rounding(backend, gap, both):
    """8 K eps = 9e-14 is the squared sine of 3e-7: nearer than that the later column is dropped."""
    K = 50
    first, move = torch.linalg.qr(torch.randn(K, 2, dtype=torch.float64))[0].T
    Q, T, _ = ops.orthonormal_factor(torch.stack((first, first + gap * move), 1))
    assert Q[:, 1].any() == both and (T[1, 1] != 0) == both
    if both:
        # Of a sine of 1e-6 the first Gram matrix knows a part in 1e4; the second mends it.
        H = torch.eye(K, dtype=torch.float64) - Q @ T @ Q.T
        assert oracle.orthogonality_error(H) < 1e-12 and oracle.error(H @ move, -move) < 1e-9


@DTYPES
@pytest.mark.parametrize("kappa", (1.0, 1e1, 3e1, 1e2, 3e2, 1e3, 1e4, 1e6))
def test_orthonormality_does_not_depend_on_the_condition(backend, kappa, dtype):
    """On both sides of the guard that says whether once is enough."""
    V = conditioned(90, 12, kappa, dtype)
    Q, _, B = ops.orthonormal_factor(V)
    orthonormal = spectral(Q.double().T @ Q.double() - torch.eye(12, dtype=torch.float64))
    # The reference leaves the rest to T.
    limit = (8 if dtype is torch.float32 else 20) * EPS[dtype] + (backend == "reference") * 2e-16 * kappa**2
    assert orthonormal < limit
    assert oracle.error(Q, V.double() @ B) < EPS[dtype] + 1e-15 * kappa + (backend != "reference") * 4e-8


@DTYPES
@pytest.mark.parametrize("scale", (1e-18, 1e18))
def test_the_length_of_a_column_does_not_matter(backend, scale, dtype):
    V = torch.randn(37, 5, dtype=dtype)
    lengths = torch.tensor([1, scale, 1, 1 / scale, scale], dtype=dtype)
    (Q, T, B), (Q0, T0, B0) = ops.orthonormal_factor(V * lengths), ops.orthonormal_factor(V)
    assert oracle.error(Q, Q0) < 4 * EPS[dtype] and oracle.error(T, T0) < 1e-7
    assert oracle.error(B * lengths.double()[:, None], B0) < 4 * EPS[dtype]


@DTYPES
def test_any_strides(backend, dtype):
    V = torch.randn(9, 31, dtype=dtype)[::2].T
    for seen, wanted in zip(ops.orthonormal_factor(V), ops.orthonormal_factor(V.contiguous()), strict=True):
        assert torch.equal(seen, wanted)
    Q, _, B = ops.orthonormal_factor(V)
    dQ, dT = torch.randn(9, 31, dtype=dtype)[::2].T, torch.randn(5, 5, dtype=torch.float64).T
    seen = ops.orthonormal_factor_backward(dQ, dT, Q.T.contiguous().T, B.T.contiguous().T)
    assert torch.equal(seen, ops.orthonormal_factor_backward(dQ.contiguous(), dT.contiguous(), Q, B))


@pytest.mark.parametrize("position", ((4, 1), (0, 0), (19, 2)))
@pytest.mark.parametrize("value", (torch.nan, torch.inf))
def test_what_is_no_number_shows_in_every_later_column(backend, position, value):
    V = torch.randn(20, 3)
    V[position] = value
    Q = ops.orthonormal_factor(V)[0]
    assert not Q[:, position[1] :].isfinite().any()


def test_two_calls_and_any_number_of_threads_give_the_same_bits(backend):
    V, dQ = torch.randn(2, 500, 24)
    dT = torch.randn(24, 24, dtype=torch.float64)

    def run():
        Q, T, B = ops.orthonormal_factor(V)
        return Q, T, B, ops.orthonormal_factor_backward(dQ, dT, Q, B)

    first, threads = run(), torch.get_num_threads()
    try:
        for count in (threads, 3) if backend == "cpu" else (threads,):
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
    finally:
        torch.set_num_threads(threads)


# Columns of the table in the README; what it says there is held to this.
KAPPAS = (1, 1e1, 1e2, 1e3, 1e4, 1e6)


def table(name):
    """The numbers of the README's row that starts with `| name |`."""
    text = (Path(gram_schmidt.__file__).parent / "README.md").read_text()
    row = re.search(rf"^\| {re.escape(name)} \|(.*)\|$", text, re.M)[1]
    return [float(cell) for cell in row.split("|")]


@pytest.mark.parametrize("kappa", KAPPAS)
def test_the_errors_over_condition_numbers_are_those_of_the_readme(kappa):
    """Spectral orthogonality error in float32 on the reference, within a factor of two, which other processors need."""
    u = conditioned(64, 8, kappa, torch.float32)
    Q, T_of_Q, _ = reference.orthonormal_factor(u)
    eye = torch.eye(64)
    with peftkern.use_backend("reference"):
        for name, V, T in (("$V$", u, reference.projector_factor(u)), (r"$Q$", Q, T_of_Q)):
            seen = oracle.orthogonality_error(ops.rotate(eye, V, T, False)[0])
            written = table(name)[KAPPAS.index(kappa)]
            assert written / 2 < seen < 2 * written, f"{name}, kappa {kappa:.0e}: {seen:.1e}"
