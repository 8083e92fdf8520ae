"""The CUDA C++ kernels as compiled code on the PTX machine: accuracy, any order of threads, bytes, banks, widths."""

import cuda_on_cpu
import oracle
import ptxvm
import pytest
import torch

import peftkern
from peftkern import dispatch
from peftkern.ops.householder import costs_cuda, cuda_backend, reference

pytestmark = pytest.mark.skipif(cuda_on_cpu.missing() is not None, reason=str(cuda_on_cpu.missing()))

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# M, K, N, r: more than one block of rows; columns shared by blocks; nothing a multiple of anything; the greatest r.
SHAPES = [(70, 96, 130, 8), (20, 530, 520, 40), (33, 61, 40, 1), (66, 131, 77, 33), (65, 160, 64, 128)]
ALIGNED = [(70, 192, 128, 8), (20, 576, 512, 32), (66, 128, 64, 64), (64, 64, 192, 128)]
OPS = (
    "wy_factor", "wy_factor_backward", "rotate", "rotate_backward", "rotated_linear", "rotated_linear_backward",
    "project", "project_backward", "orthogonality_penalty", "orthogonality_penalty_backward",
)  # fmt: skip


def problem(M, K, N, r, dtype):
    """Arguments of every operation at one shape."""
    working = torch.float64 if dtype is torch.float64 else torch.float32
    x, dz = torch.randn(2, M, K).to(dtype)
    W, dy = (torch.randn(N, K) / K**0.5).to(dtype), torch.randn(M, N).to(dtype)
    V = torch.randn(K, r, dtype=working)
    T, P, one = reference.wy_factor(V).contiguous(), x.to(working) @ V, torch.ones((), dtype=working)
    both, B = (True, True), W[: N if dtype.itemsize == 2 else 0].to(working) @ reference.pairs(V)
    return {
        "wy_factor": (V,),
        "wy_factor_backward": (torch.randn(r, r, dtype=torch.float64), V, T),
        "rotate": (x, V, T, False),
        "rotate_backward": (dz, x, P, V, T, False, both),
        "rotated_linear": (x, W, None, V, T, True),
        "rotated_linear_backward": (dy, x, W, P, B, V, T, both),
        "project": (x, V),
        "project_backward": (P, x, V, both),
        "orthogonality_penalty": (V, True),
        "orthogonality_penalty_backward": (one, V, False),
    }


def run(op, args, **options):
    """The results of an operation as a tuple, and its launches."""
    return cuda_on_cpu.run(cuda_backend, op, args, **options)


def value_and_gradients(function, tensors, incoming):
    with cuda_on_cpu.cuda_on_cpu(), dispatch.use_backend("cuda"):
        return oracle.value_and_gradients(function, tensors, incoming)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M, K, N, r", SHAPES)
def test_values_and_gradients_are_as_accurate_as_plain_torch(M, K, N, r, dtype):
    x, W, b = torch.randn(M, K).to(dtype), (torch.randn(N, K) / K**0.5).to(dtype), torch.randn(N).to(dtype)
    u, dz, dy = torch.randn(K, r), torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
    truth = oracle.value_and_gradients(oracle.rotate, (x.double(), u.double()), dz)
    plain = oracle.value_and_gradients(oracle.peft_rotate, (x, u), dz)
    seen = value_and_gradients(peftkern.rotate, (x, u), dz)
    oracle.assert_as_good_as(("z", "dx", "du"), seen, plain, truth, max(M, K))
    for bias, names in ((None, ("y", "dx", "dW", "du")), (b, ("y", "dx", "dW", "db", "du"))):
        tensors = [t for t in (x, W, bias, u) if t is not None]

        def linear(function, bias=bias):
            return function if bias is not None else lambda x, W, u: function(x, W, None, u)

        truth = oracle.value_and_gradients(linear(oracle.linear), [t.double() for t in tensors], dy)
        plain = oracle.value_and_gradients(linear(oracle.peft_linear), tensors, dy)
        exact = linear(lambda *t: peftkern.hra_linear(*t, precision="exact"))
        seen = value_and_gradients(exact, tensors, dy)
        oracle.assert_as_good_as(names, seen, plain, truth, max(M, K, N))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=str)
