"""A model of the GPU: from what the kernels say they move and compute, the time of an operation and of a layer.

python -m bench.model                        the table, the goal, the assumptions
python -m bench.model --card A100 --launches one card, every launch of the layers 4096 wide

All of it is prediction. Kernels state bytes, flops and launches in `peftkern/ops/<family>/costs.py`, which tests hold
to what the PTX machine counts; cards.py has the cards' rates and the assumptions.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench import cards, layers
from bench.cards import Card, Rates
from bench.cases import NAMES, Case
from bench.layers import LIBRARY, PRECISIONS, NoCosts
from peftkern.ops._costs import Launch

TOKENS = 8192
BACKENDS = ("triton", "cuda")


def _cases(kind: str, sizes: Iterable[tuple[int, int]]) -> list[Case]:
    return [
        Case(kind, width, width, TOKENS, r, dtype, factors=factors)
        for width in (4096, 8192)
        for r, factors in sizes
        for dtype in ("bf16", "bf16+fp32", "fp32")
    ]


CASES = [
    *_cases("linear", [(8, 1), (32, 1)]),
    *_cases("gram_schmidt", [(8, 1), (32, 1)]),
    *_cases("oft", [(32, 1)]),
    *_cases("boft", [(8, 1), (8, 4)]),
]


@dataclass(frozen=True)
class Goal:
    """What the adapter of a case may add to its frozen layer at most, as a part of it."""

    what: str
    case: Case
    most: float

    def sentence(self, card: Card) -> str:
        case = self.case
        return (
            f"Goal: {self.what}, {case.dtype}, {case.width_in} x {case.width_out}, {case.tokens} tokens on "
            f"{card.name} adds at most {100 * self.most:.0f} % to the frozen layer's forward and backward."
        )


GOALS = (
    Goal("HRA r 32", Case("linear", 4096, 4096, TOKENS, 32, "bf16"), 0.12),
    Goal("OFT b 32", Case("oft", 4096, 4096, TOKENS, 32, "bf16"), 0.18),
    Goal("BOFT b 8, f 4", Case("boft", 4096, 4096, TOKENS, 8, "bf16", factors=4), 0.30),
)


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
    parts = layers.layer(case, backend, precision, card.family)
    everything = [launch for launches in parts.values() for launch in launches]
    return LayerPrediction(
        case, backend, precision, predict(everything, card, rates), predict(layers.frozen(case), card, rates),
        {name: predict(launches, card, rates) for name, launches in parts.items()},
    )  # fmt: skip


def layers_of(card: Card, rates: Rates, cases: Sequence[Case] = tuple(CASES)) -> list[LayerPrediction]:
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
    for kind in layers.KINDS:
        case = next(case for case in CASES if case.kind == kind and case.half)
        for backend in BACKENDS:
            for precision in PRECISIONS:
                try:
                    layers.layer(case, backend, precision, "sm90")
                except NoCosts as reason:
                    reasons[f"{NAMES[kind]}, {backend}, {precision}: {reason}"] = None
    return list(reasons)


@dataclass(frozen=True)
class Verdict:
    """A goal, and what is predicted of one way to reach it."""

    goal: Goal
    rates: Rates
    found: LayerPrediction

    @property
    def reached(self) -> bool:
        return self.found.added <= self.goal.most


def verdicts(goal: Goal, card: Card) -> list[Verdict]:
    """Of every backend and precision whose costs are stated, at data-sheet peaks and at typical rates."""
    both = (card.peak, cards.typical(card))
    return [Verdict(goal, rates, found) for rates in both for found in layers_of(card, rates, [goal.case])]


def least(goal: Goal, card: Card) -> list[str]:
    """Sentences: what any form that calls the frozen layer adds at least, and one that rotates its weight."""

    def added(passes: list[Launch]) -> str:
        parts = []
        for rates in (card.peak, cards.typical(card)):
            seconds, floor = (predict(launches, card, rates).seconds for launches in (passes, layers.frozen(goal.case)))
            parts.append(f"{100 * (seconds / floor - 1):.1f} % at {rates.name}")
        return ", ".join(parts)

    times, backward = ("ten", "six") if layers.KINDS[goal.case.kind].scales else ("five", "three")
    lines = [
        f"A form that calls the frozen layer as it is passes over the rows {times} times at least: "
        f"{added(layers.fewest_passes(goal.case))}."
    ]
    if layers.by_weight(goal.case, "fast"):
        lines.append(
            f"One that reads the weight and rotates its fewer rows passes over them twice and over its own {backward} "
            f"times: {added(layers.fewest_passes(goal.case, reads_weight=True))}."
        )
    return lines


def goal_lines(card: Card | None = None) -> list[str]:
    """Sentences: is each goal reached, by which backend and precision, at which rates?"""
    card = card or cards.card("H100")
    lines = []
    for goal in GOALS:
        lines.append(goal.sentence(card))
        judged = verdicts(goal, card)
        for verdict in judged:
            found = verdict.found
            lines.append(
                f"  {found.backend}, {found.precision}, at {verdict.rates.name}: "
                f"{'reached' if verdict.reached else 'missed'}, predicted "
                f"{100 * found.added:.1f} % ({1e6 * found.total.seconds:.0f} against "
                f"{1e6 * found.floor.seconds:.0f} us; beyond the floor mostly {found.limit})"
            )
        lines += [f"  {line}" for line in least(goal, card)]
        reached = [f"{v.found.backend}, {v.found.precision}, at {v.rates.name}" for v in judged if v.reached]
        if not judged:
            lines.append("  No backend states its costs, so nothing can be predicted.")
        elif reached:
            lines.append(f"  Predicted to be reached by {'; '.join(reached)}.")
        else:
            lines.append("  No backend and precision is predicted to reach it, at either rates.")
    return lines


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


HEAD = ["layer", "backend", "precision", "frozen us", "at peaks", "limit", "typical", "limit"]


def table(card: Card, cases: Sequence[Case] = tuple(CASES)) -> list[list[str]]:
    """Rows under HEAD: what the adapter adds to the frozen layer, at data-sheet peaks and at typical rates."""
    rows = []
    usual = layers_of(card, cards.typical(card), cases)
    for peak, typical in zip(layers_of(card, card.peak, cases), usual, strict=True):
        cells = [peak.case.brief, peak.backend, peak.precision, f"{1e6 * peak.floor.seconds:.0f}"]
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
                    parts = layers.layer(case, backend, precision, card.family)
                except NoCosts:
                    continue
                for name, launches in parts.items():
                    for launch in launches:
                        seconds, limit = time_of(launch, card, rates)
                        title = f"{case.brief}, {backend}, {precision}"
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
    print("\n".join(goal_lines()))
    if unstated():
        print("\nNot predicted:\n" + "\n".join(f"  {line}" for line in unstated()))
    print("\nAssumptions:\n" + "\n".join(f"  {line}" for line in cards.ASSUMPTIONS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
