"""Kernels compiled by nvcc give right results, in any order of threads, and the counts that their formulas predict."""

from functools import cache
from pathlib import Path

import pytest
import torch

from . import CudaLibrary, Refused, Trap, same_in_any_order

NEEDS = ("needs_nvcc",)
KERNELS = Path(__file__).with_name("kernels")


@cache
def library():
    return CudaLibrary(KERNELS / "linear.cu")


def test_tiled_fp32_product_with_ragged_edges():
    m, n, k = 50, 37, 29
    a, b = torch.randn(m, k), torch.randn(k, n)

    def run(**options):
        c = torch.empty(m, n)
        library()["sgemm"]((3, 4), (16, 16), [a, b, c, m, n, k], **options)
        return c

    torch.testing.assert_close(same_in_any_order(run), a @ b)
    counts = library().launches[-1].counts
    blocks, rounds = 12, 2
    assert counts.flops["fp32"] == 2 * blocks * 256 * rounds * 16
    assert counts.barriers == 2 * blocks * rounds
    assert counts.global_bytes_written == 4 * m * n
    assert counts.global_bytes_read == 4 * (3 * m * k + 4 * k * n)
    assert counts.tensors["argument 0"].unique_read == -(-4 * m * k // 32) * 32
    assert counts.bank_conflicts == 0


@pytest.mark.parametrize("n", [1000, 33])
def test_softmax_with_shuffles(n):
    x = torch.randn(5, n).bfloat16()

    def run(**options):
        y = torch.empty_like(x)
        library()["softmax"](5, 128, [x, y, n], **options)
        return y

    y = same_in_any_order(run)
    torch.testing.assert_close(y.double(), x.double().softmax(-1), rtol=2**-8, atol=1e-9)
    assert library().launches[-1].counts.barriers == 3 * 5


@pytest.mark.parametrize("late", [True, False])
def test_bf16_product_on_tensor_cores_with_asynchronous_copies(late):
    m, n, k = 128, 64, 192
    a, b = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16()
    shared = 2 * 2 * 64 * 72 * 2

    def run(**options):
        c = torch.empty(m, n, dtype=torch.bfloat16)
        library()["hgemm"]((2, 1), 128, [a, b, c, m, n, k], shared=shared, **options)
        return c

    torch.testing.assert_close(
        same_in_any_order(run, late_copies=late).double(), a.double() @ b.double().T, rtol=2**-8, atol=1e-4
    )
    counts = library().launches[-1].counts
    assert counts.flops["tensor_bf16"] == 2 * m * n * k
    assert counts.bank_conflicts == 0
    # The epilogue writes 16 bytes per row and warp: half a sector.
    assert {(x.text.split()[0], x.sectors / x.ideal_sectors) for x in counts.lines("sectors")} == {("st.global.u32", 2)}
    assert counts.global_bytes_read == 2 * (m * k + 2 * n * k)


@pytest.mark.parametrize("mode", range(6))
def test_structs_constants_calls_tables_and_local_arrays(mode):
    import struct

    x = torch.rand(40, dtype=torch.float64)
    out = torch.full((40,), torch.nan)
    packed = struct.pack("<Qif", out.data_ptr(), 40, 1.5)
    library()["mixed"](2, 32, [packed, x, mode], also=[out])
    v, i = (x.sqrt().float() * 1.5).double(), torch.arange(40)
    want = [
        v + (i % 4 + 1),
        sum((v * k).sin() for k in range(5)),
        v % 0.75,
        v.exp() / 3,
        (i * 1103515245 % 1000).double(),
        v * (i * 5 % 8),
    ][mode]
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)


def test_a_launch_outside_the_limits_of_the_device_is_refused():
    x = torch.zeros(4)
    with pytest.raises(Trap, match="outside the device's limits"):
        library()["sgemm"](1, 2048, [x, x, x, 1, 1, 1])
    with pytest.raises(Trap, match="compiled for 128 at most"):
        library()["hgemm"](1, 256, [x, x, x, 64, 64, 64])
    with pytest.raises(Trap, match="bytes of shared memory"):
        library()["sgemm"](1, 32, [x, x, x, 1, 1, 1], shared=200 * 1024)


def test_arguments_are_checked():
    x = torch.zeros(4)
    with pytest.raises(TypeError, match="takes 6 arguments, 2 given"):
        library()["sgemm"](1, 32, [x, x])
    with pytest.raises(TypeError, match="argument 3 is a tensor"):
        library()["sgemm"](1, 32, [x, x, x, x, 1, 1])
    with pytest.raises(KeyError, match=r"no single kernel 'gemm'; there are: .*hgemm, mixed"):
        library()["gemm"]


def test_templates_are_found_by_their_names():
    lib = CudaLibrary("\ntemplate <int N> __global__ void fill(int* y) { y[threadIdx.x] = N; }\n"
                      "template __global__ void fill<3>(int*);\ntemplate __global__ void fill<4>(int*);\n")  # fmt: skip
    y = torch.zeros(32, dtype=torch.int32)
    lib["fill<4>"](1, 32, [y])
    assert y.tolist() == [4] * 32
    with pytest.raises(KeyError):
        lib["fill"]


def test_refusal_names_what_a_kernel_uses():
    lib = CudaLibrary('\n#include <cstdio>\n__global__ void say(int* y) { printf("%d", y[0]); }\n')
    with pytest.raises(Refused, match="vprintf"):
        lib["say"]
