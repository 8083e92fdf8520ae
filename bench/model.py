"""A model of the GPU: from what the kernels say they move and compute, the time of an operation and of a layer.

python -m bench.model                        the table, the goal, the assumptions
python -m bench.model --card A100 --launches one card, every launch of the layers 4096 wide

All of it is prediction. Kernels state bytes, flops and launches in `peftkern/ops/<family>/costs.py`, which tests hold
to what the PTX machine counts; cards.py has the cards' rates and the assumptions.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from bench import cards
from bench.cards import Card, Rates
from bench.cases import Case
from peftkern import dispatch
from peftkern.ops._costs import Launch

TOKENS = 8192
BACKENDS = ("triton", "cuda")
PRECISIONS = ("fast", "exact")
LIBRARY = "library: "
GOAL = 0.12
GOAL_CASE = Case("linear", 4096, 4096, TOKENS, 32, "bf16")
CASES = [
    Case(kind, width, width, TOKENS, r, dtype)
    for kind in ("linear", "gram_schmidt")
    for width in (4096, 8192)
    for r in (8, 32)
    for dtype in ("bf16", "bf16+fp32", "fp32")
]
# Operations of a layer: (operation, how often); `base` is the frozen layer's product, forward or backward.
FACTOR = {
    "linear": ("wy_factor", "wy_factor_backward"),
    "gram_schmidt": ("orthonormal_factor", "orthonormal_factor_backward"),
}
ROWS = {"fast": ("rotate", "rotate_backward"), "exact": ("rotated_linear", "rotated_linear_backward")}


@dataclass(frozen=True)
class Prediction:
    """seconds, and the part of them that each limit takes: HBM, L2, launch, or a kind of arithmetic."""

    seconds: float
    by_limit: dict[str, float]

    @property
    def limit(self) -> str:
        return max(self.by_limit, key=self.by_limit.get) if self.by_limit else "nothing"


def time_of(launch: Launch, card: Card, rates: Rates) -> tuple[float, str]:
    """(seconds of one launch without the gap before it, what limits it)."""
    filled = 1.0 if launch.blocks is None else min(1.0, launch.blocks / card.multiprocessors)
    library = launch.kernel.startswith(LIBRARY)
    times = {"HBM": launch.unique / rates.hbm, "L2": (launch.read + launch.written) / (rates.l2 * filled)}
    for kind, flops in launch.flops.items():
        own = 1.0 if library or not kind.startswith("tensor") else rates.own
        times[kind.replace("_", " ")] = flops / (rates.flops[kind] * own * filled)
    limit = max(times, key=times.get)
    return times[limit], limit


def predict(launches: Iterable[Launch], card: Card, rates: Rates) -> Prediction:
    """Launches one after the other."""
    by_limit: Counter[str] = Counter()
    for launch in launches:
        seconds, limit = time_of(launch, card, rates)
        by_limit[limit] += seconds
        by_limit["launch"] += rates.launch
    return Prediction(sum(by_limit.values()), dict(by_limit))


def product_kind(dtype: torch.dtype) -> str:
    """Unit that multiplies matrices of a dtype in torch's library by default (float32 without TF32)."""
    return {torch.bfloat16: "tensor_bf16", torch.float16: "tensor_fp16", torch.float32: "fp32"}[dtype]


def product(M: int, N: int, K: int, dtype: torch.dtype, name: str = "product") -> Launch:
    """[M, K] x [K, N] by the vendor's library. How it tiles is its own affair: each operand counts once."""
    read, written = (M * K + K * N) * dtype.itemsize, M * N * dtype.itemsize
    return Launch(LIBRARY + name, read, written, read + written, {product_kind(dtype): 2 * M * N * K})


def elementwise(name: str, read: int, written: int) -> Launch:
    return Launch(LIBRARY + name, read, written, read + written)


def frozen(case: Case) -> list[Launch]:
    """The floor: y = x W^T and dx = dy W."""
    M, N, K = case.tokens, case.width_out, case.width_in
    return [product(M, N, K, case.base_dtype, "x W^T"), product(M, K, N, case.base_dtype, "dy W")]


@functools.cache
def _costs(family: str):
    name = f"{family}.costs"
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


class NoCosts(Exception):
    """A backend whose costs are not stated; the message says which."""


