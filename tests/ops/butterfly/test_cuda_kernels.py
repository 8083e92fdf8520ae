"""The CUDA C++ kernels as compiled code on the PTX machine: accuracy, any order of threads, bytes, banks, widths."""

import cuda_on_cpu
import oracle
import pytest
import torch

from peftkern import dispatch
from peftkern.ops.butterfly import costs_cuda, cuda_backend, reference

pytestmark = pytest.mark.skipif(cuda_on_cpu.missing() is not None, reason=str(cuda_on_cpu.missing()))

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# M, K, N, b, f: groups of each width of the kernels, and between them; many stages of small blocks.
SHAPES = [(330, 192, 40, 8, 4), (70, 120, 33, 6, 3), (65, 128, 70, 2, 6), (33, 96, 20, 16, 2), (20, 35, 9, 7, 1)]
ALIGNED = [(300, 128, 512, 8, 4), (192, 128, 264, 8, 3), (200, 192, 64, 32, 2), (130, 64, 8, 8, 1)]
# Groups of more than 64 columns: half precision.
LARGE = [(150, 256, 24, 8, 5), (65, 160, 20, 40, 2)]
OPS = (
    "dense_cayley", "dense_cayley_backward", "butterfly_rotate", "butterfly_rotate_backward", "butterfly_rotate_weight",
    "scale_outputs", "scale_outputs_backward", "butterfly_rotated_linear", "butterfly_rotated_linear_backward",
)  # fmt: skip


def cases(shapes, dtypes):
    """(shape, dtype), and those of LARGE that are served."""
    served = [(shape, dtype) for shape in shapes for dtype in dtypes]
    return served + [(shape, dtype) for shape in LARGE for dtype in dtypes if dtype.itemsize == 2]


def problem(M, K, N, b, f, dtype, bias=True, transpose=False):
    """Arguments of every operation at one shape."""
    working = torch.float64 if dtype is torch.float64 else torch.float32
    B, dR = torch.randn(2, f, K // b, b, b, dtype=working) / b**0.5
    x, dz = torch.randn(2, M, K).to(dtype)
    W, y, dy = (torch.randn(N, K) / K**0.5).to(dtype), *torch.randn(2, M, N).to(dtype)
    s, R, both = 1 + torch.randn(N, dtype=working) / 5, reference.dense_cayley(B), (True, True)
    c = torch.randn(N).to(dtype) if bias else None
    return {
        "dense_cayley": (B,),
        "dense_cayley_backward": (dR, R),
        "butterfly_rotate": (x, R, transpose),
        "butterfly_rotate_backward": (dz, x, R, transpose, both),
        "butterfly_rotate_weight": (W, s, R),
        "scale_outputs": (y, s, c),
        "scale_outputs_backward": (dy, y, s, c, both),
        "butterfly_rotated_linear": (x, W, c, s, R),
        "butterfly_rotated_linear_backward": (dy, x, W, s, y, R, (True, True, True)),
    }


def run(op, args, **options):
    return cuda_on_cpu.run(cuda_backend, op, args, **options)


def as_tuple(result):
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape, dtype", cases(SHAPES, (*DTYPES, torch.float64)), ids=str)
def test_each_operation_is_as_accurate_as_the_reference_in_its_dtype(shape, dtype, op):
    M, K, _, _, f = shape
    args, formula = problem(*shape, dtype, transpose=f in (3, 2))[op], getattr(reference, op)
    exact = as_tuple(formula(*(t.double() if isinstance(t, torch.Tensor) else t for t in args)))
    plain, seen = as_tuple(formula(*args)), run(op, args)[0]
    assert [(t.shape, t.dtype, t.is_contiguous()) for t in seen] == [(t.shape, t.dtype, True) for t in plain]
    if dtype is torch.float64:
        assert all(oracle.error(ours, truth) < 1e-13 for ours, truth in zip(seen, exact, strict=True))
    else:
        oracle.assert_as_good_as([op] * len(seen), seen, plain, exact, max(M, K))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "shape, dtype", ((SHAPES[0], torch.bfloat16), (SHAPES[1], torch.float32), (LARGE[1], torch.float16)), ids=str
)
def test_no_bit_depends_on_the_order_of_threads_nor_on_when_copies_land(op, shape, dtype):
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


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "shape, dtype", cases([*ALIGNED, (150, 96, 40, 24, 2)], (torch.float32, torch.bfloat16)), ids=str
)
def test_bytes_and_flops_are_what_the_costs_say(shape, dtype, op):
    M, K, N, b, f = shape
    _, seen = run(op, problem(*shape, dtype, bias=False)[op])
    cuda_on_cpu.assert_costs(costs_cuda.launches(op, M=M, K=K, N=N, b=b, f=f, dtype=dtype, family="sm80"), seen)


