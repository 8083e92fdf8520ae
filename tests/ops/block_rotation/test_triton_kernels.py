"""What the compiled Triton kernels of block rotations do, launch by launch: bytes and flops as stated, no bank
conflicts where rows stream past, bits that do not depend on the order of threads. Their values are the shared tests'
business.
"""

import devices
import pytest
import torch
import triton_launches

from peftkern import dispatch
from peftkern.ops import _triton
from peftkern.ops import block_rotation as br
from peftkern.ops.block_rotation import costs

pytest.importorskip("triton", reason="Triton is not installed")

if devices.INTERPRETED or devices.ON_DEVICE:
    pytest.skip("counts compiled code on the simulated machine", allow_module_level=True)
if reason := devices.missing("triton"):
    pytest.skip(reason, allow_module_level=True)

import ptxvm

from peftkern.ops.block_rotation import triton_backend as backend

MAPS = ("skew_polynomial", "skew_polynomial_backward", "skew_cayley", "skew_cayley_backward")
ROWS = ("block_rotate", "block_rotate_backward", "block_rotated_linear", "block_rotated_linear_backward")
BOTH = (True, True)


@pytest.fixture
def vm(monkeypatch):
    monkeypatch.setattr(_triton, "SIMULATED", True)
    with ptxvm.triton_on_cpu(arch=80) as machine:
        yield machine