def launches_of(op: str, backend: str, case: Case, family: str) -> list[Launch]:
    """The launches of an operation at the shape of a case. Raises NoCosts."""
    operation = dispatch.operations().get(op)
    if operation is None:
        raise NoCosts(f"there is no operation {op}")
    costs = _costs(operation.family)
    if costs is None:
        raise NoCosts(f"{operation.family} states no costs")
    shape = {"M": case.tokens, "K": case.width_in, "N": case.width_out, "r": case.r}
    try:
        return costs.launches(op, backend, **shape, dtype=case.base_dtype, family=family)
    except NotImplementedError as reason:
        raise NoCosts(str(reason) or f"{backend} does not write {op}") from None


def layer(case: Case, backend: str, precision: str, family: str) -> dict[str, list[Launch]]:
    """Launches of one layer's forward and backward, by operation. Raises NoCosts.

    `fast` calls the frozen layer on the rotated rows; `exact` contains the frozen layer's products.
    """
    if precision == "exact" and not case.half:
        raise NoCosts("in fp32 exact is fast")
    names = (FACTOR[case.kind][0], *ROWS[precision], FACTOR[case.kind][1])
    parts = {name: launches_of(name, backend, case, family) for name in names}
    if precision == "fast":
        parts["frozen layer"] = frozen(case)
    # V has two consumers, the rows and the factor, whose gradients autograd adds; half-precision u is cast both ways.
    size = case.width_in * case.r
    glue = [elementwise("dV + dV", 8 * size, 4 * size)]
    if case.adapter_dtype is not torch.float32:
        glue += [elementwise("u to float32", 2 * size, 4 * size), elementwise("du to u's dtype", 4 * size, 2 * size)]
    parts["autograd"] = glue
    return parts


@dataclass(frozen=True)
class LayerPrediction:
    """total and floor: seconds of the layer and of its frozen base layer, forward + backward; parts: by operation."""

    case: Case
    backend: str
    precision: str
    total: Prediction
    floor: Prediction
    parts: dict[str, Prediction]

    @property
    def added(self) -> float:
        """What the adapter adds to the frozen layer, as a part of it."""
        return self.total.seconds / self.floor.seconds - 1

    @property
    def limit(self) -> str:
        """What the time beyond the frozen layer goes into, mostly."""
        beyond = {k: v - self.floor.by_limit.get(k, 0.0) for k, v in self.total.by_limit.items()}
        return max(beyond, key=beyond.get)


def predict_layer(case: Case, backend: str, precision: str, card: Card, rates: Rates) -> LayerPrediction:
    """Raises NoCosts."""
    parts = layer(case, backend, precision, card.family)
    everything = [launch for launches in parts.values() for launch in launches]
    return LayerPrediction(
        case, backend, precision, predict(everything, card, rates), predict(frozen(case), card, rates),
        {name: predict(launches, card, rates) for name, launches in parts.items()},
    )  # fmt: skip


def layers(card: Card, rates: Rates, cases: Sequence[Case] = tuple(CASES)) -> list[LayerPrediction]:
    """Every layer whose costs are stated."""
    found = []
    for case in cases:
        for backend in BACKENDS:
            for precision in PRECISIONS:
                try:
                    found.append(predict_layer(case, backend, precision, card, rates))
                except NoCosts:
                    continue
    return found


def unstated() -> list[str]:
    """A sentence for each layer that cannot be predicted, and why."""
    reasons: dict[str, None] = {}
    for kind in FACTOR:
        for backend in BACKENDS:
            for precision in PRECISIONS:
                try:
                    layer(Case(kind, 4096, 4096, TOKENS, 32, "bf16"), backend, precision, "sm90")
                except NoCosts as reason:
                    reasons[f"{kind.replace('_', '-')}, {backend}, {precision}: {reason}"] = None
    return list(reasons)


