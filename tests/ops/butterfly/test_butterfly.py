"""Butterflies against explicit permutation matrices: values, gradients, shapes, strides, dropout, the output scale."""

import oracle
import oracle_blocks
import pytest
import torch

from peftkern.ops import butterfly as bf

SIZES = [  # K, b, f: every f that 32 columns allow, odd blocks, blocks beyond a vector, groups beyond one
    (32, 4, 1), (32, 4, 2), (32, 4, 3), (32, 4, 4), (21, 7, 1), (16, 2, 4), (24, 6, 2), (48, 8, 2), (64, 16, 3),
    (64, 32, 2), (20, 10, 2), (128, 8, 5), (256, 64, 3), (36, 2, 2), (40, 4, 2),
]  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def parameter(f, n, b, size=0.4, dtype=torch.float64):
    return (size * torch.randn(f, n, b, b, dtype=torch.float64)).to(dtype)


def orthogonal(f, n, b, dtype=torch.float32):
    return oracle_blocks.cayley(oracle_blocks.skew_part(parameter(f, n, b))).to(dtype)


def dense_rotate(x, R, transpose=False):
    D = oracle_blocks.butterfly(R)
    return (x.double().reshape(-1, x.shape[-1]) @ (D.T if transpose else D)).reshape(x.shape)


def run(x, R, dz, transpose=False):
    return oracle.value_and_gradients(lambda x, R: bf.butterfly_rotate(x, R, transpose), (x, R), dz)


@pytest.mark.parametrize("f, n, b", ((1, 3, 2), (2, 4, 6), (1, 2, 17), (3, 4, 32)))
def test_blocks_and_their_gradients_equal_the_oracle(backend, f, n, b):
    B, dR = parameter(f, n, b), torch.randn(f, n, b, b, dtype=torch.float64)

    def truth(B):
        return oracle_blocks.cayley(oracle_blocks.skew_part(B))

    for ours, exact in zip(
        *(oracle.value_and_gradients(g, (B,), dR) for g in (bf.butterfly_blocks, truth)), strict=True
    ):
        assert oracle.error(ours, exact) < 1e-12
    narrow = oracle.value_and_gradients(bf.butterfly_blocks, (B.float(),), dR)
    plain = oracle.value_and_gradients(oracle_blocks.peft_cayley, (B.float(),), dR)
    oracle.assert_as_good_as(
        ("R", "dB"), narrow, plain, oracle.value_and_gradients(truth, (B.float().double(),), dR), b
    )