def arguments(op, dtype, M, K, N, b, shared=False, transpose=False):
    S = 1 if shared else K // b
    x, dz, dy = (torch.randn(M, n).to(dtype) for n in (K, K, N))
    W, q = (torch.randn(N, K) / K**0.5).to(dtype), 0.1 * torch.randn(S, b * (b - 1) // 2)
    R, dR = br.reference.skew_cayley(q), torch.randn(S, b, b)
    return {
        "skew_polynomial": (q, br.coefficients(5)),
        "skew_polynomial_backward": (dR, q, br.coefficients(5)),
        "skew_cayley": (q,),
        "skew_cayley_backward": (dR, R),
        "block_rotate": (x, R, transpose),
        "block_rotate_backward": (dz, x, R, transpose, BOTH),
        "block_rotated_linear": (x, W, None, R),
        "block_rotated_linear_backward": (dy, x, W, R, BOTH),
    }[op]


def run(op, *args):
    return getattr(backend, op)(*args)


@pytest.mark.parametrize("op", (*MAPS, *ROWS))
@pytest.mark.parametrize(
    "dtype, M, K, N, b, shared",
    [
        (torch.bfloat16, 264, 256, 64, 32, False),
        (torch.bfloat16, 136, 256, 64, 8, True),
        (torch.float16, 136, 256, 80, 64, False),
        (torch.float32, 136, 192, 96, 4, False),
        (torch.float32, 72, 128, 64, 64, False),
    ],
)
def test_launches_move_and_compute_what_the_costs_say(vm, op, dtype, M, K, N, b, shared):
    run(op, *arguments(op, dtype, M, K, N, b, shared))
    sizes = {"M": M, "K": K, "N": N, "b": b, "dtype": dtype, "family": "sm80", "shared": shared}
    triton_launches.holds(vm.launches, costs.launches(op, "triton", **sizes))


@pytest.mark.parametrize("family", ("sm80", "sm90", "sm100"))
@pytest.mark.parametrize("b", (8, 32, 64))
def test_rotations_of_a_real_layer_move_little_more_than_the_rows(family, b):
    """x read and z written, x and dz read and dx written: everything else together is a tenth at most."""
    M, K, sizes = 8192, 4096, {"N": 1, "b": b, "dtype": torch.bfloat16, "family": family}
    for op, passes in (("block_rotate", 2), ("block_rotate_backward", 3)):
        launch = costs.launches(op, "triton", M=M, K=K, **sizes)[0]
        assert launch.read + launch.written <= 1.1 * (passes * 2 * M * K + 4 * K * b), op


@pytest.mark.parametrize("transpose", (False, True))
@pytest.mark.parametrize("b", (8, 32, 64))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
def test_rows_stream_past_without_gaps_on_tensor_cores(vm, dtype, b, transpose):
    for op in ("block_rotate", "block_rotate_backward"):
        run(op, *arguments(op, dtype, 136, 256, 64, b, transpose=transpose))
    triton_launches.whole_sectors(vm.launches, {"p_x", "p_dz"})
    for launch in vm.launches:
        counts = launch.counts
        if "rotate" in launch.kernel:
            assert sum(v for k, v in counts.flops.items() if k.startswith("tensor")) > 20 * counts.flops["fp32"]
    triton_launches.no_bank_conflicts(vm.launches)


@pytest.mark.parametrize("b", (8, 32, 64))
def test_blocks_are_made_without_bank_conflicts(vm, b):
    for op in MAPS:
        run(op, *arguments(op, torch.float32, 1, 256, 1, b))
    triton_launches.no_bank_conflicts(vm.launches, old=("cayley_kernel",))


@pytest.mark.parametrize("op", (*MAPS, *ROWS))
@pytest.mark.parametrize(
    "dtype, M, K, b, shared", [(torch.bfloat16, 37, 85, 17, False), (torch.float32, 35, 66, 6, True)]
)
def test_no_bit_depends_on_the_order_of_threads(vm, op, dtype, M, K, b, shared):
    args = arguments(op, dtype, M, K, 24, b, shared, transpose=True)

    def shuffled(**options):
        vm.set(**options)
        return triton_launches.bits(run(op, *args))

    first = ptxvm.same_in_any_order(shuffled)
    assert torch.equal(first, shuffled())


@pytest.mark.parametrize("mask", ((True, False), (False, True), (False, False)))
@pytest.mark.parametrize("op", ("block_rotate_backward", "block_rotated_linear_backward"))
def test_only_the_wanted_gradients_are_computed(vm, op, mask):
    args = arguments(op, torch.bfloat16, 130, 64, 40, 16)
    both, launches = run(op, *args), len(vm.launches)
    seen = run(op, *args[:-1], mask)
    assert len(vm.launches) - launches <= (launches if mask[1] else launches - 1)
    for wanted, ours, full in zip(mask, seen, both, strict=True):
        assert torch.equal(ours, full) if wanted else ours.numel() == 0


@pytest.mark.parametrize("M, bias", ((33, True), (130, True), (130, False)))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_both_ways_to_an_exact_layer_round_once(vm, dtype, M, bias):
    x, W, _, R = arguments("block_rotated_linear", dtype, M, 64, 72, 32)
    b = torch.randn(72).to(dtype) if bias else None
    y = backend.block_rotated_linear(x, W, b, R)
    truth = torch.einsum("mik,ikc->mic", x.double().view(M, 2, 32), R.double()).reshape(M, 64) @ W.double().T
    truth = truth + b.double() if bias else truth
    assert (y - truth).norm() <= 1.02 * (truth.to(dtype) - truth).norm()
    assert [launch.kernel for launch in vm.launches] == ["rotate_kernel"] + ["linear_kernel"] * bias


def test_rows_with_a_stride_are_read_in_place(vm):
    """Every second row of a wider tensor, 8 columns in: what a slice of a batch looks like."""
    x, R, _ = arguments("block_rotate", torch.bfloat16, 20, 64, 1, 16)
    wide = torch.full((40, 80), torch.nan, dtype=torch.bfloat16)
    wide[::2, 8:72] = x
    z = backend.block_rotate(wide[::2, 8:72], R, False)
    assert vm.launches[-1].counts.tensors["p_x"].size > 2 * x.nbytes
    assert torch.equal(z, backend.block_rotate(x, R, False))


@pytest.mark.parametrize("op, b, most", (("block_rotate", 520, 512), ("skew_polynomial", 65, 64)))
def test_blocks_wider_than_it_takes_are_left_to_the_next_backend(vm, op, b, most):
    args = arguments(op, torch.bfloat16, 3, b, 1, b)
    assert backend.supports(op, *args) == (False, f"serves up to {most} columns that mix; this call has {b}")
    with dispatch.use_backend("triton"), pytest.raises(RuntimeError, match=f"up to {most} columns"):
        getattr(torch.ops.peftkern, op)(*args)


@pytest.mark.parametrize("dtype, b", ((torch.bfloat16, 160), (torch.float16, 256), (torch.float32, 100)))
@pytest.mark.parametrize("shared, transpose", ((False, True), (True, False)))
def test_blocks_wider_than_a_panel_are_as_accurate_and_counted(vm, dtype, b, shared, transpose):
    M, K = 70, 2 * b
    dz, x, R, *_ = arguments("block_rotate_backward", dtype, M, K, 1, b, shared)
    seen = run("block_rotate", x, R, transpose), *run("block_rotate_backward", dz, x, R, transpose, BOTH)
    args = [t.double() for t in (dz, x, R)]
    truth = (
        br.reference.block_rotate(*args[1:], transpose),
        *br.reference.block_rotate_backward(*args, transpose, BOTH),
    )
    for ours, exact in zip(seen, truth, strict=True):
        rounding = (exact.to(ours.dtype) - exact).norm()
        assert (ours - exact).norm() <= 1.02 * rounding + 4e-7 * exact.norm()
    sizes = {"M": M, "K": K, "N": 1, "b": b, "dtype": dtype, "family": "sm80", "shared": shared}
    stated = [c for op in ("block_rotate", "block_rotate_backward") for c in costs.launches(op, "triton", **sizes)]
    triton_launches.holds(vm.launches, stated)
    triton_launches.no_bank_conflicts(vm.launches)
