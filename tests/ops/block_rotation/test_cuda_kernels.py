"""The CUDA C++ kernels as compiled code on the PTX machine: accuracy, any order of threads, bytes, banks, widths."""

import cuda_on_cpu
import oracle
import oracle_blocks
import ptxvm
import pytest
import torch

from peftkern import dispatch
from peftkern.ops import block_rotation as br
from peftkern.ops.block_rotation import costs_cuda, cuda_backend, reference

pytestmark = pytest.mark.skipif(cuda_on_cpu.missing() is not None, reason=str(cuda_on_cpu.missing()))

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# M, K, N, b: several chunks and panels; nothing a multiple of anything; blocks that are padded in 16 and in 4 bytes, or
# number by number; one block for each width of the kernels.
SHAPES = [(330, 192, 40, 64), (70, 120, 33, 24), (65, 96, 64, 12), (33, 85, 20, 17), (150, 99, 9, 3), (1, 64, 8, 32)]
ALIGNED = [(300, 256, 64, 8), (192, 128, 64, 16), (200, 192, 64, 32), (300, 128, 64, 64)]
# Groups of more than 64 columns: half precision, and no maps of single blocks.
LARGE = [(330, 256, 64, 128), (65, 200, 24, 100)]
OPS = (
    "skew_polynomial", "skew_polynomial_backward", "skew_cayley", "skew_cayley_backward", "block_rotate",
    "block_rotate_backward", "block_rotated_linear", "block_rotated_linear_backward",
)  # fmt: skip
ROW_OPS = ("block_rotate", "block_rotate_backward")
LARGE_OPS = (*ROW_OPS, "block_rotated_linear", "block_rotated_linear_backward")


def cases(shapes, dtypes, ops):
    """(shape, dtype, op), and those of LARGE that are served."""
    served = [(shape, dtype, op) for shape in shapes for dtype in dtypes for op in ops]
    half = [dtype for dtype in dtypes if dtype.itemsize == 2]
    return served + [(shape, dtype, op) for shape in LARGE for dtype in half for op in LARGE_OPS if op in ops]


