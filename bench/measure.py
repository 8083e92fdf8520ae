"""Measuring helpers: interleaved timing, saved bytes, errors, gain of small updates."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.arm import Arm
from bench.cases import Case, Problem
from bench.oracle import Truth, update

GAIN_SIZES = (3e-4, 1e-3, 1e-2)
GAIN_TOKENS = 512


def step(arm: Arm, problem: Problem) -> tuple[Tensor, ...]:
    """One run of an arm: (y, dx) or (y, dx, du) of a case that trains, (y,) of one that decodes."""
    if not problem.case.trains:
        with torch.no_grad():
            return (arm.forward(problem.x),)
    y = arm.forward(problem.x)
    wanted = (problem.x,) if arm.u is None else (problem.x, arm.u, *arm.others)
    return y, *torch.autograd.grad(y, wanted, problem.grad_y)


# ---- order and time


def balanced_orders(count: int) -> list[list[int]]:
    """Orders of `count` arms in which each arm follows each other arm equally often (Williams' design).

    Plain rotation would let one arm always run on the caches and the heap that the same other arm leaves behind.
    """
    first = [0]
    low, high = 1, count - 1
    while len(first) < count:
        first.append(low if len(first) % 2 else high)
        low, high = (low + 1, high) if len(first) % 2 == 0 else (low, high - 1)
    orders = [[(i + shift) % count for i in first] for shift in range(count)]
    return orders if count % 2 == 0 else orders + [order[::-1] for order in orders]


@dataclass
class Plan:
    """every[arm]: the arm runs in rounds 0, every, 2 every, ...; loops[arm]: calls per timing; primed: arms that run
    once untimed before each timing."""

    rounds: int
    every: dict[str, int]
    loops: dict[str, int]
    primed: frozenset[str]


def make_plan(
    cost: dict[str, float], seconds: float, min_rounds: int = 7, max_rounds: int = 100, sample: float = 2e-3
) -> Plan:
    """Spend about `seconds` on arms of the given cost per call, the first of which is the floor.

    An arm of more than five times the floor is slow: all of these together get at most two fifths of the time, in
    rounds spread over the run. Calls shorter than `sample` are timed several at once. Where the floor is below 20 ms,
    each arm that is not slow finds its caches as it left them; it would double the time of larger ones for nothing.
    """
    floor = next(iter(cost.values()))
    slow = {name for name, value in cost.items() if value > 5 * floor}
    loops = {name: max(1, round(sample / value)) for name, value in cost.items()}
    primed = frozenset(cost) - slow if floor < 20e-3 else frozenset()
    spent = {name: value * (loops[name] + (name in primed)) for name, value in cost.items()}
    share = 0.6 if slow else 1.0
    of_one_round = sum(spent[name] for name in cost if name not in slow)
    rounds = int(min(max_rounds, max(min_rounds, share * seconds / of_one_round)))
    every = dict.fromkeys(cost, 1)
    for name in slow:
        runs = min(rounds, max(1, int((1 - share) * seconds / len(slow) / spent[name])))
        every[name] = -(-rounds // runs)
    return Plan(rounds, every, loops, primed)


@contextmanager
def no_garbage_collection():
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def interleave(
    calls: dict[str, Callable[[], object]], plan: Plan, clock: Callable[[], float] = time.perf_counter
) -> dict[str, dict[int, float]]:
    """Seconds per call of each arm, by round. Each round runs every arm that is due, in the next balanced order."""
    order_of_round = balanced_orders(len(calls))
    arms = list(calls)
    times: dict[str, dict[int, float]] = {name: {} for name in arms}
    with no_garbage_collection():
        for round_index in range(plan.rounds):
            for i in order_of_round[round_index % len(order_of_round)]:
                name = arms[i]
                if round_index % plan.every[name]:
                    continue
                call, loops = calls[name], plan.loops[name]
                if name in plan.primed:
                    call()
                start = clock()
                for _ in range(loops):
                    call()
                times[name][round_index] = (clock() - start) / loops
    return times


def overhead(times: dict[int, float], floor: dict[int, float]) -> dict[str, float]:
    """Ratios of an arm's times to those of the floor: three estimates and the spread of the per-round one."""
    ratios = sorted(times[i] / floor[i] for i in times if i in floor)
    quartiles = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else [ratios[0]] * 3
    return {
        "median_of_ratios": statistics.median(ratios),
        "q1": quartiles[0],
        "q3": quartiles[2],
        "ratio_of_medians": statistics.median(times.values()) / statistics.median(floor.values()),
        "ratio_of_minima": min(times.values()) / min(floor.values()),
        "rounds": len(ratios),
    }


# ---- what stays in memory for backward


@dataclass
class Saved:
    """bytes: unique storages kept for backward, parameters and x left out; x: whether x is kept; outside: the part of
    bytes that saved-tensor hooks cannot see, because a Function holds it as an attribute."""

    bytes: int = 0
    x: bool = False
    outside: int = 0


def saved_for_backward(forward: Callable[[], Tensor], parameters: list[Tensor], x: Tensor) -> tuple[Tensor, Saved]:
    """Run `forward` and count what autograd keeps of it. Returns (y, Saved)."""
    known = {p.untyped_storage().data_ptr() for p in parameters}
    storages: dict[int, int] = {}
    outside: dict[int, int] = {}

    def note(tensor: Tensor, into: dict[int, int]) -> None:
        storage = tensor.untyped_storage()
        into[storage.data_ptr()] = storage.nbytes()

    def pack(tensor: Tensor) -> Tensor:
        note(tensor, storages)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = forward()

    nodes, seen = [y.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes.extend(parent for parent, _ in node.next_functions)
        for value in vars(node).values() if hasattr(node, "__dict__") else ():
            if isinstance(value, Tensor):
                note(value, outside)

    x_pointer = x.untyped_storage().data_ptr()
    keeps_x = x_pointer in storages or x_pointer in outside
    for pointer in known | {x_pointer}:
        storages.pop(pointer, None)
        outside.pop(pointer, None)
    for pointer in storages:
        outside.pop(pointer, None)
    return y, Saved(sum(storages.values()) + sum(outside.values()), keeps_x, sum(outside.values()))


# ---- errors


def relative_error(value: Tensor, truth: Tensor) -> float:
    """|value - truth| / |truth| in the Euclidean norm, in float64."""
    return float((value.double() - truth).norm() / truth.norm())


def errors(result: tuple[Tensor, ...], truth: Truth) -> dict[str, float]:
    """Errors of the parts an arm has: y, dx, du."""
    return {
        part: relative_error(value.detach(), reference)
        for part, value, reference in zip(("y", "dx", "du"), result, (truth.y, truth.dx, truth.du), strict=False)
    }


def baseline_of(case: Case) -> str:
    """The arm whose error is the yardstick: plain torch in the same dtype; in mixed dtypes PEFT's own path if any."""
    return "peft" if case.dtype == "bf16+fp32" and case.factors == 1 else "torch"


# ---- small updates


def small_update(problem: Problem, size: float) -> Tensor:
    """An adapter u, in the adapter's dtype, whose update of the output is `size` of it; from pairs of close vectors."""
    case = problem.case
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(case.reflector_length, case.r // 2, generator=generator).repeat_interleave(2, dim=1)
    direction = torch.randn(case.reflector_length, case.r, generator=generator)
    # Stochastic rounding, with one draw for all step sizes: a gap below an ulp of bf16 moves some entries by one ulp.
    draw = torch.rand(case.reflector_length, case.r, generator=generator) - 0.5
    start = start.to(case.adapter_dtype).float()
    ulp = start.abs().log2().floor().exp2() * torch.finfo(case.adapter_dtype).eps

    def adapter(gap: float) -> Tensor:
        moved = start + gap * direction
        return (moved + draw * ulp if case.adapter_dtype != torch.float32 else moved).to(case.adapter_dtype)

    x = problem.x.detach()[:64]
    output = float((x.double() @ problem.weight.double().T).norm())

    def reached(gap: float) -> float:
        return float(update(x, problem.weight, adapter(gap)).norm()) / output

    low, high = 1e-8, 1.0
    for _ in range(24):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if reached(middle) < size else (low, middle)
        if high / low < 1.02:
            break
    return adapter(high)


def gain(y: Tensor, y_frozen: Tensor, D: Tensor) -> float:
    """<y - y0, D> / <D, D>: the part of the update D that reached the output. 1 keeps all of it, 0 none."""
    return float(((y.double() - y_frozen.double()) * D).sum() / D.square().sum())


def gains(arms: dict[str, Arm], frozen: Arm, problem: Problem) -> dict[str, dict[str, float]]:
    """Gain of each arm at each of GAIN_SIZES. Leaves the arms' u as it was."""
    x = problem.x.detach()[:GAIN_TOKENS]
    found: dict[str, dict[str, float]] = {name: {} for name in arms}
    with torch.no_grad():
        y_frozen = frozen.forward(x)
        for size in GAIN_SIZES:
            u = small_update(problem, size)
            D = update(x, problem.weight, u)
            for name, arm in arms.items():
                arm.set_u(u)
                found[name][f"{size:g}"] = gain(arm.forward(x), y_frozen, D)
    for arm in arms.values():
        arm.set_u(problem.u)
    return found
