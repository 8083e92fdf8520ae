"""What the interpreter must get right and what it must catch; run in a process with TRITON_INTERPRET=1.

The name keeps pytest from collecting it elsewhere: test_interpreted.py starts that process.
"""

import re

import pytest
import torch
import triton
import triton.language as tl

from interpreted import interpreted

HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def interpreter():
    with interpreted():
        yield


@triton.jit
def arithmetic(x, y, z, n, WHAT: tl.constexpr, B: tl.constexpr):
    o = tl.program_id(0) * B + tl.arange(0, B)
    a, b = tl.load(x + o, o < n), tl.load(y + o, o < n)
    if WHAT == "add":
        c = a + b
    elif WHAT == "multiply":
        c = a * b
    elif WHAT == "divide":
        c = (a.to(tl.float32) / b.to(tl.float32)).to(a.dtype)
    elif WHAT == "negate":
        c = -a
    elif WHAT == "larger":
        c = tl.where(a > b, a, b)
    elif WHAT == "maximum":
        c = tl.maximum(a, b)
    elif WHAT == "absolute":
        c = tl.abs(a)
    elif WHAT == "root":
        c = tl.sqrt(tl.abs(a.to(tl.float32))).to(a.dtype)
    elif WHAT == "half":
        c = a * 0.5
    elif WHAT == "plus one":
        c = a + 1
    tl.store(z + o, c, o < n)


WANTED = {
    "add": lambda a, b: a + b,
    "multiply": lambda a, b: a * b,
    "divide": lambda a, b: (a.float() / b.float()).to(a.dtype),
    "negate": lambda a, b: -a,
    "larger": torch.maximum,
    "maximum": torch.maximum,
    "absolute": lambda a, b: a.abs(),
    "root": lambda a, b: a.float().abs().sqrt().to(a.dtype),
    "half": lambda a, b: a * 0.5,
    "plus one": lambda a, b: a + 1,
}


@pytest.mark.parametrize("what", WANTED)
@pytest.mark.parametrize("dtype", (*HALF, torch.float32, torch.float64))
def test_arithmetic_is_that_of_torch(dtype, what):
    x, y = torch.randn(2, 100).to(dtype)
    z = torch.empty_like(x)
    arithmetic[(4,)](x, y, z, 100, what, 32)
    assert torch.equal(z, WANTED[what](x, y))


@triton.jit
def convert(x, y, B: tl.constexpr):
    o = tl.arange(0, B)
    tl.store(y + o, tl.load(x + o).to(y.dtype.element_ty))


@pytest.mark.parametrize("target", (*HALF, torch.float32, torch.float64, torch.int32))
@pytest.mark.parametrize("source", (*HALF, torch.float32, torch.float64, torch.int32))
def test_conversions_round_to_nearest_even(source, target):
    x = (torch.randn(64) * 300).to(source)
    if source is torch.float32:
        x[:4] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, torch.inf, torch.nan])
    if not target.is_floating_point:
        x = x.nan_to_num(0, 7, -7)
    y = torch.empty(64, dtype=target)
    convert[(1,)](x, y, 64)
    assert torch.equal(y.nan_to_num(77), x.to(target).nan_to_num(77))