def goal(card: Card | None = None) -> list[str]:
    """Sentences: is the goal reached, by which backend and precision, at which rates?"""
    card = card or cards.card("H100")
    lines = [
        f"Goal: HRA r {GOAL_CASE.r}, bf16, {GOAL_CASE.width_in} x {GOAL_CASE.width_out}, {TOKENS} tokens on "
        f"{card.name} adds at most {100 * GOAL:.0f} % to the frozen layer's forward and backward."
    ]
    reached = []
    for rates in (card.peak, cards.typical(card)):
        for found in layers(card, rates, [GOAL_CASE]):
            verdict = "reached" if found.added <= GOAL else "missed"
            if found.added <= GOAL:
                reached.append(f"{found.backend}, {found.precision}, at {rates.name}")
            lines.append(
                f"  {found.backend}, {found.precision}, at {rates.name}: {verdict}, predicted "
                f"{100 * found.added:.1f} % ({1e6 * found.total.seconds:.0f} against "
                f"{1e6 * found.floor.seconds:.0f} us; beyond the floor mostly {found.limit})"
            )
    floor, least = (predict(made(GOAL_CASE), card, card.peak).seconds for made in (frozen, fewest_passes))
    lines.append(
        f"  A form that calls the frozen layer as it is passes over the rows five times at least: "
        f"{100 * (least / floor - 1):.1f} % at {card.peak.name}."
    )
    if len(lines) == 2:
        return [*lines, "  No backend states its costs, so nothing can be predicted."]
    if reached:
        return [*lines, f"  Predicted to be reached by {'; '.join(reached)}."]
    return [*lines, "  No backend and precision is predicted to reach it, at either rates."]


def fewest_passes(case: Case) -> list[Launch]:
    """The least of any form that calls the frozen layer as it is: x read and z written, then dz and x read and dx
    written, each once."""
    rows = case.tokens * case.width_in * case.base_dtype.itemsize
    return [Launch("forward", rows, rows, 2 * rows), *frozen(case), Launch("backward", 2 * rows, rows, 3 * rows)]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


HEAD = ["layer", "backend", "precision", "frozen us", "at peaks", "limit", "typical", "limit"]


def table(card: Card, cases: Sequence[Case] = tuple(CASES)) -> list[list[str]]:
    """Rows under HEAD: what the adapter adds to the frozen layer, at data-sheet peaks and at typical rates."""
    rows = []
    usual = layers(card, cards.typical(card), cases)
    for peak, typical in zip(layers(card, card.peak, cases), usual, strict=True):
        case = peak.case
        prefix = "Gram-Schmidt, " if case.kind == "gram_schmidt" else ""
        title = f"{prefix}{case.width_in} wide, r {case.r}, {case.dtype}"
        cells = [title, peak.backend, peak.precision, f"{1e6 * peak.floor.seconds:.0f}"]
        rows.append([*cells, _percent(peak.added), peak.limit, _percent(typical.added), typical.limit])
    return rows


def show(rows: list[list[str]]) -> str:
    width = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, width, strict=True)).rstrip() for row in rows)


def show_launches(card: Card, rates: Rates, cases: Sequence[Case]) -> str:
    rows = [["layer", "operation", "kernel", "us", "limit", "HBM MB", "L2 MB"]]
    for case in cases:
        for backend in BACKENDS:
            for precision in PRECISIONS:
                try:
                    parts = layer(case, backend, precision, card.family)
                except NoCosts:
                    continue
                for name, launches in parts.items():
                    for launch in launches:
                        seconds, limit = time_of(launch, card, rates)
                        title = f"{case.kind} r {case.r} {case.dtype} {backend} {precision}"
                        traffic = launch.read + launch.written
                        rows.append(
                            [title, name, launch.kernel, f"{1e6 * seconds:.1f}", limit]
                            + [f"{launch.unique / 1e6:.1f}", f"{traffic / 1e6:.1f}"]
                        )
    return show(rows)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", help=f"one of {', '.join(cards.CARDS)} (default: all)")
    parser.add_argument("--launches", action="store_true", help="every launch of the layers 4096 wide, at peaks")
    options = parser.parse_args(arguments)
    try:
        chosen = [cards.card(options.card)] if options.card else list(cards.CARDS.values())
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    print("PREDICTIONS, not measurements: what an adapter adds to its frozen layer, forward + backward.\n")
    for card in chosen:
        print(f"{card.name} ({card.source})")
        rows = table(card)
        print(show([HEAD, *rows]) if rows else "  nothing to predict")
        if options.launches:
            print("\n" + show_launches(card, card.peak, [case for case in CASES if case.width_in == 4096]))
        print()
    print("\n".join(goal()))
    if unstated():
        print("\nNot predicted:\n" + "\n".join(f"  {line}" for line in unstated()))
    print("\nAssumptions:\n" + "\n".join(f"  {line}" for line in cards.ASSUMPTIONS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
