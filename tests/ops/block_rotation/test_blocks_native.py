"""The native kernels of blocks against the formulas in float64: every instruction set here, sizes at every boundary."""

import functools

import oracle
import oracle_blocks
import pytest
import torch

from peftkern import _native
from peftkern.ops.block_rotation import cpu_backend as cpu
from peftkern.ops.butterfly import cpu_backend as butterfly

library, best_level, reason = _native.cpu()
if library is None or cpu._library is None:
    pytest.skip(f"no native CPU library: {reason or cpu._reason}", allow_module_level=True)

LEVELS = library.level_names()[: best_level + 1]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# One rounding of a result, and of float32 sums.
FLOOR = {torch.float64: 1e-14, torch.float32: 4e-7, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture(params=LEVELS)
def level(request, monkeypatch):
    for backend in (cpu, butterfly):
        monkeypatch.setattr(backend, "_level", LEVELS.index(request.param))
    return request.param


def working(dtype):
    return torch.float64 if dtype is torch.float64 else torch.float32


def stages(f, n, b, dtype):
    B = 0.3 * torch.randn(f, n, b, b, dtype=torch.float64)
    return oracle_blocks.cayley(oracle_blocks.skew_part(B)).to(working(dtype))


def expected(x, dz, R, transpose):
    leaf = R.double().requires_grad_()
    D = oracle_blocks.butterfly(leaf) if R.dim() == 4 else oracle_blocks.dense(leaf, x.shape[1])
    z = x.double() @ (D.T if transpose else D)
    (dR,) = torch.autograd.grad(z, leaf, dz.double())
    return z.detach(), (dz.double() @ (D if transpose else D.T)).detach(), dR


# M, f, n, b: widths that are no multiple of a vector, sizes around a vector, groups beyond one, rows beyond a tile.
SHAPES = (
    (0, 1, 3, 4), (1, 1, 5, 3), (33, 1, 9, 2), (31, 1, 32, 2), (65, 1, 3, 8), (40, 1, 32, 8), (33, 1, 7, 16),
    (5, 1, 4, 17), (33, 1, 9, 32), (17, 1, 3, 33), (34, 1, 3, 100), (9, 1, 2, 256), (33, 2, 2, 4),
    (33, 3, 64, 2), (70, 4, 16, 4),
    (33, 5, 16, 8), (33, 2, 32, 16), (33, 3, 8, 32), (18, 2, 4, 64), (33, 2, 6, 6), (20, 3, 4, 20), (300, 3, 48, 4),
    (33, 6, 32, 4),
    # Enough rows for tiles, more than one sum, a rest of a block; groups of one to four panels, whole and filled up.
    (67, 1, 9, 32), (600, 1, 12, 8), (130, 4, 16, 8), (300, 5, 16, 8), (257, 2, 8, 16), (70, 1, 4, 48), (90, 1, 3, 64),
)  # fmt: skip


@functools.cache
def case(M, f, n, b, dtype, transpose):
    """Inputs and their float64 results, shared by the levels."""
    torch.manual_seed(1)
    x, dz, R = torch.randn(M, n * b).to(dtype), torch.randn(M, n * b).to(dtype), stages(f, n, b, dtype)
    return x, dz, R, expected(x, dz, R, transpose)


@pytest.mark.parametrize("transpose", (False, True))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotations_and_their_gradients_match_float64(level, dtype, transpose):
    for M, f, n, b in SHAPES:
        x, dz, R, (z, dx, dR) = case(M, f, n, b, dtype, transpose)
        seen = butterfly.butterfly_rotate(x, R, transpose)
        gradients = butterfly.butterfly_rotate_backward(dz, x, R, transpose, (True, True))
        sums = FLOOR[R.dtype] + torch.finfo(R.dtype).eps * M**0.5 / 4
        for ours, exact, bound in zip((seen, *gradients), (z, dx, dR), (FLOOR[dtype], FLOOR[dtype], sums), strict=True):
            assert oracle.error(ours, exact) <= bound, (M, f, n, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_shared_block_gathers_the_gradient_of_all(level, dtype):
    for M, n, b in ((33, 7, 3), (40, 16, 8), (20, 3, 32), (33, 64, 2)):
        x, dz, R = torch.randn(M, n * b).to(dtype), torch.randn(M, n * b).to(dtype), stages(1, 1, b, dtype)[0]
        z, dx, dR = expected(x, dz, R, False)
        assert oracle.error(cpu.block_rotate(x, R, False), z) <= FLOOR[dtype]
        seen = cpu.block_rotate_backward(dz, x, R, False, (True, True))
        assert oracle.error(seen[0], dx) <= FLOOR[dtype]
        assert oracle.error(seen[1], dR) <= 2 * FLOOR[R.dtype]


@pytest.mark.parametrize("mask", ((True, False), (False, True), (False, False)))
def test_unwanted_gradients_come_back_empty_and_wanted_ones_unchanged(level, mask):
    for f, n, b in ((1, 6, 5), (3, 16, 4), (2, 4, 32)):
        x, dz = torch.randn(67, n * b).bfloat16(), torch.randn(67, n * b).bfloat16()
        R = stages(f, n, b, torch.bfloat16)
        both = butterfly.butterfly_rotate_backward(dz, x, R, False, (True, True))
        some = butterfly.butterfly_rotate_backward(dz, x, R, False, mask)
        for tensor, full, wanted in zip(some, both, mask, strict=True):
            assert torch.equal(tensor, full) if wanted else tensor.shape == (0,)


@pytest.mark.parametrize("transpose", (False, True))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_two_terms_add_up_to_the_unrounded_rotation(level, dtype, transpose):
    for M, f, n, b in ((35, 1, 5, 3), (35, 3, 16, 4), (69, 1, 4, 32), (300, 4, 16, 8)):
        for x in (torch.randn(M, n * b).to(dtype), torch.randn(M, n * b)):
            R, (z, rest) = stages(f, n, b, dtype), torch.empty(2, *x.shape, dtype=dtype)
            cpu.rotate_to(x, R, transpose, z, rest)
            exact = expected(x, x, R, transpose)[0]
            assert oracle.error(z, exact) <= FLOOR[dtype]
            assert oracle.error(z.double() + rest.double(), exact) <= torch.finfo(dtype).eps ** 2


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_the_number_of_threads_changes_no_bit(level, dtype):
    before, results = torch.get_num_threads(), []
    x, dz = torch.randn(517, 192).to(dtype), torch.randn(517, 192).to(dtype)
    R, q, s = stages(3, 48, 4, dtype), 0.1 * torch.randn(64, 3), 1 + 0.1 * torch.randn(192)
    single = stages(1, 6, 32, dtype)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            shared = cpu.skew_polynomial(q, [1.0, 2.0, 2.0, 1.0])
            results.append((
                butterfly.butterfly_rotate(x, R, False),
                *butterfly.butterfly_rotate_backward(dz, x, R, False, (True, True)),
                butterfly.butterfly_rotate(x, single, False),
                *butterfly.butterfly_rotate_backward(dz, x, single, False, (True, True)),
                *cpu.block_rotate_backward(dz, x, shared, False, (True, True)),
                *cpu.block_rotate_backward(dz, x, shared[:1], True, (True, True)),
                butterfly.scale_outputs(x, s, None),
                *butterfly.scale_outputs_backward(dz, x, s, None, (True, True)),
                cpu.skew_cayley(q), butterfly.dense_cayley_backward(R, R),
            ))  # fmt: skip
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_blocks_and_their_gradients_match_float64(level, dtype):
    bound = 1e-12 if dtype is torch.float64 else 1e-6
    for S, b in ((3, 2), (5, 3), (2, 8), (3, 17), (2, 33), (1, 100)):
        q = (0.3 / b**0.5 * torch.randn(S, b * (b - 1) // 2, dtype=torch.float64)).to(dtype)
        dR = torch.randn(S, b, b, dtype=dtype)
        for numbers in ((1.0,), (1.0, 2.0), (1.0, 2.0, 2.0, 1.0), (1.0, 2.0, 2.0, 2.0, 2.0, 1.0)):
            leaf = q.double().requires_grad_()
            exact = oracle_blocks.series(oracle_blocks.skew_by_index(leaf, b), numbers)
            (dq,) = torch.autograd.grad(exact, leaf, dR.double(), allow_unused=True)
            assert oracle.error(cpu.skew_polynomial(q, numbers), exact.detach()) < bound
            seen = cpu.skew_polynomial_backward(dR, q, numbers)
            assert not seen.any() if len(numbers) == 1 else oracle.error(seen, dq) < bound
        leaf = q.double().requires_grad_()
        exact = oracle_blocks.cayley(oracle_blocks.skew_by_index(leaf, b))
        (dq,) = torch.autograd.grad(exact, leaf, dR.double())
        R = cpu.skew_cayley(q)
        assert oracle.error(R, exact.detach()) < bound and oracle.error(cpu.skew_cayley_backward(dR, R), dq) < bound
        B = oracle_blocks.skew_by_index(q, b)[None] + torch.eye(b, dtype=dtype)
        assert oracle.error(butterfly.dense_cayley(B)[0], exact.detach()) < bound


def test_larger_blocks_go_to_the_reference():
    R = torch.eye(257)[None]
    assert cpu.supports("block_rotate", torch.randn(2, 257), R, False) == (
        False, "serves blocks of up to 256; this call has 257",
    )  # fmt: skip
    x = torch.randn(2, 257)
    assert torch.equal(torch.ops.peftkern.block_rotate(x, R, False), x)