@triton.jit
def product(x, y, z, M, K, N, B: tl.constexpr):
    i, k, j = tl.program_id(0) * B + tl.arange(0, B), tl.arange(0, B), tl.arange(0, B)
    acc = tl.zeros((B, B), z.dtype.element_ty)
    for start in range(0, K, B):
        k = start + tl.arange(0, B)
        a = tl.load(x + i[:, None] * K + k[None, :], (i[:, None] < M) & (k[None, :] < K), 0.0)
        b = tl.load(y + k[:, None] * N + j[None, :], (k[:, None] < K) & (j[None, :] < N), 0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee", out_dtype=z.dtype.element_ty)
    tl.store(z + i[:, None] * N + j[None, :], acc, (i[:, None] < M) & (j[None, :] < N))


@pytest.mark.parametrize("dtype", (*HALF, torch.float32, torch.float64))
def test_a_product_accumulates_exact_products(dtype):
    x, y = torch.randn(37, 50).to(dtype), torch.randn(50, 11).to(dtype)
    z = torch.empty(37, 11, dtype=torch.promote_types(dtype, torch.float32))
    product[(3,)](x, y, z, 37, 50, 11, 16)
    torch.testing.assert_close(z.double(), x.double() @ y.double(), rtol=1e-6, atol=1e-5)


@triton.jit
def reduce(x, total, largest, B: tl.constexpr):
    row = tl.load(x + tl.program_id(0) * B + tl.arange(0, B))
    tl.store(total + tl.program_id(0), tl.sum(row, 0))
    tl.store(largest + tl.program_id(0), tl.max(row, 0))


@pytest.mark.parametrize("dtype", (*HALF, torch.float32))
def test_reductions_of_rows(dtype):
    x = torch.randn(5, 64).to(dtype)
    total, largest = torch.empty(2, 5)
    reduce[(5,)](x, total, largest, 64)
    torch.testing.assert_close(total, x.float().sum(1), rtol=1e-2 if dtype in HALF else 1e-5, atol=1e-2)
    assert torch.equal(largest, x.float().amax(1))


@triton.jit
def loop(x, y, n, FLAG: tl.constexpr, B: tl.constexpr):
    acc = tl.zeros((B,), tl.float32)
    for i in tl.range(0, n):
        acc += tl.load(x + i * B + tl.arange(0, B))
    if FLAG:
        acc = tl.fma(acc, acc, acc)
    tl.store(y + tl.arange(0, B), acc)


@pytest.mark.parametrize("flag", (False, True))
def test_loops_over_runtime_numbers(flag):
    x, y = torch.randn(3, 8), torch.empty(8)
    loop[(1,)](x, y, 3, flag, 8)
    total = x.double().sum(0)
    torch.testing.assert_close(y.double(), total * total + total if flag else total, rtol=1e-5, atol=1e-5)


@triton.jit
def copy(x, y, n, MASKED: tl.constexpr, B: tl.constexpr):
    o = tl.program_id(0) * B + tl.arange(0, B)
    if MASKED:
        tl.store(y + o, tl.load(x + o, o < n), o < n)
    else:
        tl.store(y + o, tl.load(x + o))


def caught(kind, what):
    return pytest.raises(triton.runtime.errors.InterpreterError, match=rf"{kind}\(.*{re.escape(what)}.*interpreter_che")


def test_a_missing_mask_is_out_of_bounds():
    x, y = torch.randn(100), torch.empty(100)
    copy[(4,)](x, y, 100, True, 32)
    assert torch.equal(x, y)
    with caught("OutOfBounds", "copy: program (3, 0, 0) loads outside the tensors of the launch"):
        copy[(4,)](x, y, 100, False, 32)


def test_a_mask_that_is_one_too_wide_is_out_of_bounds():
    x, y = torch.randn(101), torch.randn(100)
    with caught("OutOfBounds", "copy: program (3, 0, 0) stores outside the tensors of the launch: 1 elements"):
        copy[(4,)](x, y, 101, True, 32)


def test_the_gap_between_strided_rows_is_out_of_bounds():
    """The bytes between the rows of a view belong to its storage, not to the view."""
    x, y = torch.randn(2, 64), torch.zeros(2, 100)[:, :64]
    with caught("OutOfBounds", "stores outside the tensors of the launch, within their storage"):
        copy[(2,)](x, y, 128, True, 64)


@triton.jit
def overlapping(x, y, n, B: tl.constexpr):
    o = tl.program_id(0) * (B - 1) + tl.arange(0, B)
    tl.store(y + o, tl.load(x + o, o < n), o < n)


def test_programs_that_store_one_element_are_a_race():
    x, y = torch.randn(2, 100)
    with caught("Race", "overlapping: program (1, 0, 0) stores what another program stores"):
        overlapping[(3,)](x, y, 100, 32)


@triton.jit
def accumulate(x, total, B: tl.constexpr):
    tl.store(total, tl.load(total) + tl.sum(tl.load(x + tl.program_id(0) * B + tl.arange(0, B)), 0))


def test_a_sum_over_programs_without_a_second_launch_is_a_race():
    with caught("Race", "accumulate: program (1, 0, 0) loads what another program stores"):
        accumulate[(4,)](torch.randn(128), torch.zeros(1), 32)
    accumulate[(1,)](torch.randn(128), torch.zeros(1), 32)


@triton.jit
def neighbours(x, B: tl.constexpr):
    o = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(x + o, tl.load(x + o + B) + 1)


def test_an_update_in_place_of_what_a_program_before_loads_is_a_race():
    with caught("Race", "neighbours: program (1, 0, 0) stores what another program loads"):
        neighbours[(3,)](torch.randn(128), 32)


@triton.jit
def same_place(y, B: tl.constexpr):
    tl.store(y + tl.arange(0, B) // 2, tl.arange(0, B).to(tl.float32))


def test_one_element_stored_twice_at_once_is_a_race():
    with caught("Race", "same_place: program (0, 0, 0) stores one element twice at once"):
        same_place[(1,)](torch.zeros(8), 8)


@triton.jit
def through_memory(x, y, BARRIER: tl.constexpr, B: tl.constexpr):
    o = tl.arange(0, B)
    tl.store(y + o, tl.load(x + o))
    if BARRIER:
        tl.debug_barrier()
    tl.store(x + o, tl.load(y + B - 1 - o))


def test_memory_read_back_needs_a_barrier():
    x, y = torch.randn(2, 32)
    wanted = x.flip(0)
    through_memory[(1,)](x, y, True, 32)
    assert torch.equal(x, wanted)
    with caught("Race", "through_memory: program (0, 0, 0) loads what it stored, with no tl.debug_barrier() between"):
        through_memory[(1,)](x, y, False, 32)


def test_views_of_one_storage_share_their_history():
    x = torch.randn(128)
    with caught("Race", "stores what another program loads"):
        copy[(2,)](x[32:96], x[:64], 64, True, 32)
    copy[(2,)](x[:64], x[64:], 64, True, 32)


@triton.jit
def count(x, B: tl.constexpr):
    tl.atomic_add(x + tl.arange(0, B), 1.0)


@triton.jit
def add_up(x, partial, out, counter, programs, BARRIER: tl.constexpr, WAIT: tl.constexpr, B: tl.constexpr):
    """out = the sum over programs of x [programs, B], by the program that arrives last."""
    i, o = tl.program_id(0), tl.arange(0, B)
    tl.store(partial + i * B + o, tl.load(x + i * B + o))
    if BARRIER:
        tl.debug_barrier()
    before = tl.atomic_add(counter, 1, sem="acq_rel")
    if before == (programs - 1 if WAIT else 0):
        total = tl.zeros((B,), tl.float32)
        for p in range(0, programs):
            total += tl.load(partial + p * B + o)
        tl.store(out + o, total)
        tl.store(counter, 0)


def test_the_last_program_to_arrive_sees_what_all_have_stored():
    x = torch.randn(5, 16)
    partial, out, counter = torch.empty(5, 16), torch.empty(16), torch.zeros(1, dtype=torch.int32)
    add_up[(5,)](x, partial, out, counter, 5, True, True, 16)
    assert torch.allclose(out, x.sum(0)) and not counter.any()
    with caught("Race", "counts itself after a store, with no tl.debug_barrier() between"):
        add_up[(5,)](x, partial, out, counter, 5, False, True, 16)
    with caught("Race", "stores what another program loads"):
        add_up[(5,)](x, partial, out, counter.zero_(), 5, True, False, 16)


def test_atomics_are_refused():
    with pytest.raises(triton.runtime.errors.InterpreterError, match="no atomic operation is interpreted"):
        count[(1,)](torch.zeros(8), 8)
