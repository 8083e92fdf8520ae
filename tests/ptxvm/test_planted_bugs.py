"""Kernels in pairs: the right one passes, its twin with one planted bug is caught and named."""

from functools import cache
from pathlib import Path

import pytest
import torch

from . import (
    AsyncHazard,
    CudaLibrary,
    Deadlock,
    Divergence,
    Limit,
    Misaligned,
    OutOfBounds,
    PtxError,
    Race,
    Uninitialised,
)

NEEDS = ("needs_nvcc",)
KERNELS = Path(__file__).with_name("kernels")


@cache
def library():
    return CudaLibrary(KERNELS / "planted.cu")


def launch(name, ok, grid, block, args, **options):
    return library()[f"{name}<{str(ok).lower()}>"](grid, block, args, **options)


def floats(n):
    return torch.arange(float(n))


def ints(n, value=0):
    return torch.full((n,), value, dtype=torch.int32)


# name, grid, block, arguments, what the bug must raise, words of its message, options of the launch
CAUGHT = [
    ("reverse", 1, 128, lambda: [floats(128), floats(128)], Race, "shared write", {"uninitialised": False}),
    ("reverse", 1, 128, lambda: [floats(128), floats(128)], Uninitialised, "nobody has written", {}),
    ("rounds", 1, 128, lambda: [floats(512), floats(128)], Race, "shared read", {}),
    ("neighbour", 1, 32, lambda: [floats(32)], Race, "shared read", {}),
    ("differences", 2, 64, lambda: [floats(100), floats(100), 100], OutOfBounds, "at byte 400 of argument 0", {}),
    ("twice", 2, 64, lambda: [floats(100), floats(100), 100], OutOfBounds, "global write of 4 bytes at byte 400", {}),
    ("beyond_shared", 1, 64, lambda: [floats(64)], OutOfBounds, "shared access of 4 bytes at offset 256 of 256", {}),
    ("histogram", 1, 128, lambda: [ints(128), ints(8)], Race, "shared", {}),
    ("slots", 4, 32, lambda: [ints(4, -1)], Race, "global write", {}),
    ("wide", 1, 32, lambda: [floats(129), floats(32)], Misaligned, "aligned to 16", {}),
    ("last_block", 4, 64, lambda: [floats(256), floats(4), ints(1), floats(1)], Race, "global read", {}),
    ("divergent_barrier", 1, 64, lambda: [floats(64)], Deadlock, "lanes 0-15 waits at the barrier", {}),
    ("early_exit", 1, 64, lambda: [floats(64)], Deadlock, "thread (32,0,0) has exited", {}),
    ("warp_sum", 1, 32, lambda: [floats(32)], Divergence, "reads lane 16, which takes no part", {}),
]  # fmt: skip


@pytest.mark.parametrize(
    "name, grid, block, args, error, words, options", CAUGHT, ids=[f"{c[0]}-{c[4].__name__}" for c in CAUGHT]
)
def test_a_planted_bug_is_caught_and_its_twin_passes(name, grid, block, args, error, words, options):
    for seed in (0, 1, 2):
        launch(name, True, grid, block, args(), seed=seed, **options)
        with pytest.raises(PtxError) as caught:
            launch(name, False, grid, block, args(), seed=seed, **options)
        assert type(caught.value) in (error, Uninitialised if error is Race else error), caught.value
        message = str(caught.value)
        assert "block (" in message and "thread (" in message and "planted.cu:" in message
        if seed == 0:
            assert type(caught.value) is error and words in message, message


def test_a_race_names_both_accesses():
    with pytest.raises(Race, match=r"(?s)thread \(\d+, 0, 0\): shared read.*the write by.*at line.*the other is line"):
        launch("rounds", False, 1, 128, [floats(512), floats(128)])