@pytest.mark.parametrize("M, K, N, r", [SHAPES[1], (33, 61, 40, 5), SHAPES[3]])
def test_each_operation_is_as_accurate_as_the_reference_in_its_dtype(M, K, N, r, dtype, op):
    args = problem(M, K, N, r, dtype)[op]
    formula = getattr(reference, op)
    exact, plain = formula(*(t.double() if isinstance(t, torch.Tensor) else t for t in args)), formula(*args)
    exact, plain = (t if isinstance(t, tuple) else (t,) for t in (exact, plain))
    if op == "rotated_linear" and dtype.itemsize == 2:
        exact = (*exact[:2], args[1].double() @ reference.pairs(args[3].double()))
    seen = run(op, args)[0]
    assert [(t.shape, t.dtype) for t in seen] == [(t.shape, t.dtype) for t in plain]
    if dtype is torch.float64:
        assert all(oracle.error(ours, truth) < 1e-14 for ours, truth in zip(seen, exact, strict=True))
    else:
        # The gradient of T is float64, made of float32 P and Q.
        seen = [t if op == "wy_factor" else t.to(torch.promote_types(dtype, torch.float32)) for t in seen]
        oracle.assert_as_good_as([op] * len(seen), seen, plain, exact, max(M, K, N))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_no_bit_depends_on_the_order_of_threads_nor_on_when_copies_land(op, dtype):
    args = problem(*SHAPES[1], dtype)[op]
    wanted = run(op, args)[0]
    for options in ({"seed": 1}, {"seed": 2, "late_copies": False}, {"seed": 3, "resident": 3}):
        for first, second in zip(wanted, run(op, args, **options)[0], strict=True):
            assert torch.equal(first, second)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("M, K, N, r", [*ALIGNED, (33, 61, 40, 16)])
def test_bytes_and_flops_are_what_the_costs_say(M, K, N, r, dtype, op):
    _, seen = run(op, problem(M, K, N, r, dtype)[op])
    stated = costs_cuda.launches(op, M=M, K=K, N=N, r=r, dtype=dtype, family="sm80")
    cuda_on_cpu.assert_costs(stated, seen)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M, K, r", ((64, 256, 32), (128, 448, 8), (70, 256, 64)))
def test_rows_that_fit_shared_memory_are_read_once(M, K, r, dtype):
    """All of x stays in the ring between the sweeps: bytes of x and z at most 1.10 times their size."""
    x, V = torch.randn(M, K).to(dtype), torch.randn(K, r)
    T = reference.wy_factor(V).contiguous()
    _, (launch,) = run("rotate", (x, V, T, False))
    like_x = [t for name, t in launch.counts.tensors.items() if f"{tuple(x.shape)} {str(dtype)[6:]}" in name]
    assert len(like_x) == 2
    assert sum(t.read for t in like_x) <= 1.10 * x.nbytes and sum(t.written for t in like_x) == x.nbytes


