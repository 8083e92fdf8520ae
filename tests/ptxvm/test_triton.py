"""Triton kernels run their own compiled code on CPU tensors: right values, in any order, and planted bugs caught."""

import re

import pytest
import torch

from . import (
    AsyncHazard,
    Misaligned,
    OutOfBounds,
    Race,
    Refused,
    Uninitialised,
    same_in_any_order,
    triton_on_cpu,
)

NEEDS = ("needs_triton",)
triton = pytest.importorskip("triton", reason="Triton is not installed")
tl = triton.language


@pytest.fixture(autouse=True)
def vm():
    with triton_on_cpu(arch=80) as machine:
        yield machine


@triton.jit
def softmax_kernel(p_x, p_y, n, BLOCK: tl.constexpr):
    i, o = tl.program_id(0), tl.arange(0, BLOCK)
    b_x = tl.load(p_x + i * n + o, mask=o < n, other=-float("inf")).to(tl.float32)
    b_e = tl.exp(b_x - tl.max(b_x, 0))
    tl.store(p_y + i * n + o, (b_e / tl.sum(b_e, 0)).to(p_y.dtype.element_ty), mask=o < n)


@pytest.mark.parametrize("dtype, ulp", [(torch.float32, 2**-20), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_softmax(vm, dtype, ulp):
    x = torch.randn(5, 300).to(dtype)

    def run(**options):
        vm.set(**options)
        y = torch.empty_like(x)
        softmax_kernel[(5,)](x, y, 300, 512, num_warps=4)
        return y

    torch.testing.assert_close(same_in_any_order(run).double(), x.double().softmax(-1), rtol=ulp, atol=1e-7)
    traffic = vm.launches[-1].counts.tensors
    assert traffic["p_x"].read == traffic["p_y"].written == x.numel() * x.element_size()
    assert traffic["p_x"].unique_read == -(-x.numel() * x.element_size() // 32) * 32


@triton.jit
def matmul_kernel(
    p_a, p_b, p_c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr
):
    i_m, i_n = tl.program_id(0), tl.program_id(1)
    o_m, o_n, o_k = i_m * BM + tl.arange(0, BM), i_n * BN + tl.arange(0, BN), tl.arange(0, BK)
    b_c = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(0, K, BK):
        m_k = k + o_k < K
        b_a = tl.load(p_a + o_m[:, None] * K + (k + o_k)[None, :], mask=(o_m[:, None] < M) & m_k[None, :], other=0.0)
        b_b = tl.load(p_b + (k + o_k)[:, None] * N + o_n[None, :], mask=m_k[:, None] & (o_n[None, :] < N), other=0.0)
        b_c = tl.dot(b_a, b_b, b_c, input_precision=PRECISION)
    mask = (o_m[:, None] < M) & (o_n[None, :] < N)
    tl.store(p_c + o_m[:, None] * N + o_n[None, :], b_c.to(p_c.dtype.element_ty), mask=mask)


@pytest.mark.parametrize("m, n, k", [(128, 64, 96), (100, 90, 70)])
@pytest.mark.parametrize(
    "dtype, precision, kind, tolerance",
    [
        (torch.bfloat16, "tf32", "tensor_bf16", 2**-8),
        (torch.float16, "tf32", "tensor_fp16", 2**-10),
        (torch.float32, "tf32", "tensor_tf32", 2**-8),
        (torch.float32, "tf32x3", "tensor_tf32", 2**-18),
        (torch.float32, "ieee", "fp32", 2**-18),
    ],
)
def test_matmul(vm, m, n, k, dtype, precision, kind, tolerance):
    a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)

    def run(**options):
        vm.set(**options)
        c = torch.empty(m, n, dtype=dtype)
        grid = (triton.cdiv(m, 64), triton.cdiv(n, 64))
        matmul_kernel[grid](a, b, c, m, n, k, 64, 64, 32, precision, num_warps=4, num_stages=3)
        return c

    c = same_in_any_order(run, seeds=(0, 1))
    vm.set(late_copies=False)
    assert torch.equal(run(), c)
    error = (c.double() - a.double() @ b.double()).abs().max()
    assert error < tolerance * 4 * k**0.5
    counts = vm.launches[-1].counts
    products = 3 if precision == "tf32x3" else 1
    padded = triton.cdiv(m, 64) * 64 * triton.cdiv(n, 64) * 64 * triton.cdiv(k, 32) * 32
    assert counts.flops[kind] >= 2 * padded * products


@triton.jit
def scan_kernel(p_x, p_sum, p_cumsum, p_argmax, p_sort, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    b_x = tl.load(p_x + o)
    tl.store(p_sum, tl.sum(b_x, 0))
    tl.store(p_cumsum + o, tl.cumsum(b_x, 0))
    tl.store(p_argmax, tl.argmax(b_x, 0))
    tl.store(p_sort + o, tl.sort(b_x))


def test_reductions_scans_and_sort(vm):
    x = torch.randn(256)
    total, cumulated, where, ordered = torch.empty(1), torch.empty(256), torch.empty(1, dtype=torch.int32), x.clone()
    scan_kernel[(1,)](x, total, cumulated, where, ordered, 256)
    torch.testing.assert_close(total[0], x.sum())
    torch.testing.assert_close(cumulated, x.cumsum(0), rtol=1e-5, atol=1e-5)
    assert where.item() == x.argmax() and torch.equal(ordered, x.sort().values)


@triton.jit
def axes_kernel(p_x, p_rows, p_columns, p_t, M: tl.constexpr, N: tl.constexpr):
    o_m, o_n = tl.arange(0, M), tl.arange(0, N)
    b_x = tl.load(p_x + o_m[:, None] * N + o_n[None, :])
    tl.store(p_rows + o_m, tl.sum(b_x.to(tl.float32), 1))
    tl.store(p_columns + o_n, tl.max(b_x, 0))
    tl.store(p_t + o_n[:, None] * M + o_m[None, :], tl.trans(b_x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reductions_along_either_axis_and_a_transposition(vm, dtype):
    x = torch.randn(32, 64).to(dtype)
    rows, columns, t = torch.empty(32), torch.empty(64, dtype=dtype), torch.empty(64, 32, dtype=dtype)
    axes_kernel[(1,)](x, rows, columns, t, 32, 64)
    torch.testing.assert_close(rows, x.float().sum(1), rtol=1e-5, atol=1e-5)
    assert torch.equal(columns, x.amax(0)) and torch.equal(t, x.T)


@triton.jit
def scatter_kernel(p_index, p_x, p_out, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_i = tl.load(p_index + o, mask=o < n, other=0)
    tl.atomic_add(p_out + b_i, tl.load(p_x + o, mask=o < n), mask=o < n)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("seed", [0, 3])
def test_atomics(vm, dtype, seed):
    vm.set(seed=seed)
    index, x, out = torch.randint(0, 7, (200,)), torch.randint(-4, 5, (200,)).to(dtype), torch.zeros(7, dtype=dtype)
    scatter_kernel[(4,)](index, x, out, 200, 64)
    assert torch.equal(out.double(), torch.zeros(7).double().index_add_(0, index, x.double()))  # small integers: exact


@triton.jit
def gather_kernel(p_index, p_x, p_y, K, BLOCK: tl.constexpr):
    i, o = tl.program_id(0), tl.arange(0, BLOCK)
    row = tl.load(p_index + i)
    tl.store(p_y + i * K + o, tl.load(p_x + row * K + o, mask=o < K), mask=o < K)


def test_gather_of_rows_reads_only_those(vm):
    x, index = torch.randn(50, 48), torch.tensor([3, 49, 3])
    y = torch.empty(3, 48)
    gather_kernel[(3,)](index, x, y, 48, 64)
    assert torch.equal(y, x[index])
    assert vm.launches[-1].counts.tensors["p_x"].unique_read == 2 * 48 * 4


@triton.jit
def elementwise_kernel(p_x, p_y, n, scale, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(p_x + o, mask=o < n)
    b_y = tl.where(b_x > 0, tl.sqrt(b_x) * scale, tl.sin(b_x)) + tl.exp2(-tl.abs(b_x)) + tl.math.erf(b_x)
    tl.store(p_y + o, b_y, mask=o < n)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_elementwise_functions(vm, dtype, tolerance):
    x = torch.randn(300, dtype=dtype)
    y = torch.empty_like(x)
    elementwise_kernel[(3,)](x, y, 300, 1.5, 128)
    want = torch.where(x > 0, x.abs().sqrt() * 1.5, x.sin()) + torch.exp2(-x.abs()) + torch.erf(x)
    torch.testing.assert_close(y, want, rtol=tolerance, atol=tolerance)


@triton.jit
def casts_kernel(p_x, p_b, p_h, p_i, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    b_x = tl.load(p_x + o)
    tl.store(p_b + o, b_x.to(tl.bfloat16))
    tl.store(p_h + o, b_x.to(tl.float16))
    tl.store(p_i + o, b_x.to(tl.int8))


def test_casts_are_those_of_torch(vm):
    x = torch.cat([torch.randn(124) * 30, torch.tensor([0.0, 1 + 2**-8, 1 + 3 * 2**-8, -1e-6])])
    b, h, i = (torch.empty(128, dtype=t) for t in (torch.bfloat16, torch.float16, torch.int8))
    casts_kernel[(1,)](x, b, h, i, 128)
    assert torch.equal(b, x.bfloat16()) and torch.equal(h, x.half()) and torch.equal(i, x.to(torch.int8))


@triton.jit
def while_kernel(p_x, p_y, n):
    i = tl.program_id(0)
    x, steps = tl.load(p_x + i), 0
    while x > 1:
        x = tl.where(x % 2 == 0, x // 2, 3 * x + 1)
        steps += 1
    tl.store(p_y + i, steps)


def test_data_dependent_loops(vm):
    y = torch.empty(10, dtype=torch.int32)
    while_kernel[(10,)](torch.arange(1, 11, dtype=torch.int32), y, 10)
    assert y.tolist() == [0, 1, 7, 2, 5, 8, 16, 3, 19, 6]


def test_grids_by_function_defaults_and_autotune(vm):
    @triton.autotune(configs=[triton.Config({"BLOCK": 64}), triton.Config({"BLOCK": 128})], key=["n"])
    @triton.jit
    def double_kernel(p_x, p_y, n, p_none=None, BLOCK: tl.constexpr = 32):
        o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(p_y + o, 2 * tl.load(p_x + o, mask=o < n), mask=o < n)

    x, y = torch.randn(200), torch.zeros(200)
    double_kernel[lambda meta: (triton.cdiv(200, meta["BLOCK"]),)](x, y, 200)
    assert torch.equal(y, 2 * x)
    assert {launch.grid[0] for launch in vm.launches} == {4, 2}


# Planted bugs


@triton.jit
def copy_kernel(p_x, p_y, n, SHIFT: tl.constexpr, MASKED: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = o < n
    b_x = tl.load(p_x + o * STRIDE + SHIFT, mask=m)
    if MASKED:
        tl.store(p_y + o, b_x, mask=m)
    else:
        tl.store(p_y + o, b_x)


def test_a_missing_mask_and_an_off_by_one_are_caught(vm):
    x, y = torch.randn(200), torch.empty(200)
    copy_kernel[(2,)](x, y, 200, 0, True, 1, 128)
    assert torch.equal(x, y)
    with pytest.raises(OutOfBounds, match=r"(?s)write of \d+ bytes at byte 800 of p_y with its 800.*test_triton.py:"):
        copy_kernel[(2,)](x, y, 200, 0, False, 1, 128)
    with pytest.raises(OutOfBounds, match=r"read of 4 bytes at byte 800 of p_x"):
        copy_kernel[(2,)](x, y, 200, 1, True, 1, 128)


def test_a_wrong_promise_of_alignment_is_caught(vm):
    x, y = torch.randn(257), torch.empty(256)
    kernel = copy_kernel.warmup(x, y, 256, 0, True, 1, 256, grid=(1,))  # compiled for pointers aligned to 16 bytes
    with pytest.raises(Misaligned, match="aligned to"):
        vm.launch(kernel, {"p_x": x[1:], "p_y": y, "n": 256}, (1, 1, 1))


def test_uncoalesced_access_shows_in_the_counts(vm):
    x, y = torch.randn(32, 128), torch.empty(128)
    copy_kernel[(1,)](x, y, 128, 0, True, 32, 128)
    (line,) = vm.launches[-1].counts.lines("sectors")
    assert line.text.split()[1].startswith("ld.global") and line.sectors == 8 * line.ideal_sectors
    assert line.source[0].endswith("test_triton.py")


@triton.jit
def sum_kernel(p_x, p_y, n, SAFE: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    s = tl.sum(tl.load(p_x + o, mask=o < n, other=0.0), 0)
    if SAFE:
        tl.atomic_add(p_y, s)
    else:
        tl.store(p_y, tl.load(p_y) + s)


def test_a_race_between_programs_is_caught(vm):
    x, y = torch.ones(256), torch.zeros(1)
    sum_kernel[(2,)](x, y, 256, True, 128)
    assert y.item() == 256
    with pytest.raises(Race, match=r"of p_y is not ordered after the (read|write) by block"):
        sum_kernel[(2,)](x, y, 256, False, 128)


def without_each_barrier(vm, kernel, bound, grid):
    """What a launch reports (or None) with each one of the block barriers taken out of the compiled code, apart from
    one before which shared memory has only been named as the destination of copies."""
    lines, whole, touched = kernel.asm["ptx"].split("\n"), kernel.asm, False
    for k, line in enumerate(lines):
        touched |= bool(re.search(r"\b(ld|st|atom)\S*\.shared|ldmatrix|wait_group", line))
        if "bar.sync" not in line or not touched:
            continue
        kernel.asm = {"ptx": "\n".join([*lines[:k], "", *lines[k + 1 :]])}
        found = None
        for seed in (0, 1):
            vm.set(seed=seed)
            try:
                vm.launch(kernel, bound, grid)
            except (Race, AsyncHazard, Uninitialised) as error:
                found = type(error).__name__
                break
        yield k + 1, found
    kernel.asm = whole


def test_every_barrier_that_is_taken_out_of_compiled_code_is_missed(vm):
    a, b, c = (
        torch.randn(128, 96).bfloat16(),
        torch.randn(96, 64).bfloat16(),
        torch.empty(128, 64, dtype=torch.bfloat16),
    )
    matmul = matmul_kernel[(2, 1)](a, b, c, 128, 64, 96, 64, 64, 32, "tf32", num_warps=4, num_stages=3)
    # Of many magnitudes, so that sums in different orders differ: to store what is there already is no race.
    x, y = torch.randn(256) * 10 ** torch.randn(256), torch.empty(256)
    softmax = softmax_kernel[(1,)](x, y, 256, 256)
    total, where = torch.empty(1), torch.empty(1, dtype=torch.int32)
    scan = scan_kernel[(1,)](x, total, y, where, torch.empty(256), 256)
    cases = [
        (matmul, {"p_a": a, "p_b": b, "p_c": c, "M": 128, "N": 64, "K": 96}, (2, 1, 1)),
        (softmax, {"p_x": x, "p_y": y, "n": 256}, (1, 1, 1)),
        (scan, {"p_x": x, "p_sum": total, "p_cumsum": y, "p_argmax": where, "p_sort": torch.empty(256)}, (1, 1, 1)),
    ]
    found = [(k.metadata.name, *f) for k, bound, grid in cases for f in without_each_barrier(vm, k, bound, grid)]
    assert len(found) > 20
    # Triton 3.9 also has one that orders nothing: its pipelined loop begins with the wait and the barrier that the code
    # before it and its own body have just passed, and nothing is copied or stored in between.
    missed = [(name, line) for name, line, error in found if error is None]
    redundant = 1 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9) else 0
    assert len(missed) <= redundant, missed
    code = matmul.asm["ptx"].split("\n")
    for name, line in missed:
        begin = max(k for k in range(line) if re.match(r"\$L\w+:", code[k]))
        since = [text for text in code[begin : line - 1] if re.search(r"cp\.async|\bst\.|bar\.", text)]
        assert name == "matmul_kernel" and [text.split()[0] for text in since] == ["cp.async.wait_group"], since


def test_code_for_newer_tensor_cores_is_refused_by_name():
    a = torch.randn(128, 64).bfloat16()
    with triton_on_cpu(arch=90), pytest.raises(Refused, match=r"wgmma.mma_async.sync.aligned"):
        matmul_kernel[(1, 1)](a, a.T.contiguous(), torch.empty(128, 128), 128, 128, 64, 128, 128, 64, "tf32")


def test_code_for_sm_90_without_those_runs():
    x, y = torch.randn(5, 300), torch.empty(5, 300)
    with triton_on_cpu(arch=90):
        softmax_kernel[(5,)](x, y, 300, 512)
    torch.testing.assert_close(y, x.softmax(-1))


def test_outside_the_context_triton_is_as_before(vm):
    from triton.runtime.jit import JITFunction

    inside = JITFunction.run
    with triton_on_cpu(seed=1) as inner:
        assert inner.options.seed == 1 and JITFunction.run is not inside
    assert JITFunction.run is inside