@pytest.mark.parametrize("late", [True, False])
def test_a_pipeline_of_asynchronous_copies_is_right_at_either_moment(late):
    x, y = torch.randn(512), torch.empty(128)
    for seed in (0, 1):
        library()["pipeline<0>"](1, 128, [x, y], late_copies=late, seed=seed)
        torch.testing.assert_close(y, x.view(4, 128).roll(-37, 1).cumsum(0)[-1])


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize(
    "bug, error", [(1, AsyncHazard), (2, (Race, AsyncHazard, Uninitialised)), (3, (Race, AsyncHazard))]
)
def test_a_bug_in_a_pipeline_is_caught_at_either_moment(bug, error, late):
    for seed in (0, 1):
        with pytest.raises(error):
            library()[f"pipeline<{bug}>"](1, 128, [torch.randn(512), torch.empty(128)], late_copies=late, seed=seed)


def test_a_wait_for_too_few_groups_shows_in_values_only_when_copies_are_late():
    x, results = torch.randn(512), {}
    for late in (True, False):
        y = results[late] = torch.empty(128)
        library()["pipeline<1>"](1, 128, [x, y], late_copies=late, races=False, uninitialised=False)
    want = x.view(4, 128).roll(-37, 1).cumsum(0)[-1]
    torch.testing.assert_close(results[False], want)
    assert not torch.allclose(results[True], want)


def test_uncoalesced_access_shows_in_the_counts():
    x, y = torch.randn(32, 32), torch.empty(32, 32)
    good = launch("transpose", True, 1, (32, 32), [x, y]).counts
    assert torch.equal(y, x.T) and good.uncoalesced == 1 and not good.lines("sectors")
    bad = launch("transpose", False, 1, (32, 32), [x, y]).counts
    assert torch.equal(y, x.T) and bad.uncoalesced > 4
    (line,) = bad.lines("sectors")
    assert line.text.startswith("ld.global") and line.sectors == 8 * line.ideal_sectors == 32 * 32


def test_bank_conflicts_show_in_the_counts():
    x, y = torch.randn(32, 32), torch.empty(32, 32)
    assert launch("banks", True, 1, (32, 32), [x, y]).counts.bank_conflicts == 0
    bad = launch("banks", False, 1, (32, 32), [x, y]).counts
    (line,) = bad.lines("conflicts")
    assert bad.bank_conflicts == line.extra_wavefronts == 32 * 31 and line.text.startswith("ld.shared")


def test_a_block_that_waits_for_another_runs_when_both_are_resident():
    y = ints(2)
    with pytest.raises(Limit, match="resident"):
        library()["waits"](2, 1, [ints(1), y], max_ops=100_000)
    library()["waits"](2, 1, [ints(1), y], resident=2)
    assert y.tolist() == [7, 7]


def test_only_the_view_that_was_passed_is_in_bounds():
    storage = torch.zeros(200)
    with pytest.raises(OutOfBounds):
        launch("twice", True, 2, 64, [storage[:50], storage[100:], 100])
    launch("twice", True, 2, 64, [storage[:100], storage[100:], 100])


def barriers(library, kernel):
    return [i.line for i in library.module.functions[kernel].body if getattr(i, "opcode", None) == "bar"]


@pytest.mark.parametrize("kernel", ["sgemm", "softmax", "hgemm"])
def test_every_barrier_that_is_taken_out_of_compiled_code_is_missed(kernel):
    whole = CudaLibrary(KERNELS / "linear.cu")
    a, b, c = torch.randn(128, 192).bfloat16(), torch.randn(64, 192).bfloat16(), torch.empty(128, 64).bfloat16()
    launches = {
        "sgemm": ((3, 4), (16, 16), [torch.randn(50, 40), torch.randn(40, 37), torch.empty(50, 37), 50, 37, 40], 0),
        "softmax": (2, 128, [torch.randn(2, 1000).bfloat16(), torch.empty(2, 1000).bfloat16(), 1000], 0),
        "hgemm": ((2, 1), 128, [a, b, c, 128, 64, 192], 36864),
    }
    grid, block, args, shared = launches[kernel]
    whole[kernel](grid, block, args, shared)
    lines = whole.ptx.split("\n")
    for line in barriers(whole, kernel):
        broken = CudaLibrary("\n".join([*lines[: line - 1], "", *lines[line:]]))
        for seed in (0, 1):
            with pytest.raises((Race, AsyncHazard, Uninitialised)):
                broken[kernel](grid, block, args, shared, seed=seed)