@pytest.mark.parametrize("op", ("rotate", "rotate_backward", "rotated_linear", "rotated_linear_backward"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("M, K, N, r", ALIGNED)
def test_sweeps_have_no_bank_conflicts_and_move_whole_sectors(M, K, N, r, dtype, op):
    """Left out: stores of P and S between the sweeps, and loads of T there, which the L1 cache serves."""
    for launch in run(op, problem(M, K, N, r, dtype)[op])[1]:
        if not any(name in launch.kernel for name in ("householder_rows", "householder_outer_kernel")):
            continue
        loads = [x for x in launch.counts.lines("conflicts") if not x.text.startswith("st.")]
        assert not loads, loads[0]
        gaps = [x for x in launch.counts.lines("sectors") if "f64" not in x.text and x.sectors > 1.05 * x.ideal_sectors]
        assert not gaps, gaps[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_aligned_rows_move_sixteen_bytes_at_a_time(dtype):
    M, K, _, r = ALIGNED[0]
    x, V = torch.randn(M, K).to(dtype), torch.randn(K, r)
    (_, _), (launch,) = run("rotate", (x, V, reference.wy_factor(V), False))
    narrow = [x for x in launch.counts.lines() if ".global" in x.text and x.sectors and "f64" not in x.text]
    wide = sum(x.bytes for x in narrow if "v4" in x.text or "cp.async.cg" in x.text)
    assert wide >= 2 * x.nbytes and wide >= 0.9 * sum(x.bytes for x in narrow) - 4 * M * r
    assert launch.counts.flops["tensor_tf32"] > 0 and launch.counts.flops["tensor_fp64"] > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset, width", ((1, 67), (8, 80), (0, 64)))
def test_strided_rows_are_read_in_place_and_nothing_beyond_them(dtype, offset, width):
    M, K, r = 10, 64, 5
    x = torch.full((M, width), torch.nan).to(dtype)
    x[:, offset : offset + K - 1 if width == 67 else offset + K] = torch.randn(M, K - (width == 67)).to(dtype)
    view = x[:, offset : offset + K - (width == 67)]
    V = torch.randn(view.shape[1], r)
    T = reference.wy_factor(V)
    for seen, wanted in zip(
        run("rotate", (view, V, T, False))[0], run("rotate", (view.clone(), V, T, False))[0], strict=True
    ):
        assert torch.equal(seen, wanted)


@pytest.mark.parametrize("op", OPS)
def test_no_rows_launch_nothing_that_fails(op):
    args = problem(0, 24, 10, 3, torch.bfloat16)[op]
    exact = getattr(reference, op)(*args)
    for ours, truth in zip(run(op, args)[0], exact if isinstance(exact, tuple) else (exact,), strict=True):
        assert ours.shape == truth.shape and (ours.numel() == 0 or oracle.error(ours, truth) < 1e-6)


def test_many_layers_take_one_launch_and_the_bits_of_each_alone():
    us = [torch.randn(K, 12) for K in (40, 700, 64, 257)]
    us[1][:, 3:5] = 0
    with cuda_on_cpu.cuda_on_cpu() as vm:
        together = cuda_backend.factor_many(us)
        assert len(vm.launches) == 1
        alone = [cuda_backend.wy_factor(u) for u in us]
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    with cuda_on_cpu.cuda_on_cpu() as vm:
        assert len(cuda_backend.factor_many([us[0]] * 65)) == 65 and len(vm.launches) == 2


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("r", (7, 48, 128))
def test_the_inverse_is_the_same_in_global_memory(r, dtype):
    """Where shared memory does not hold r x r, on devices with 99 KiB."""
    V, wanted = torch.randn(200, r, dtype=dtype), None
    V[:, r // 2] = 0
    host, library = cuda_on_cpu.library()
    for kept in (None, torch.empty(128 * 130, dtype=torch.float64)):
        T = torch.full((r, r), torch.nan, dtype=torch.float64)
        partial = torch.empty(library.householder_factor_partials(200, r), 1024, dtype=torch.float64)
        counters = torch.zeros(1, dtype=torch.int32)
        with host.on_cpu():
            library.householder_factor(
                [(V.data_ptr(), T.data_ptr(), 200)], 0, r, dtype is torch.float64, True, partial.data_ptr(),
                0 if kept is None else kept.data_ptr(), counters.data_ptr(), 0, 0,
            )  # fmt: skip
        assert not counters.any() and oracle.error(T, reference.wy_factor(V)) < 1e-13
        wanted = T if wanted is None else wanted
        assert torch.equal(T, wanted)


def test_more_reflections_than_tiles_hold_are_refused_in_a_sentence():
    x, V, T = torch.randn(3, 200), torch.randn(200, 129), torch.zeros(129, 129, dtype=torch.float64)
    with cuda_on_cpu.cuda_on_cpu(), dispatch.use_backend("cuda"):
        with pytest.raises(RuntimeError, match="serves up to 128 reflections; this call has 129"):
            torch.ops.peftkern.rotate(x, V, T, False)


def test_a_launch_beyond_a_tensor_is_caught():
    """The machine that proves these kernels sees what they touch: V that is one row short is out of bounds."""
    x, V = torch.randn(8, 64), torch.randn(64, 4)
    _, library = cuda_on_cpu.library()
    with pytest.raises(ptxvm.OutOfBounds), cuda_on_cpu.cuda_on_cpu():
        P = torch.empty(8, 4)
        none = (0,) * 5
        library.householder_rows(1, x.data_ptr(), 64, V[:63].data_ptr(), 0, 0, P.data_ptr(), *none, None, None, 8, 64,
                                 4, -1.0, False, 0)  # fmt: skip


def test_without_a_device_the_backend_says_so():
    ok, reason = cuda_backend.available()
    assert ok == torch.cuda.is_available() or "CUDA" in reason
