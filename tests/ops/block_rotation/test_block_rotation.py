"""Block rotations against dense matrices: blocks from packed numbers, values, gradients, shapes, strides, options."""

import oracle
import oracle_blocks
import pytest
import torch

from peftkern.ops import block_rotation as br

SIZES = (2, 3, 5, 8, 16, 17, 32, 33)
DTYPES = [  # of x, of R
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
]
IDS = [f"{a}-{b}".replace("torch.", "") for a, b in DTYPES]


def packed(S, b, size=0.1, dtype=torch.float64):
    return (size * torch.randn(S, b * (b - 1) // 2, dtype=torch.float64)).to(dtype)


def orthogonal(S, b, dtype=torch.float32):
    return oracle_blocks.cayley(oracle_blocks.skew_by_index(packed(S, b, 0.5), b)).to(dtype)


def test_the_coefficients_are_those_of_pefts_loops():
    for terms, numbers in oracle_blocks.SERIES.items():
        assert br.coefficients(terms) == numbers
    for terms, numbers in oracle_blocks.OLD_SERIES.items():
        assert br.coefficients(terms, legacy=True) == numbers
    assert br.coefficients(0) == br.coefficients(1) == (1.0,)


def test_packed_numbers_are_the_upper_triangle_row_by_row():
    q = packed(3, 6)
    assert torch.equal(oracle_blocks.skew_by_index(q, 6), oracle_blocks.skew(q, 6))
    assert torch.equal(br.reference.unpack(q), oracle_blocks.skew(q, 6))
    assert torch.equal(br.pack_skew(oracle_blocks.skew(q, 6)), q)


@pytest.mark.parametrize("terms", (None, 1, 2, 3, 4, 5, 6, 7))
@pytest.mark.parametrize("b", SIZES)
def test_blocks_and_their_gradients_equal_the_oracle(backend, b, terms):
    q, dR = packed(3, b), torch.randn(3, b, b, dtype=torch.float64)
    R, dq = oracle.value_and_gradients(lambda q: br.rotation_blocks(q, terms), (q,), dR)
    leaf = q.clone().requires_grad_()
    truth = oracle_blocks.blocks(leaf, b, terms)
    exact = torch.autograd.grad(truth, leaf, dR)[0] if truth.requires_grad else torch.zeros_like(q)
    assert oracle.error(R, truth.detach()) < 1e-13 and oracle.error(dq, exact) < 1e-12
    assert R.dtype is torch.float64 and dq.shape == q.shape


@pytest.mark.parametrize("size", (0.01, 0.3))
@pytest.mark.parametrize("terms", (None, 3, 5, 6))
@pytest.mark.parametrize("b", (2, 7, 32, 64))
def test_blocks_are_as_accurate_as_plain_torch(backend, b, terms, size):
    q, dR = packed(4, b, size / b**0.5, torch.float32), torch.randn(4, b, b)
    truth = oracle.value_and_gradients(lambda q: oracle_blocks.blocks(q, b, terms), (q.double(),), dR)
    plain = oracle.value_and_gradients(lambda q: oracle_blocks.peft_blocks(q, b, terms), (q,), dR)
    seen = oracle.value_and_gradients(lambda q: br.rotation_blocks(q, terms), (q,), dR)
    oracle.assert_as_good_as(("R", "dq"), seen, plain, truth, b)


def test_the_old_polynomial_is_another_one(backend):
    q = packed(2, 8, 0.2)
    Q = oracle_blocks.skew_by_index(q, 8)
    assert oracle.error(br.rotation_blocks(q, 5, legacy=True), oracle_blocks.series(Q, (1, 2, 2, 2, 2))) < 1e-13
    assert oracle.error(br.rotation_blocks(q, 5), br.rotation_blocks(q, 5, legacy=True)) > 1e-3


def test_the_exact_map_is_the_transpose_of_what_the_polynomial_approximates(backend):
    q = packed(3, 6, 0.02)
    exact = br.rotation_blocks(q, None)
    assert oracle.error(br.rotation_blocks(q, 12), exact.mT) < 1e-10
    assert oracle.error(br.rotation_blocks(q, 12), exact) > 0.05


@pytest.mark.parametrize("size", (1e-3, 1.0, 30.0))
@pytest.mark.parametrize("b", (2, 9, 64))
def test_the_exact_map_is_orthogonal_however_large_the_angles(backend, b, size):
    assert br.orthogonality_error(br.rotation_blocks(packed(4, b, size, torch.float32), None)) < 1e-6


@pytest.mark.parametrize("theta", (0.1, 0.3, 0.5, 0.8, 1.0, 1.5))
@pytest.mark.parametrize("terms", (3, 4, 5, 6, 7))
def test_the_orthogonality_error_is_that_of_the_number_of_factors(backend, terms, theta):
    """R = C (I - Q^p): p even multiplies by 1 - theta^p, p odd by sqrt(1 + theta^(2 p)) (README.md, eq. 4)."""
    q = torch.tensor([[theta]], dtype=torch.float64)
    p = max(terms - 1, 3)
    wanted = abs((1 - (-1) ** (p // 2) * theta**p) ** 2 - 1) if p % 2 == 0 else theta ** (2 * p)
    assert br.orthogonality_error(br.rotation_blocks(q, terms)).item() == pytest.approx(wanted, rel=1e-9)
    assert br.skew_norm(q).item() == pytest.approx(theta)


@pytest.mark.parametrize("eps", (1e-3, 0.4, 10.0))
def test_the_constraint_shortens_blocks_in_place_and_nothing_else(eps):
    q = packed(5, 4, 0.2)
    before, radius = q.clone(), eps / 5**0.5
    assert br.constrain_(q, eps) is q
    norms = oracle_blocks.skew(q, 4).flatten(1).norm(dim=1)
    assert (norms <= radius * (1 + 1e-12)).all()
    for row, old in zip(q, before, strict=True):
        inside = oracle_blocks.skew(old[None], 4).norm() <= radius
        assert torch.equal(row, old) if inside else oracle.error(row / row.norm(), old / old.norm()) < 1e-14


def test_a_second_constrained_forward_does_not_spoil_the_first(backend):
    q = torch.nn.Parameter(packed(3, 4))
    x = torch.randn(5, 12, dtype=torch.float64)
    losses = [br.rotate_blocks(x, br.rotation_blocks(br.constrain_(q, 0.1).clone())).sum() for _ in range(2)]
    sum(losses).backward()
    assert q.grad.isfinite().all() and q.grad.any()


def run(x, R, dz, transpose=False):
    return oracle.value_and_gradients(lambda x, R: br.rotate_blocks(x, R, transpose), (x, R), dz)


@pytest.mark.parametrize("transpose", (False, True))
@pytest.mark.parametrize("shared", (False, True))
@pytest.mark.parametrize(
    "shape, b",
    (((3, 5, 24), 8), ((33, 15), 3), ((70, 34), 17), ((4, 2, 3, 64), 32), ((12,), 4), ((1, 66), 33), ((0, 20), 5)),
)
def test_values_and_gradients_equal_the_oracle(backend, shape, b, shared, transpose):
    x, dz = torch.randn(2, *shape, dtype=torch.float64)
    R = torch.randn(1 if shared else shape[-1] // b, b, b, dtype=torch.float64)
    truth = oracle.value_and_gradients(lambda x, R: oracle_blocks.rotate(x, R, transpose), (x, R), dz)
    for ours, exact in zip(run(x, R, dz, transpose), truth, strict=True):
        assert ours.shape == exact.shape and oracle.error(ours, exact) < 1e-13


@pytest.mark.parametrize("dtype, R_dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("M, K, b", ((33, 64, 2), (61, 66, 3), (40, 128, 8), (65, 96, 16), (33, 96, 32), (70, 120, 40)))
def test_the_rotation_is_as_accurate_as_plain_torch(backend, M, K, b, dtype, R_dtype):
    x, dz, R = torch.randn(M, K).to(dtype), torch.randn(M, K).to(dtype), orthogonal(K // b, b, R_dtype)
    truth = oracle.value_and_gradients(oracle_blocks.rotate, (x.double(), R.double()), dz)
    plain = oracle.value_and_gradients(oracle_blocks.peft_rotate, (x, R.float()), dz)
    seen = run(x, R, dz)
    assert [t.dtype for t in seen] == [dtype, dtype, R_dtype]
    if R_dtype is torch.float32:
        oracle.assert_as_good_as(("z", "dx", "dR"), seen, plain, truth, max(M, b))
    else:
        oracle.assert_as_good_as(("z", "dx"), seen[:2], plain[:2], truth[:2], max(M, b))
        assert oracle.error(seen[2], truth[2]) < 3e-3  # one rounding to bfloat16


def test_transposed_blocks_undo_exact_rotations(backend):
    x, R = torch.randn(20, 48), orthogonal(6, 8)
    assert oracle.error(br.rotate_blocks(br.rotate_blocks(x, R), R, True), x) < 1e-6


@pytest.mark.parametrize("terms", (None, 4, 5, 6))
@pytest.mark.parametrize("S", (1, 5))
def test_the_inverse_takes_a_merged_weight_back(backend, S, terms):
    W, R = torch.randn(7, 40), br.rotation_blocks(packed(S, 8, 0.15, torch.float32), terms)
    merged = br.rotate_blocks(W, R, transpose=True)
    x = torch.randn(3, 40)
    assert oracle.error(x @ merged.T, br.rotate_blocks(x, R) @ W.T) < 1e-6
    assert oracle.error(br.rotate_blocks(merged, br.inverse_blocks(R), transpose=True), W) < 1e-6


def layouts(x):
    M, K = x.shape
    wide = torch.full((M, K + 9), float("nan"), dtype=x.dtype)
    wide[:, 4 : 4 + K] = x
    yield wide[:, 4 : 4 + K]
    yield x.T.contiguous().T
    yield x.repeat_interleave(2, 0)[::2]
    yield torch.cat((x.new_zeros(1), x.flatten()))[1:].view(M, K)


@pytest.mark.parametrize("b", (3, 8, 24))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_strides_change_no_bit(backend, dtype, b):
    x, dz, R = torch.randn(33, 48).to(dtype), torch.randn(33, 48).to(dtype), torch.randn(48 // b, b, b)
    plain = run(x, R, dz)
    for x_form, dz_form in zip(layouts(x), layouts(dz), strict=True):
        dx, dR = torch.ops.peftkern.block_rotate_backward(dz_form, x_form, R.mT.contiguous().mT, False, [True, True])
        z = br.rotate_blocks(x_form, torch.stack((R, R), 3)[..., 1])
        for seen, wanted in zip((z, dx, dR), plain, strict=True):
            assert seen.is_contiguous() and torch.equal(seen, wanted)


@pytest.mark.parametrize("b", (2, 5, 32))
def test_two_runs_are_bitwise_equal(backend, b):
    K = 160
    x, dz = torch.randn(2, 101, K).bfloat16()
    q = packed(K // b, b, 0.1, torch.float32)

    def step(x, q):
        return br.rotate_blocks(x, br.rotation_blocks(q))

    for first, second in zip(*(oracle.value_and_gradients(step, (x, q), dz) for _ in range(2)), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("bad", (torch.nan, torch.inf))
@pytest.mark.parametrize("b", (3, 8))
def test_a_non_finite_number_spoils_its_block_of_its_row_and_nothing_else(backend, b, bad):
    x, R = torch.randn(9, 24), orthogonal(24 // b, b)
    clean = br.rotate_blocks(x, R)
    x[4, 7] = bad
    z = br.rotate_blocks(x, R)
    block = slice(7 // b * b, 7 // b * b + b)
    assert not z[4, block].isfinite().any()
    z[4, block] = clean[4, block]
    assert torch.equal(z, clean)


def test_one_sentence_for_arguments_that_do_not_fit():
    x, R = torch.randn(3, 12), torch.randn(3, 4, 4)
    with pytest.raises(ValueError, match="x must have 12 columns, 3 blocks of 4; got float32 of shape"):
        br.rotate_blocks(torch.randn(3, 16), R)
    with pytest.raises(ValueError, match="x must have a multiple of 4 columns"):
        br.rotate_blocks(torch.randn(3, 14), R[:1])
    with pytest.raises(ValueError, match=r"R must have shape \[blocks, b, b\]"):
        br.rotate_blocks(x, torch.randn(3, 4, 5))
    with pytest.raises(TypeError, match="x must be one of"):
        br.rotate_blocks(torch.ones(3, 12, dtype=torch.int64), R)
    with pytest.raises(ValueError, match="whole blocks"):
        br.rotation_blocks(torch.randn(2, 7))
    with pytest.raises(ValueError, match="largest entry of Q"):
        br.pack_skew(torch.randn(2, 3, 3))
    with pytest.raises(ValueError, match="on one device"):
        br.rotate_blocks(x, R.to("meta"))
    with pytest.raises(ValueError, match="precision must be one of"):
        br.oft_linear(x, torch.randn(5, 12), None, packed(3, 4, dtype=torch.float32), precision="best")
    with pytest.raises(ValueError, match=r"weight must be \[N, K = 12\]"):
        br.oft_linear(x, torch.randn(5, 11), None, packed(3, 4, dtype=torch.float32))