@pytest.mark.parametrize("transpose", (False, True))
@pytest.mark.parametrize("K, b, f", SIZES)
def test_values_and_gradients_equal_the_oracle(backend, K, b, f, transpose):
    x, dz = torch.randn(2, 7, 5, K, dtype=torch.float64)
    R = torch.randn(f, K // b, b, b, dtype=torch.float64) / b**0.5
    truth = oracle.value_and_gradients(lambda x, R: dense_rotate(x, R, transpose), (x, R), dz)
    for ours, exact in zip(run(x, R, dz, transpose), truth, strict=True):
        assert ours.shape == exact.shape and oracle.error(ours, exact) < 1e-13


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K, b, f", ((48, 8, 2), (64, 4, 3), (96, 2, 1), (64, 16, 2), (60, 10, 1), (128, 32, 3)))
def test_the_rotation_is_as_accurate_as_plain_torch(backend, K, b, f, dtype):
    x, dz, R = torch.randn(67, K).to(dtype), torch.randn(67, K).to(dtype), orthogonal(f, K // b, b)
    truth = oracle.value_and_gradients(dense_rotate, (x.double(), R.double()), dz)
    plain = oracle.value_and_gradients(oracle_blocks.peft_butterfly, (x, R), dz)
    seen = run(x, R, dz)
    assert [t.dtype for t in seen] == [dtype, dtype, torch.float32]
    oracle.assert_as_good_as(("z", "dx", "dR"), seen, plain, truth, 67)


@pytest.mark.parametrize("K, b, f", ((64, 4, 5), (48, 8, 2), (21, 7, 1)))
def test_the_transposed_rotation_is_the_inverse(backend, K, b, f):
    x, R = torch.randn(9, K), bf.butterfly_blocks(parameter(f, K // b, b, dtype=torch.float32))
    assert oracle.error(bf.butterfly_rotate(bf.butterfly_rotate(x, R), R, True), x) < 2e-6
    dense = bf.butterfly_rotate(torch.eye(K), R)
    assert oracle.orthogonality_error(dense) < 2e-6
    W = torch.randn(5, K)
    merged = bf.butterfly_rotate(W, R, True)
    assert oracle.error(x @ merged.T, bf.butterfly_rotate(x, R) @ W.T) < 2e-6


@pytest.mark.parametrize("shape", ((0, 32), (3, 0, 32), (32,), (1, 32)))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_no_token_and_one_token(backend, shape, dtype):
    x, R = torch.randn(shape).to(dtype), orthogonal(3, 8, 4)
    z, dx, dR = run(x, R, torch.ones(shape))
    assert z.shape == dx.shape == x.shape and dR.shape == R.shape
    assert dR.isfinite().all() and dR.any() == (x.numel() > 0)
    assert oracle.error(z, dense_rotate(x, R)) < (1e-6 if dtype is torch.float32 else 1e-2)


def layouts(x):
    M, K = x.shape
    wide = torch.full((M, K + 9), float("nan"), dtype=x.dtype)
    wide[:, 4 : 4 + K] = x
    yield wide[:, 4 : 4 + K]
    yield x.T.contiguous().T
    yield x.repeat_interleave(2, 0)[::2]


@pytest.mark.parametrize("K, b, f", ((32, 4, 3), (48, 12, 2), (64, 2, 1)))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_strides_change_no_bit(backend, dtype, K, b, f):
    x, dz, R = torch.randn(33, K).to(dtype), torch.randn(33, K).to(dtype), orthogonal(f, K // b, b)
    plain = run(x, R, dz)
    for x_form, dz_form in zip(layouts(x), layouts(dz), strict=True):
        form = R.mT.contiguous().mT
        seen = (
            bf.butterfly_rotate(x_form, form),
            *torch.ops.peftkern.butterfly_rotate_backward(dz_form, x_form, form, False, [True, True]),
        )
        assert all(a.is_contiguous() and torch.equal(a, b) for a, b in zip(seen, plain, strict=True))


@pytest.mark.parametrize("K, b, f", ((160, 4, 3), (160, 20, 2)))
def test_two_runs_are_bitwise_equal(backend, K, b, f):
    x, dz = torch.randn(2, 301, K).bfloat16()
    B = parameter(f, K // b, b, dtype=torch.float32)

    def step(x, B):
        return bf.butterfly_rotate(x, bf.butterfly_blocks(B))

    for first, second in zip(*(oracle.value_and_gradients(step, (x, B), dz) for _ in range(2)), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("bad", (torch.nan, torch.inf))
def test_a_non_finite_number_spoils_its_row_and_no_other(backend, bad):
    x, R = torch.randn(9, 32), orthogonal(3, 8, 4)
    clean = bf.butterfly_rotate(x, R)
    x[4, 7] = bad
    z = bf.butterfly_rotate(x, R)
    assert not z[4].isfinite().all() and torch.equal(z[:4], clean[:4]) and torch.equal(z[5:], clean[5:])


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("dtype", (torch.float64, *DTYPES))
@pytest.mark.parametrize("M, N", ((33, 70), (0, 5), (1, 300)))
def test_the_output_scale_acts_on_what_the_bias_was_added_to(backend, M, N, dtype, bias):
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    y, dy = torch.randn(M, N).to(dtype), torch.randn(M, N).to(dtype)
    s, b = (1 + 0.1 * torch.randn(N, 1)).to(wide), torch.randn(N).to(dtype) if bias else None
    inputs = (y, s, b) if bias else (y, s)

    def exact(y, s, b=None):
        b = 0 if b is None else b
        return (y - b) * s.reshape(-1) + b

    truth = oracle.value_and_gradients(exact, [t.double() for t in inputs], dy)
    plain = oracle.value_and_gradients(lambda y, s, b=None: oracle_blocks.peft_scale(y, s, b), inputs, dy)
    seen = oracle.value_and_gradients(bf.scale_outputs, inputs, dy)
    assert [t.shape for t in seen[1:]] == [t.shape for t in inputs]
    names = ("y", "dy", "ds", "db")[: len(seen)]
    if dtype is torch.float64:
        assert all(oracle.error(ours, exact) < 1e-13 for ours, exact in zip(seen, truth, strict=True))
    else:
        oracle.assert_as_good_as(names, seen, plain, truth, max(M, 1))
    strided = torch.full((M, N + 3), float("nan"), dtype=dtype)
    strided[:, 1 : N + 1] = y
    assert torch.equal(bf.scale_outputs(strided[:, 1 : N + 1], s, b), seen[0])


def test_dropout_replaces_whole_blocks_of_one_stage(backend):
    R = orthogonal(3, 8, 4).requires_grad_()
    torch.manual_seed(3)
    dropped = bf.drop_blocks(R, 0.4)
    eye = torch.eye(4)
    changed = (dropped != R).flatten(2).any(2)
    assert changed.sum() == 3 and changed.any(1).sum() == 1
    assert torch.equal(dropped[changed], eye.expand(3, 4, 4))
    (gradient,) = torch.autograd.grad(dropped.sum(), R)
    assert torch.equal(gradient, (~changed)[..., None, None].expand(3, 8, 4, 4).float())
    assert torch.equal(bf.drop_blocks(R, 0.01), R)


def test_dropout_draws_what_peft_draws(backend):
    layer = pytest.importorskip("peft.tuners.boft.layer", reason="PEFT is not installed")
    R = orthogonal(3, 8, 4)
    dropout = layer.MultiplicativeDropoutLayer(0.5).train()
    for seed in range(5):
        torch.manual_seed(seed)
        theirs, state = dropout(R), torch.get_rng_state()
        torch.manual_seed(seed)
        assert torch.equal(bf.drop_blocks(R, 0.5), theirs) and torch.equal(torch.get_rng_state(), state)


def test_one_sentence_for_arguments_that_do_not_fit():
    with pytest.raises(ValueError, match="must be even for 2 stages"):
        bf.butterfly_blocks(torch.zeros(2, 4, 3, 3))
    with pytest.raises(ValueError, match=r"K must be a multiple of b 2\^\(f-1\) = 16 for 3 stages of blocks of 4"):
        bf.butterfly_blocks(torch.zeros(3, 6, 4, 4))
    with pytest.raises(ValueError, match=r"boft_R must have shape \[f, K/b, b, b\]"):
        bf.butterfly_blocks(torch.zeros(6, 4, 4))
    with pytest.raises(ValueError, match="x must have K = 16 columns"):
        bf.butterfly_rotate(torch.zeros(2, 12), torch.zeros(1, 4, 4, 4))
    with pytest.raises(ValueError, match="at least one stage"):
        bf.check_sizes("BOFT", 16, 4, 0)
    with pytest.raises(ValueError, match="boft_s must have 5 numbers"):
        bf.boft_linear(torch.zeros(2, 16), torch.zeros(5, 16), None, torch.zeros(1, 4, 4, 4), torch.ones(4, 1))
    with pytest.raises(ValueError, match="on one device"):
        bf.butterfly_rotate(torch.zeros(2, 16), torch.zeros(1, 4, 4, 4, device="meta"))
