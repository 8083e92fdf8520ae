"""One case measured: every arm checked against float64 first, then timed in turn with the others."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial

import torch

from bench import arms as contenders
from bench import measure, rotations
from bench.arm import Arm, NotAvailable
from bench.cases import Case, Problem, make_problem
from bench.oracle import Truth, truth

# An arm with a larger error than this computes something else, whatever its baseline does.
GROSS_ERROR = {torch.float32: 1e-4, torch.bfloat16: 2.0**-5}
# Errors of peftkern's arms, as multiples of those of the baseline.
ERROR_RATIO_LIMIT = 2.0
# In mixed dtypes PEFT keeps dz = dy W in fp32; a base layer that is left alone rounds it once, and du inherits that.
# Its error may therefore reach two units of roundoff of the base dtype whatever the ratio.
ROUNDED_GRADIENT = torch.finfo(torch.bfloat16).eps
# Slower arms are run once only, and not at the sizes of `gain`.
ONE_RUN = 5.0


@dataclass
class Row:
    """times[arm][round] in seconds; info[arm]: what goes into the result file; absent, refused: reasons by arm."""

    case: Case
    times: dict[str, dict[int, float]] = field(default_factory=dict)
    info: dict[str, dict[str, object]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def verdict(name: str, case: Case, found: dict[str, float], baseline: dict[str, float] | None) -> str | None:
    """A sentence that says why an arm with these errors must not be timed; None where it may."""
    for part, error in found.items():
        if not error <= GROSS_ERROR[case.base_dtype]:
            return (
                f"{contenders.label(name)} at {case.title}: the error of {part} against float64 is {error:.1e}, "
                f"above {GROSS_ERROR[case.base_dtype]:.1e}, so it was not timed"
            )
        if not contenders.is_ours(name) or baseline is None:
            continue
        limit = ERROR_RATIO_LIMIT * baseline[part]
        if part == "du" and case.dtype == "bf16+fp32":
            limit = max(limit, ROUNDED_GRADIENT)
        if error > limit:
            yardstick = contenders.LABELS[measure.baseline_of(case)]
            return (
                f"{contenders.label(name)} at {case.title}: the error of {part} against float64 is {error:.1e}, "
                f"{error / baseline[part]:.1f} times that of {yardstick} (limit {limit:.1e}), so it was not timed"
            )
    return None


def _first_run(arm: Arm, problem: Problem, reference: Truth) -> tuple[dict[str, object], dict[str, float], float]:
    """Runs the arm once: (saved bytes as result fields, errors, seconds)."""
    start = time.perf_counter()
    fields: dict[str, object] = {}
    if problem.case.trains:
        y, saved = measure.saved_for_backward(lambda: arm.forward(problem.x), arm.parameters, problem.x)
        wanted = (problem.x,) if arm.u is None else (problem.x, arm.u, *arm.others)
        result = (y, *torch.autograd.grad(y, wanted, problem.grad_y))
        fields = {
            "saved_bytes": saved.bytes,
            "saved_x_bytes": problem.x.nbytes if saved.x else 0,
            "saved_outside_hooks_bytes": saved.outside,
        }
    else:
        result = measure.step(arm, problem)
    seconds = time.perf_counter() - start
    if arm.differs:
        fields["differs"] = arm.differs
    if arm.blocks:
        fields["orthogonality_error"] = rotations.orthogonality_error(arm.blocks())
    found = {} if arm.name == "frozen" else measure.errors(result, arm.truth() if arm.truth else reference)
    return fields, found, seconds


def _cost(arm: Arm, problem: Problem) -> float:
    """Seconds of a run: the least of up to five, or of as many as fit into half a second."""
    taken: list[float] = []
    while len(taken) < 5 and sum(taken) < 0.5:
        start = time.perf_counter()
        measure.step(arm, problem)
        taken.append(time.perf_counter() - start)
    return min(taken)


def measure_row(case: Case, seconds: float) -> Row:
    """Build, check and time all arms of a case; `seconds` is the time spent on timing, roughly."""
    row = Row(case)
    problem = make_problem(case)
    reference = truth(problem)
    built: dict[str, Arm] = {}
    found: dict[str, dict[str, float]] = {}
    cost: dict[str, float] = {}
    for name in contenders.names(case):
        try:
            arm = contenders.build(name, problem)
        except NotAvailable as reason:
            row.absent[name] = str(reason)
            continue
        try:
            row.info[name], found[name], cost[name] = _first_run(arm, problem, reference)
            if cost[name] < ONE_RUN:
                cost[name] = _cost(arm, problem)
        except Exception as error:
            row.refused[name] = f"{contenders.label(name)} at {case.title} raised {type(error).__name__}: {error}"
            continue
        detours = arm.detours() if arm.detours else {}
        if detours:
            row.refused[name] = f"{contenders.label(name)} at {case.title} ran PEFT's own code: {detours}"
            continue
        built[name] = arm
    del reference

    baseline = found.get(measure.baseline_of(case))
    for name in list(built):
        reason = verdict(name, case, found[name], baseline)
        if reason is not None:
            row.refused[name] = reason
            del built[name]

    if case.half and case.kind == "linear":
        swift = {name: arm for name, arm in built.items() if arm.u is not None and cost[name] < ONE_RUN}
        for name, by_size in measure.gains(swift, built["frozen"], problem).items():
            row.info[name]["gain"] = by_size

    plan = measure.make_plan({name: cost[name] for name in built}, seconds)
    row.times = measure.interleave({name: partial(measure.step, arm, problem) for name, arm in built.items()}, plan)
    for name in built:
        info = row.info[name]
        info["overhead"] = measure.overhead(row.times[name], row.times["frozen"])
        if "saved_bytes" in info:
            info["saved_beyond_frozen_bytes"] = info["saved_bytes"] - row.info["frozen"]["saved_bytes"]
        if found[name]:
            info["error"] = found[name]
            if baseline is not None:
                info["error_ratio"] = {part: error / baseline[part] for part, error in found[name].items()}
                info["error_baseline"] = measure.baseline_of(case)
    return row
