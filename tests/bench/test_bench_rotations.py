"""The OFT and BOFT rows: every arm computes the layer that its float64 truth does."""

import importlib.util
from dataclasses import replace

import pytest
import torch

from bench import arms, lycoris, measure, oracle, rotations
from bench.arm import NotAvailable
from bench.cases import ROTATIONS, Case, make_problem
from bench.result import TARGETS

KINDS = [("oft", 8, 1), ("boft", 4, 1), ("boft", 4, 3)]
SMALL = [
    Case(kind, 64, 64, 16, r, dtype, bias=bias, factors=factors)
    for kind, r, factors in KINDS
    for dtype in ("fp32", "bf16", "bf16+fp32")
    for bias in ((True, False) if dtype == "fp32" else (False,))
]
ids = {"ids": lambda case: f"{case.id}{'-bias' * case.bias}"}


@pytest.mark.parametrize("case", SMALL, **ids)
def test_every_arm_computes_the_layer_it_says(case):
    problem = make_problem(case)
    truth, absent = oracle.truth(problem), set()
    for name in arms.names(case)[1:]:
        try:
            arm = arms.build(name, problem)
        except NotAvailable:
            absent.add(name)
            continue
        found = measure.errors(measure.step(arm, problem)[:3], arm.truth() if arm.truth else truth)
        assert max(found.values()) < (1e-2 if case.half else 1e-6), (name, found)
    expected = {"peft"} if case.factors > 1 else set()
    if importlib.util.find_spec("lycoris") is None:
        expected |= set(arms.LYCORIS)
    elif case.bias:
        expected.add("lycoris-bypass")
    assert absent == expected


@pytest.mark.parametrize(("kind", "r", "factors"), KINDS)
def test_lycoris_is_judged_by_the_same_rotations_of_the_outputs(kind, r, factors):
    case = Case(kind, 64, 64, 16, r, "fp32", bias=True, factors=factors)
    problem = make_problem(case)
    u = problem.u.double()
    # The inverse rotation, stage f - 1 first, is the transpose of what the outputs meet, stage 0 first.
    inverse = rotations.rotate(case, torch.eye(64).double(), u if kind == "oft" else -u, terms=None)
    y = problem.x.detach().double() @ problem.weight.double().T @ inverse.T + problem.bias.double()
    torch.testing.assert_close(lycoris.truth(problem).y, y.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kind": "linear"}, "no HRA"),
        ({"width_out": 48}, "not as many as inputs"),
        ({"width_in": 48, "width_out": 48}, "blocks of 6 of 48 outputs where 8"),
    ],
)
def test_lycoris_is_left_out_with_a_reason_where_it_makes_another_layer(changes, reason):
    if "blocks of" in reason:
        pytest.importorskip("lycoris")
    case = replace(Case("oft", 64, 64, 16, 8, "fp32"), **changes)
    with pytest.raises(NotAvailable, match=reason):
        arms.build("lycoris", make_problem(case))


def test_an_orthogonality_error_is_the_largest_of_the_blocks():
    stretched = torch.eye(4).repeat(3, 1, 1)
    stretched[1, 2, 2] = 1.5
    assert rotations.orthogonality_error(stretched) == pytest.approx(1.25)


@pytest.mark.parametrize("dtype", ["fp32", "bf16+fp32"])
def test_better_terms_and_the_exact_map_are_closer_to_orthogonal(dtype):
    problem = make_problem(Case("oft", 64, 64, 16, 32, dtype))
    found = {}
    for name in ("peft", "auto", "auto-terms6", "auto-cayley"):
        found[name] = rotations.orthogonality_error(arms.build(name, problem).blocks())
    assert found["peft"] == pytest.approx(found["auto"], rel=1e-3) and found["auto"] > 1e-3
    assert found["auto-terms6"] < 1e-5 and found["auto-cayley"] < 1e-6


@pytest.mark.parametrize("case", ROTATIONS, ids=lambda case: case.id)
def test_every_row_has_a_target_and_an_adapter_that_changes_the_output(case):
    assert TARGETS["overhead"][case.id].keys() == {"auto"}
    small = Case(case.kind, 64, 64, 4, case.r, case.dtype, factors=case.factors)
    problem = make_problem(small)
    with torch.no_grad():
        y0 = problem.x.double() @ problem.weight.double().T
    assert 0.01 < measure.relative_error(y0, oracle.truth(problem).y) < 1
