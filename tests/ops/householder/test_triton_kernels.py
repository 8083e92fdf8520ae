"""What the compiled Triton kernels do, launch by launch: bytes and flops as stated, no bank conflicts, bits that do not
depend on the order of threads, and both ways to an exact layer. Their values are the shared tests' business.
"""

import devices
import oracle
import pytest
import torch
import triton_launches

import peftkern
from peftkern import dispatch
from peftkern.ops import _triton
from peftkern.ops.householder import costs, costs_triton, reference

pytest.importorskip("triton", reason="Triton is not installed")

if devices.INTERPRETED or devices.ON_DEVICE:
    pytest.skip("counts compiled code on the simulated machine", allow_module_level=True)
if reason := devices.missing("triton"):
    pytest.skip(reason, allow_module_level=True)

import ptxvm

from peftkern.ops.householder import triton_backend as backend

OPS = (
    "wy_factor", "wy_factor_backward", "rotate", "rotate_backward", "rotated_linear", "rotated_linear_backward",
    "project", "project_backward", "orthogonality_penalty", "orthogonality_penalty_backward",
)  # fmt: skip
# Where a tile of r x r is stored, outside of loops: Triton's own layout conversion, at most one wavefront in twenty.
FEW_CONFLICTS = ("gram_gradient_kernel",)


@pytest.fixture
def vm(monkeypatch):
    monkeypatch.setattr(_triton, "SIMULATED", True)
    with ptxvm.triton_on_cpu(arch=80) as machine:
        yield machine


@pytest.fixture(params=("fused", "in steps"))
def way(request, monkeypatch):
    """The two ways to an exact layer: a product of our own, and the library's with more passes."""
    if request.param == "in steps":
        monkeypatch.setattr(_triton, "family", lambda: "gfx942")
    return request.param


def arguments(op, dtype, M, K, N, r):
    """Inputs of one call with columns of length one or so, and no bias."""
    x, dz, dy = (torch.randn(M, n).to(dtype) for n in (K, K, N))
    W, V = (torch.randn(N, K) / K**0.5).to(dtype), torch.randn(K, r) / K**0.5
    T, both = reference.wy_factor(V), (True, True)
    P, dT = reference.project(x, V), torch.randn(r, r, dtype=torch.float64)
    B = reference.project(W[: N if dtype.itemsize == 2 else 0], reference.pairs(V))
    return {
        "wy_factor": (V,),
        "wy_factor_backward": (dT, V, T),
        "rotate": (x, V, T, False),
        "rotate_backward": (dz, x, P, V, T, False, both),
        "rotated_linear": (x, W, None, V, T, True),
        "rotated_linear_backward": (dy, x, W, P, B, V, T, both),
        "project": (x, V),
        "project_backward": (torch.randn(M, r), x, V, both),
        "orthogonality_penalty": (V, True),
        "orthogonality_penalty_backward": (torch.tensor(1.0), V, True),
    }[op]


def run(op, *args):
    result = getattr(backend, op)(*args)
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "dtype, M, K, N, r",
    [
        (torch.bfloat16, 136, 264, 192, 24),
        (torch.float16, 72, 136, 144, 9),
        (torch.float32, 64, 128, 96, 40),
    ],
)
def test_launches_move_and_compute_what_the_costs_say(vm, op, dtype, M, K, N, r):
    run(op, *arguments(op, dtype, M, K, N, r))
    stated = costs.launches(op, "triton", M=M, K=K, N=N, r=r, dtype=dtype, family="sm80")
    triton_launches.holds(vm.launches, stated)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
@pytest.mark.parametrize("op", OPS)
def test_rows_are_read_without_bank_conflicts_or_gaps(vm, op, dtype):
    run(op, *arguments(op, dtype, 72, 144, 80, 24))
    for launch in vm.launches:
        counts = launch.counts
        if launch.kernel in FEW_CONFLICTS:
            assert counts.bank_conflicts <= 0.05 * counts.shared_wavefronts
        else:
            triton_launches.no_bank_conflicts([launch], old=("wy_factor_kernel", "penalty_kernel", "core_kernel"))
        rows = [name for name in ("p_x", "p_y", "p_dy", "p_w", "p_z", "p_dx") if name in counts.tensors]
        for name in rows if launch.kernel != "core_kernel" else ():
            traffic = counts.tensors[name]
            assert 32 * traffic.sectors_read <= 1.1 * traffic.read + 32, f"{launch.kernel}: {name}"


def test_products_with_half_precision_rows_run_on_tensor_cores(vm):
    for op in ("rotate", "rotate_backward", "rotated_linear", "rotated_linear_backward"):
        run(op, *arguments(op, torch.bfloat16, 72, 136, 144, 9))
    run("rotated_linear_backward", *arguments("rotated_linear_backward", torch.bfloat16, 32, 136, 144, 9))
    kernels = {launch.kernel: launch.counts for launch in vm.launches}
    for name in ("project_kernel", "update_kernel", "linear_kernel", "linear_backward_kernel"):
        assert kernels[name].flops["tensor_bf16"] > 20 * kernels[name].flops["fp32"], name
    for name in ("gram_kernel", "core_kernel"):
        assert kernels[name].flops["tensor_fp64"] > 0, name


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype, M, K, N, r", [(torch.bfloat16, 37, 83, 61, 5), (torch.float32, 19, 65, 30, 33)])
def test_no_bit_depends_on_the_order_of_threads(vm, op, dtype, M, K, N, r):
    args = arguments(op, dtype, M, K, N, r)

    def shuffled(**options):
        vm.set(**options)
        return torch.cat([t.double().flatten() for t in run(op, *args)])

    first = ptxvm.same_in_any_order(shuffled)
    assert torch.equal(first, shuffled())


