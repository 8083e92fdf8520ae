"""The figures of kernels whose code is known, and what is made of them: spills and lost units are seen."""

import devices
import pytest
import torch

if devices.triton_missing():
    pytest.skip(devices.triton_missing(), allow_module_level=True)

import triton
import triton.language as tl

from compiled import driver, machine_code, table
from compiled.machine_code import Figures
from compiled.test_compiled import broken_rules


@triton.jit
def product(p_x, p_y, p_z, K, s_x, B: tl.constexpr, BK: tl.constexpr):
    i, j = tl.program_id(0) * B + tl.arange(0, B)[:, None], tl.arange(0, B)[None, :]
    acc = tl.zeros((B, B), tl.float32)
    for k in range(0, K, BK):
        o_k = k + tl.arange(0, BK)
        acc = tl.dot(tl.load(p_x + i * s_x + o_k[None, :]), tl.load(p_y + o_k[:, None] * B + j), acc)
    tl.store(p_z + i * B + j, acc)


def figures(target, K=256, B=64, dtype=torch.bfloat16, stride=256, **options):
    x, y, z = torch.empty(B, K, dtype=dtype), torch.empty(K, B, dtype=dtype), torch.empty(B, B)
    with driver.compiling(target) as launches:
        product[(1,)](x, y, z, K, stride, B, 32, **options)
    return machine_code.of_launch(launches[0])


UNITS = {"sm80": "HMMA", "sm90": "HGMMA", "sm100": "UTCHMMA", "gfx942": "v_mfma_f32"}


@pytest.mark.parametrize("target", driver.TARGETS)
def test_a_plain_product_uses_tensor_cores_and_wide_loads_and_does_not_spill(target):
    seen = figures(target, num_warps=4)
    assert UNITS[target] in seen.tensor and seen.widest_in_loops == 16 and seen.spilled == 0
    assert 16 < seen.registers < 256 and seen.shared >= 2 * 64 * 32 * 2
    assert broken_rules(target, "linear_kernel", seen) == []


@pytest.mark.parametrize("target", ("sm80", "gfx942"))
def test_a_tile_that_is_too_large_for_one_warp_spills(target):
    seen = figures(target, B=256, num_warps=1, num_stages=1)
    assert seen.spilled > 0
    assert any("spilled" in line for line in broken_rules(target, "linear_kernel", seen))


@pytest.mark.parametrize("target", ("sm80", "sm90", "gfx942"))
def test_a_stride_that_is_not_known_to_be_even_costs_the_wide_loads(target):
    """Of y, 128 threads read 512 numbers at a time, 8 bytes each."""
    wide, narrow = figures(target, num_warps=4), figures(target, B=16, stride=257, num_warps=4)
    assert narrow.widest_in_loops < wide.widest_in_loops
    assert any("bytes per access" in line for line in broken_rules(target, "linear_kernel", narrow))


def test_shared_memory_beyond_a_block_and_missing_units_are_named():
    seen = Figures(100, 0, 164 * 1024, (), 16)
    lines = broken_rules("sm80", "linear_kernel", seen)
    assert lines == ["167936 bytes of shared memory, a block has 166912", "no half tensor cores (found: none)"]
    assert broken_rules("sm90", "reduce_kernel", seen) == []


ROW = Figures(100, 0, 10000, ("HMMA",), 16).row()
WORSE = {
    "registers": ({"registers": 117}, "117 registers, the table has 100"),
    "shared": ({"shared": 13000}, "13000 bytes of shared memory, the table has 10000"),
    "spilled": ({"spilled": 8}, "8 bytes spilled, the table has 0"),
    "tensor": ({"tensor": []}, "no tensor cores, the table has HMMA"),
    "width": ({"widest_in_loops": 4}, "loops move 4 bytes per access, the table has 16"),
}


@pytest.mark.parametrize("what", WORSE)
def test_a_regression_against_the_table_is_named(what):
    change, sentence = WORSE[what]
    assert table.worse(ROW, {**ROW, **change}) == [sentence]


def test_within_the_slack_of_compiler_versions_nothing_is_a_regression():
    assert table.worse(ROW, {**ROW, "registers": 116, "shared": 12000, "tensor": ["HGMMA"]}) == []


SASS = """
        /*0000*/                   LDG.E.128 R4, [R2] ;
.L_x_0:
        /*0010*/                   LDG.E.U16 R4, [R2] ;
        /*0020*/                   LDGSTS.E.BYPASS.64 [R2], [R4] ;
        /*0030*/                   LDGDEPBAR ;
        /*0040*/              @P0 BRA `(.L_x_0) ;
        /*0050*/                   STG.E.128 [R2], R4 ;
.L_x_1:
        /*0060*/                   BRA `(.L_x_1);
"""


def test_only_accesses_inside_loops_count():
    assert machine_code.of_sass(SASS, 10, 0, 0).widest_in_loops == 8
    assert machine_code.of_sass(SASS.replace("@P0 BRA `(.L_x_0)", "NOP"), 10, 0, 0).widest_in_loops == 0