def problem(M, K, N, b, dtype, shared=False, transpose=False):
    """Arguments of every operation at one shape."""
    working = torch.float64 if dtype is torch.float64 else torch.float32
    S = 1 if shared else K // b
    q = (torch.randn(S, b * (b - 1) // 2, dtype=working) / b) / 2
    R, dR = reference.skew_cayley(q), torch.randn(S, b, b, dtype=working)
    x, dz = torch.randn(2, M, K).to(dtype)
    W, dy = (torch.randn(N, K) / K**0.5).to(dtype), torch.randn(M, N).to(dtype)
    terms, both = br.coefficients(5), (True, True)
    return {
        "skew_polynomial": (q, terms),
        "skew_polynomial_backward": (dR, q, terms),
        "skew_cayley": (q,),
        "skew_cayley_backward": (dR, R),
        "block_rotate": (x, R, transpose),
        "block_rotate_backward": (dz, x, R, transpose, both),
        "block_rotated_linear": (x, W, None, R),
        "block_rotated_linear_backward": (dy, x, W, R, both),
    }


def run(op, args, **options):
    return cuda_on_cpu.run(cuda_backend, op, args, **options)


def as_tuple(result):
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("shape, dtype, op", cases(SHAPES, (*DTYPES, torch.float64), OPS), ids=str)
def test_each_operation_is_as_accurate_as_the_reference_in_its_dtype(shape, dtype, op):
    M, K, _, b = shape
    args, formula = problem(*shape, dtype, shared=b == 12, transpose=b in (24, 3))[op], getattr(reference, op)
    exact = as_tuple(formula(*(t.double() if isinstance(t, torch.Tensor) else t for t in args)))
    plain, seen = as_tuple(formula(*args)), run(op, args)[0]
    assert [(t.shape, t.dtype, t.is_contiguous()) for t in seen] == [(t.shape, t.dtype, True) for t in plain]
    if dtype is torch.float64:
        assert all(oracle.error(ours, truth) < 1e-13 for ours, truth in zip(seen, exact, strict=True))
    else:
        oracle.assert_as_good_as([op] * len(seen), seen, plain, exact, max(M, K))


@pytest.mark.parametrize(
    "shape, dtype, op",
    [*cases(SHAPES[:1], (torch.bfloat16,), OPS), *cases(SHAPES[1:2], (torch.float32,), OPS)],
    ids=str,
)
def test_no_bit_depends_on_the_order_of_threads_nor_on_when_copies_land(shape, dtype, op):
    """With the shared memory of the smallest devices, once."""
    args = problem(*shape, dtype)[op]
    wanted = run(op, args)[0]
    for options in (
        {"seed": 1, "shared_limit": 99 * 1024},
        {"seed": 2, "late_copies": False},
        {"seed": 3, "resident": 3},
    ):
        for first, second in zip(wanted, run(op, args, **options)[0], strict=True):
            assert torch.equal(first, second)


@pytest.mark.parametrize(
    "shape, dtype, op", cases([*ALIGNED, (150, 120, 33, 24)], (torch.float32, torch.bfloat16), OPS), ids=str
)
def test_bytes_and_flops_are_what_the_costs_say(shape, dtype, op):
    M, K, N, b = shape
    shared = b == 24
    _, seen = run(op, problem(*shape, dtype, shared)[op])
    stated = costs_cuda.launches(op, M=M, K=K, N=N, b=b, dtype=dtype, family="sm80", shared=shared)
    cuda_on_cpu.assert_costs(stated, seen)


@pytest.mark.parametrize("mask", ((True, False), (False, True)))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_one_gradient_alone_has_the_same_bits_and_its_own_costs(dtype, mask):
    M, K, N, b = ALIGNED[2]
    *args, both = problem(M, K, N, b, dtype)["block_rotate_backward"]
    wanted = run("block_rotate_backward", (*args, both))[0]
    seen, launches = run("block_rotate_backward", (*args, mask))
    for ours, theirs, want in zip(seen, wanted, mask, strict=True):
        assert torch.equal(ours, theirs) if want else ours.numel() == 0
    stated = costs_cuda.launches("block_rotate_backward", M=M, K=K, N=N, b=b, dtype=dtype, family="sm80", mask=mask)
    cuda_on_cpu.assert_costs(stated, launches)


@pytest.mark.parametrize("op", ROW_OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ALIGNED, ids=str)
def test_rows_are_read_and_written_once_in_whole_sectors_and_without_bank_conflicts(shape, dtype, op):
    args = problem(*shape, dtype)[op]
    launch, x = run(op, args)[1][0], args[0]
    rows = [t for name, t in launch.counts.tensors.items() if f"{tuple(x.shape)} {str(dtype)[6:]}" in name]
    assert sum(t.read for t in rows) == (len(rows) - 1) * x.nbytes and sum(t.written for t in rows) == x.nbytes
    assert len(rows) == (2 if op == "block_rotate" else 3)
    conflicts = launch.counts.lines("conflicts")
    assert not conflicts, conflicts[0]
    gaps = launch.counts.lines("sectors")
    assert not gaps, gaps[0]
    wide = [x for x in launch.counts.lines() if x.sectors and ("v4" in x.text or "cp.async.cg" in x.text)]
    assert sum(x.bytes for x in wide) == sum(t.read + t.written for t in rows)
    assert launch.counts.flops[costs_cuda._UNITS[dtype]] > 0


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("op, reads", (("block_rotate", 1), ("block_rotate_backward", 3)))
def test_large_blocks_read_dz_once_more_and_nothing_else(op, reads, dtype):
    args = problem(*LARGE[0], dtype)[op]
    launches, x = [one for one in run(op, args)[1] if "block_rotate" in one.kernel], args[0]
    tensors = [t for one in launches for name, t in one.counts.tensors.items() if str(tuple(x.shape)) in name]
    assert sum(t.read for t in tensors) == reads * x.nbytes and sum(t.written for t in tensors) == x.nbytes
    for launch in launches:
        assert not launch.counts.lines("conflicts") and not launch.counts.lines("sectors")


@pytest.mark.parametrize("b", (8, 6))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset, width", ((1, 67), (8, 80), (2, 50)))
def test_strided_rows_are_read_in_place_and_nothing_beyond_them(dtype, offset, width, b):
    M, K = 10, 48
    x = torch.full((M, width), torch.nan).to(dtype)
    x[:, offset : offset + K] = torch.randn(M, K).to(dtype)
    view, R = x[:, offset : offset + K], torch.randn(K // b, b, b)
    for op, args in (
        ("block_rotate", lambda x: (x, R, False)),
        ("block_rotate_backward", lambda x: (x, x, R, True, (True, True))),
    ):
        for seen, wanted in zip(run(op, args(view))[0], run(op, args(view.clone()))[0], strict=True):
            assert torch.equal(seen, wanted)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("b", (5, 32))
def test_two_terms_hold_the_rotated_rows_to_twice_the_digits(dtype, b):
    x, R = torch.randn(70, 160).to(dtype), reference.skew_cayley(torch.randn(160 // b, b * (b - 1) // 2))
    with cuda_on_cpu.cuda_on_cpu():
        high, low = cuda_backend.rotate(x, R, False, low=True)
        assert torch.equal(high, cuda_backend.rotate(x, R, False))
    truth = oracle_blocks.rotate(x, R)
    assert oracle.error(high.double() + low.double(), truth) < 4 * torch.finfo(dtype).eps ** 2


@pytest.mark.parametrize("op", OPS)
def test_no_rows_launch_nothing_that_fails(op):
    args = problem(0, 24, 10, 3, torch.bfloat16)[op]
    for ours, truth in zip(run(op, args)[0], as_tuple(getattr(reference, op)(*args)), strict=True):
        assert ours.shape == truth.shape and (ours.numel() == 0 or oracle.error(ours, truth) < 1e-6)


def test_more_terms_than_a_launch_takes_are_served_by_the_reference():
    q = 0.01 * torch.randn(3, 6)
    terms = br.coefficients(40)
    assert oracle.error(run("skew_polynomial", (q, terms))[0][0], reference.skew_polynomial(q, terms)) < 1e-6
    dR = torch.randn(3, 4, 4)
    seen = run("skew_polynomial_backward", (dR, q, terms))[0][0]
    assert oracle.error(seen, reference.skew_polynomial_backward(dR, q, terms)) < 1e-6


@pytest.mark.parametrize("dtype, most", ((torch.float32, 64), (torch.bfloat16, 128)), ids=str)
def test_blocks_beyond_the_registers_are_refused_in_a_sentence(dtype, most):
    b = most + 1
    x, R = torch.randn(3, 2 * b).to(dtype), torch.randn(2, b, b)
    with cuda_on_cpu.cuda_on_cpu(), dispatch.use_backend("cuda"):
        with pytest.raises(RuntimeError, match=f"serves blocks of up to {most} in this dtype; this call has {b}"):
            torch.ops.peftkern.block_rotate(x, R, False)


def test_a_launch_beyond_a_tensor_is_caught():
    """The machine that proves these kernels sees what they touch: an R that is one block short is out of bounds."""
    x, R = torch.randn(8, 64), torch.randn(8, 8, 8)
    _, library = cuda_on_cpu.library()
    with pytest.raises(ptxvm.OutOfBounds), cuda_on_cpu.cuda_on_cpu():
        z, short = torch.empty(8, 64), R[:7].data_ptr()
        library.block_rows(1, x.data_ptr(), 64, short, False, False, z.data_ptr(), 0, 0, 0, 0, 0, 8, 8, 8, 0)