@pytest.mark.parametrize(
    "dtype, M, K, N, r",
    [
        (torch.bfloat16, 150, 136, 72, 8),
        (torch.float16, 130, 136, 72, 5),
        (torch.bfloat16, 130, 61, 97, 33),
        (torch.bfloat16, 30, 136, 72, 8),
        (torch.float16, 5, 40, 130, 3),
    ],
)
def test_both_ways_to_an_exact_layer_are_as_accurate_as_the_plain_one(vm, way, dtype, M, K, N, r):
    x, weight, dy = torch.randn(M, K), torch.randn(N, K) / K**0.5, torch.randn(M, N).to(dtype)
    tensors, u = (x.to(dtype), weight.to(dtype)), torch.randn(K, r)
    truth = oracle.value_and_gradients(lambda x, w, u: oracle.linear(x, w, None, u),
                                       [t.double() for t in (*tensors, u)], dy)  # fmt: skip
    plain = oracle.value_and_gradients(lambda x, w, u: oracle.peft_linear(x, w, None, u), (*tensors, u), dy)
    with dispatch.use_backend("triton"):
        seen = oracle.value_and_gradients(lambda x, w, u: peftkern.hra_linear(x, w, None, u), (*tensors, u), dy)
    fused = {launch.kernel for launch in vm.launches} & {"linear_kernel", "linear_backward_kernel"}
    expected = {"linear_kernel"} if way == "fused" or M <= 64 else set()
    expected |= {"linear_backward_kernel"} if way == "fused" and M <= 32 else set()
    assert fused == expected
    oracle.assert_as_good_as(("y", "dx", "dweight", "du"), seen, plain, truth, max(M, K, N))


@pytest.mark.parametrize("mask", ((True, False), (False, True), (False, False)))
@pytest.mark.parametrize("op", ("rotate_backward", "rotated_linear_backward", "project_backward"))
def test_only_the_wanted_gradients_are_computed(vm, way, op, mask):
    args = arguments(op, torch.bfloat16, 130, 72, 40, 6)
    both = run(op, *args)
    launches = len(vm.launches)
    seen = run(op, *args[:-1], mask)
    assert len(vm.launches) - launches <= (launches if mask[1] else launches - 1)
    for wanted, ours, full in zip((mask[0], mask[1], mask[1])[: len(both)], seen, both, strict=True):
        assert torch.equal(ours, full) if wanted else ours.numel() == 0


LAYERS = [(40, 12), (700, 12), (64, 12), (257, 12)], [(90, 40)] * 9, [(130, 100), (33, 100)], [(1, 1), (50, 1)]


@pytest.mark.parametrize("layers", LAYERS, ids=str)
def test_many_layers_take_one_launch_and_the_bits_of_each_alone(vm, layers):
    Vs = [torch.randn(K, r) for K, r in layers]
    Vs[1][:, 3:5] = 0
    Vs[0] = Vs[0].T.contiguous().T
    together = ptxvm.same_in_any_order(
        lambda **options: vm.set(**options) or torch.cat([T.flatten() for T in backend.factor_many(Vs)])
    )
    (seen, *_), (first, *_) = vm.launches, Vs
    stated = costs_triton.factor("sm80", [K for K, _ in layers], first.shape[1])
    triton_launches.holds([seen], [stated])
    assert torch.equal(together, torch.cat([backend.wy_factor(V).flatten() for V in Vs]))
    assert vm.launches[-1].kernel == seen.kernel == stated.kernel


def test_a_launch_has_an_end_of_layers(vm):
    V = torch.randn(20, 3)
    Ts = backend.factor_many([V] * 65)
    assert [launch.grid[0] for launch in vm.launches] == [64, 1] and all(torch.equal(T, Ts[0]) for T in Ts)


def test_rows_with_a_stride_are_read_in_place(vm):
    """Every second row of a wider tensor, 8 columns in: what a slice of a batch looks like."""
    x, V, T, _ = arguments("rotate", torch.bfloat16, 20, 48, 16, 4)
    wide = torch.full((40, 64), torch.nan, dtype=torch.bfloat16)
    wide[::2, 8:56] = x
    z, P = backend.rotate(wide[::2, 8:56], V, T, False)
    for launch in vm.launches:
        if "p_x" in launch.counts.tensors:
            assert launch.counts.tensors["p_x"].size > 2 * x.nbytes
    z2, P2 = backend.rotate(x, V, T, False)
    assert torch.equal(z, z2) and torch.equal(P, P2)


def test_more_reflections_than_it_holds_are_left_to_the_next_backend(vm):
    V = torch.randn(140, 129)
    assert backend.supports("wy_factor", V) == (False, "serves up to 128 reflections; this call has 129")
    with dispatch.use_backend("triton"), pytest.raises(RuntimeError, match="serves up to 128 reflections"):
        torch.ops.peftkern.wy_factor(V)


def test_it_serves_no_tensor_of_another_device(vm, monkeypatch):
    monkeypatch.setattr(_triton, "SIMULATED", False)
    monkeypatch.setattr(_triton, "_device_types", lambda: ["cuda"])
    assert backend.supports("wy_factor", torch.randn(4, 2)) == (False, "serves cuda and xpu tensors; got one on cpu")
