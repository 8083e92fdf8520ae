"""The OFT and BOFT rows: every arm computes the layer that the float64 truth does."""

import pytest
import torch

from bench import arms, measure, oracle
from bench.cases import ROTATIONS, Case, make_problem
from bench.result import TARGETS

SMALL = [
    Case(kind, 64, 64, 16, r, dtype, bias=True, factors=factors)
    for kind, r, factors in (("oft", 8, 1), ("boft", 4, 1), ("boft", 4, 3))
    for dtype in ("fp32", "bf16+fp32")
]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.id)
def test_every_arm_computes_the_same_layer(case):
    problem = make_problem(case)
    truth, absent = oracle.truth(problem), []
    for name in arms.names(case)[1:]:
        try:
            arm = arms.build(name, problem)
        except arms.NotAvailable as reason:
            absent.append((name, str(reason)))
            continue
        found = measure.errors(measure.step(arm, problem)[:3], truth)
        assert max(found.values()) < (1e-2 if case.half else 1e-6), (name, found)
    assert [name for name, _ in absent] == (["peft"] if case.factors > 1 else [])


@pytest.mark.parametrize("case", ROTATIONS, ids=lambda case: case.id)
def test_every_row_has_a_target_and_an_adapter_that_changes_the_output(case):
    assert TARGETS["overhead"][case.id].keys() == {"auto"}
    small = Case(case.kind, 64, 64, 4, case.r, case.dtype, factors=case.factors)
    problem = make_problem(small)
    with torch.no_grad():
        y0 = problem.x.double() @ problem.weight.double().T
    assert 0.01 < measure.relative_error(y0, oracle.truth(problem).y) < 1
