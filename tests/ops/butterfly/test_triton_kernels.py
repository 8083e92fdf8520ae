"""What the compiled Triton kernels of butterflies do, launch by launch: bytes and flops as stated, groups multiplied
out into one product, bits that do not depend on the order of threads. Their values are the shared tests' business.
"""

import devices
import oracle_blocks
import pytest
import torch
import triton_launches

from peftkern import dispatch
from peftkern.ops import _triton
from peftkern.ops import butterfly as bf
from peftkern.ops.butterfly import costs

pytest.importorskip("triton", reason="Triton is not installed")

if devices.INTERPRETED or devices.ON_DEVICE:
    pytest.skip("counts compiled code on the simulated machine", allow_module_level=True)
if reason := devices.missing("triton"):
    pytest.skip(reason, allow_module_level=True)

import ptxvm

from peftkern.ops.butterfly import triton_backend as backend

OPS = (
    "dense_cayley", "dense_cayley_backward", "butterfly_rotate", "butterfly_rotate_backward", "butterfly_rotate_weight",
    "scale_outputs", "scale_outputs_backward", "butterfly_rotated_linear", "butterfly_rotated_linear_backward",
)  # fmt: skip


@pytest.fixture
def vm(monkeypatch):
    monkeypatch.setattr(_triton, "SIMULATED", True)
    with ptxvm.triton_on_cpu(arch=80) as machine:
        yield machine


def arguments(op, dtype, M, K, N, b, f):
    x, dz, dy, y, p = (torch.randn(M, n).to(dtype) for n in (K, K, N, N, N))
    W, s = (torch.randn(N, K) / K**0.5).to(dtype), 1 + 0.1 * torch.randn(N)
    B, dR = 0.3 * torch.randn(f, K // b, b, b), torch.randn(f, K // b, b, b)
    R = bf.reference.dense_cayley(B)
    return {
        "dense_cayley": (B,),
        "dense_cayley_backward": (dR, R),
        "butterfly_rotate": (x, R, False),
        "butterfly_rotate_backward": (dz, x, R, False, (True, True)),
        "butterfly_rotate_weight": (W, s, R),
        "scale_outputs": (y, s, None),
        "scale_outputs_backward": (dy, y, s, None, (True, True)),
        "butterfly_rotated_linear": (x, W, None, s, R),
        "butterfly_rotated_linear_backward": (dy, x, W, s, p, R, (True, True, True)),
    }[op]


def run(op, *args):
    return getattr(backend, op)(*args)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "dtype, M, K, N, b, f",
    [
        (torch.bfloat16, 264, 256, 192, 8, 4),
        (torch.float16, 136, 128, 80, 32, 1),
        (torch.float16, 136, 96, 80, 6, 3),
        (torch.float32, 136, 192, 96, 4, 3),
        (torch.float32, 72, 64, 48, 2, 5),
        (torch.float32, 40, 128, 48, 16, 4),
    ],
)
def test_launches_move_and_compute_what_the_costs_say(vm, op, dtype, M, K, N, b, f):
    run(op, *arguments(op, dtype, M, K, N, b, f))
    stated = costs.launches(op, "triton", M=M, K=K, N=N, b=b, f=f, dtype=dtype, family="sm80")
    triton_launches.holds(vm.launches, stated)


@pytest.mark.parametrize("family", ("sm80", "sm90", "sm100"))
def test_butterflies_of_a_real_layer_move_little_more_than_the_rows(family):
    """Rows are read and written once whatever f is, and what the groups take beside them is a tenth at most."""
    M, K, b, f = 8192, 4096, 8, 4
    sizes = {"M": M, "K": K, "N": K, "b": b, "f": f, "dtype": torch.bfloat16, "family": family}
    for op, passes in (("butterfly_rotate", 2), ("butterfly_rotate_backward", 3)):
        launches = costs.launches(op, "triton", **sizes)
        rows = next(launch for launch in launches if "rotate" in launch.kernel)
        least = passes * 2 * M * K
        assert rows.read + rows.written <= 1.1 * least, op
        assert sum(launch.unique for launch in launches if launch is not rows) <= 0.15 * least, op
    for op, passes in (("scale_outputs", 2), ("scale_outputs_backward", 3)):
        first, *_ = costs.launches(op, "triton", **sizes)
        assert first.read + first.written <= 1.1 * passes * 2 * M * K, op


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
@pytest.mark.parametrize("b, f", ((8, 4), (16, 2), (4, 5)))
def test_rows_stream_past_without_gaps_on_tensor_cores(vm, dtype, b, f):
    for op in ("butterfly_rotate", "butterfly_rotate_backward", "scale_outputs", "scale_outputs_backward"):
        run(op, *arguments(op, dtype, 136, 128, 256, b, f))
    triton_launches.whole_sectors(vm.launches, {"p_x", "p_dz", "p_y", "p_dy"})
    for launch in vm.launches:
        counts = launch.counts
        if "rotate" in launch.kernel:
            assert sum(v for k, v in counts.flops.items() if k.startswith("tensor")) > 20 * counts.flops["fp32"]
    triton_launches.no_bank_conflicts(vm.launches, old=("scale_backward_kernel",))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype, M, K, b, f", [(torch.bfloat16, 37, 48, 6, 3), (torch.float32, 19, 40, 20, 2)])
def test_no_bit_depends_on_the_order_of_threads(vm, op, dtype, M, K, b, f):
    args = arguments(op, dtype, M, K, 30, b, f)

    def shuffled(**options):
        vm.set(**options)
        return triton_launches.bits(run(op, *args))

    first = ptxvm.same_in_any_order(shuffled)
    assert torch.equal(first, shuffled())


@pytest.mark.parametrize("transpose", (False, True))
@pytest.mark.parametrize("K, b, f", ((64, 2, 2), (64, 2, 5), (40, 10, 2), (128, 8, 5), (128, 64, 2)))
def test_stages_multiplied_out_lose_nothing(vm, K, b, f, transpose):
    """Rows of ones and zeros show the product of a group's stages: float32's accuracy, whatever f and b are."""
    R = bf.reference.dense_cayley(0.4 * torch.randn(f, K // b, b, b))
    x, truth = torch.randn(70, K).bfloat16(), oracle_blocks.butterfly(R)
    groups = backend._stages(R)[0]
    assert (torch.block_diag(*groups).double() - truth).norm() <= 1e-6 * truth.norm()
    z = x.double() @ (truth.T if transpose else truth)
    seen = backend.butterfly_rotate(x, R, transpose)
    assert (seen - z).norm() <= 1.01 * (z.bfloat16() - z).norm()


@pytest.mark.parametrize("mask", ((True, False), (False, True), (False, False)))
@pytest.mark.parametrize("op", ("butterfly_rotate_backward", "scale_outputs_backward"))
def test_only_the_wanted_gradients_are_computed(vm, op, mask):
    args = arguments(op, torch.bfloat16, 130, 64, 40, 4, 3)
    both = run(op, *args)
    seen = run(op, *args[:-1], mask)
    for wanted, ours, full in zip(mask, seen, both, strict=True):
        assert torch.equal(ours, full) if wanted else ours.numel() == 0


def test_groups_wider_than_it_takes_are_left_to_the_next_backend(vm):
    x, R = torch.randn(3, 1024).bfloat16(), torch.randn(5, 16, 64, 64)
    with dispatch.use_backend("triton"), pytest.raises(RuntimeError, match="up to 512 columns that mix"):
        torch.ops.peftkern.butterfly_rotate(x, R, False)
