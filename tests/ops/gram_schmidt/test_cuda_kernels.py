"""The CUDA kernels on the PTX machine: they move what costs.py says, and the order of threads changes nothing."""

import cuda_on_cpu
import ptxvm
import pytest
import torch
from device_problem import SHAPES, assert_counts_are_the_formulas, run

import peftkern
from peftkern.ops.gram_schmidt import costs

pytestmark = pytest.mark.skipif(bool(cuda_on_cpu.missing()), reason=str(cuda_on_cpu.missing()))


def on_machine(*problem, **options):
    with peftkern.use_backend("cuda"), cuda_on_cpu.cuda_on_cpu(**options) as machine:
        return run(*problem), machine.launches


@pytest.mark.parametrize("K, r", (*SHAPES, (1100, 20)))
def test_bytes_and_flops_are_those_of_the_formulas(K, r):
    _, launches = on_machine(K, r)
    assert_counts_are_the_formulas(launches, "cuda", K, r)
    algebra = costs.launches("orthonormal_factor", "cuda", M=0, K=K, N=0, r=r, dtype=torch.float32, family="sm80")[
        1
    ].flops["fp64"]
    assert 0.99 * algebra <= dict(launches[1].counts.flops)["fp64"] <= 1.01 * algebra


def test_products_of_columns_meet_no_bank_conflicts():
    """The loops over fragments load; what may conflict is the store of the sums where a tile ends."""
    _, launches = on_machine(96, 32)
    assert launches[0].counts.bank_conflicts == 0
    conflicts = [line for line in launches[3].counts.lines("conflicts") if line.extra_wavefronts]
    assert conflicts and all("st.shared" in line.text for line in conflicts)


@pytest.mark.parametrize("problem", ((75, 11), (50, 33, torch.float64), (70, 9, torch.float32, True)), ids=str)
def test_any_order_of_threads_gives_the_same_bits(problem):
    ptxvm.same_in_any_order(
        lambda **options: torch.cat([t.double().flatten() for t in on_machine(*problem, **options)[0]])
    )


def test_the_second_time_writes_only_where_once_is_not_enough():
    K, r = 70, 9
    written = [on_machine(K, r, torch.float32, long)[1][2].counts.global_bytes_written for long in (False, True)]
    assert written == [0, 4 * K * r + 2 * 8 * r * r]


def test_every_rank_fits_the_smallest_shared_memory():
    """99 KB per block on devices of capability 8.6, 8.9 and 12.0."""
    on_machine(20, 128, shared_limit=99 * 1024)
