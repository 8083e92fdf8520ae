"""The Triton kernels on the PTX machine: they move what costs.py says, and the order of threads changes nothing."""

import devices
import ptxvm
import pytest
import torch
import triton_launches
from device_problem import SHAPES, assert_counts_are_the_formulas, run
from ptxvm import build

import peftkern
from peftkern.ops import _triton

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler (g++ or $CXX)"),
    pytest.mark.skipif(devices.INTERPRETED, reason="the interpreter compiles nothing"),
]


@pytest.fixture
def on_machine(monkeypatch):
    monkeypatch.setattr(_triton, "SIMULATED", True)

    def call(*problem, **options):
        with peftkern.use_backend("triton"), ptxvm.triton_on_cpu(arch=80, **options) as machine:
            return run(*problem), machine.launches

    return call


@pytest.mark.parametrize("K, r", SHAPES)
def test_bytes_and_flops_are_those_of_the_formulas(on_machine, K, r):
    assert_counts_are_the_formulas(on_machine(K, r)[1], "triton", K, r)


@pytest.mark.parametrize("problem", ((75, 11), (50, 33, torch.float64), (70, 9, torch.float32, True)), ids=str)
def test_any_order_of_threads_gives_the_same_bits(on_machine, problem):
    ptxvm.same_in_any_order(
        lambda **options: torch.cat([t.double().flatten() for t in on_machine(*problem, **options)[0]])
    )


def test_the_second_time_writes_only_where_once_is_not_enough(on_machine):
    K, r = 70, 9
    for long in (False, True):
        launches = on_machine(K, r, torch.float32, long)[1]
        assert [launch.counts.global_bytes_written > 0 for launch in launches[3:6]] == [long] * 3
        assert launches[5].counts.global_bytes_written == long * (4 * K * r + 8 * r * r)


@pytest.mark.parametrize("K, r", SHAPES)
def test_no_kernel_meets_a_bank_conflict(on_machine, K, r):
    triton_launches.no_bank_conflicts(on_machine(K, r)[1], old=("factor_kernel", "core_gradient_kernel"))