@pytest.mark.parametrize("mask", ((True, False, False), (False, True, False), (False, False, True), (False,) * 3))
def test_gradients_that_nobody_wants_cost_nothing_and_change_no_bit(mask):
    M, K, N, b, f = ALIGNED[0]
    op, dtype = "butterfly_rotated_linear_backward", torch.bfloat16
    *args, everything = problem(M, K, N, b, f, dtype)[op]
    wanted = run(op, (*args, everything))[0]
    seen, launches = run(op, (*args, mask))
    for ours, theirs, want in zip(seen, wanted, mask, strict=True):
        assert torch.equal(ours, theirs) if want else ours.numel() == 0
    if any(mask):
        stated = costs_cuda.launches(op, M=M, K=K, N=N, b=b, f=f, dtype=dtype, family="sm80", mask=mask)
        cuda_on_cpu.assert_costs(stated, launches)
    else:
        assert not launches


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ("butterfly_rotate", "butterfly_rotate_backward", "scale_outputs"))
def test_rows_are_read_and_written_once_sixteen_bytes_at_a_time(dtype, op):
    args = problem(*ALIGNED[0], dtype)[op]
    launches, x = run(op, args)[1], args[0]
    launch = next(one for one in launches if "block_rotate" in one.kernel or "scale_outputs" in one.kernel)
    rows = [t for name, t in launch.counts.tensors.items() if f"{tuple(x.shape)} {str(dtype)[6:]}" in name]
    assert sum(t.read for t in rows) == (len(rows) - 1) * x.nbytes and sum(t.written for t in rows) == x.nbytes
    wide = [x for x in launch.counts.lines() if x.sectors and ("v4" in x.text or "cp.async.cg" in x.text)]
    assert sum(x.bytes for x in wide) >= sum(t.read + t.written for t in rows)
    assert all(x.sectors == x.ideal_sectors for x in wide if "cp.async" in x.text or x.text.startswith("st."))
    assert not launch.counts.lines("conflicts")


@pytest.mark.parametrize("offset, width", ((1, 70), (8, 80)))
def test_strided_outputs_are_scaled_in_place_and_nothing_beyond_them(offset, width):
    y = torch.full((10, width), torch.nan).bfloat16()
    y[:, offset : offset + 64] = torch.randn(10, 64)
    view, s, b = y[:, offset : offset + 64], torch.randn(64), torch.randn(64).bfloat16()
    both = (True, True)
    for op, args in (
        ("scale_outputs", lambda y: (y, s, b)),
        ("scale_outputs_backward", lambda y: (y, y, s, b, both)),
    ):
        for seen, wanted in zip(run(op, args(view))[0], run(op, args(view.clone()))[0], strict=True):
            assert torch.equal(seen, wanted)


@pytest.mark.parametrize("op", OPS)
def test_no_rows_launch_nothing_that_fails(op):
    args = problem(0, 24, 10, 4, 2, torch.bfloat16)[op]
    for ours, truth in zip(run(op, args)[0], as_tuple(getattr(reference, op)(*args)), strict=True):
        assert ours.shape == truth.shape and (ours.numel() == 0 or oracle.error(ours, truth) < 1e-6)


def test_groups_beyond_the_registers_are_refused_in_a_sentence():
    x, R = torch.randn(3, 256), torch.randn(5, 16, 16, 16)
    with cuda_on_cpu.cuda_on_cpu(), dispatch.use_backend("cuda"):
        with pytest.raises(RuntimeError, match="up to 64 columns in this dtype; this call has 256, 5 stages of"):
            torch.ops.peftkern.butterfly_rotate(x, R, False)
