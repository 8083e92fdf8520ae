"""Predictions of bench/model.py for the pages, beside what a GPU measured where there is a result file."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path

from bench import cards, layers, markup, model
from bench.cases import OPERATION, Case
from bench.layers import NoCosts
from bench.model import LayerPrediction
from bench.result import Result

LABEL = "Predictions of a model, not measurements."


def measured_results(folder: Path) -> list[Result]:
    """Results of real GPUs in a folder."""
    found = []
    for path in sorted(folder.glob("*.json")):
        data = json.loads(path.read_text())
        if "gpu" in data and not data["gpu"]["dry_run"] and data["benchmarks"]:
            found.append(Result.load(path))
    return found


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def rates_of(result: Result) -> tuple[cards.Card, list[cards.Rates]] | None:
    """The card of a result and the rates to predict with, measured ones last; None for a card without rates."""
    try:
        card = cards.card(str(result.gpu["card"].get("name")))
    except ValueError:
        return None
    rates = [card.peak, cards.typical(card)]
    if "flops_per_second" in result.gpu["peaks"]:
        rates.append(cards.measured(card, result.gpu["peaks"]))
    return card, rates


def beside_layers(result: Result) -> tuple[list[str], list[list[str]]]:
    """(head, rows): what each layer added, measured and predicted."""
    found = rates_of(result)
    if found is None:
        return [], []
    card, rates = found
    head = ["layer", "backend", "precision", "measured", *(f"predicted at {r.name}" for r in rates), "limit"]
    rows = []
    for case in result.of_kind(*layers.KINDS):
        for arm, entry in case.arms.items():
            backend, _, precision = arm.partition("-")
            if backend not in model.BACKENDS:
                continue
            try:
                said = [model.predict_layer(case.shape(), backend, precision, card, r) for r in rates]
            except NoCosts:
                continue
            cells = [case.shape().brief, backend, precision, _percent(entry.overhead - 1)]
            rows.append([*cells, *(_percent(p.added) for p in said), said[-1].limit])
    return head, rows


def beside_operations(result: Result) -> tuple[list[str], list[list[str]]]:
    """(head, rows): microseconds of each operation, measured and predicted."""
    found = rates_of(result)
    if found is None:
        return [], []
    card, rates = found
    head = ["operation", "backend", "measured µs", *(f"predicted at {r.name}" for r in rates), "limit"]
    rows = []
    for case in result.cases.values():
        name = case.case["kind"].removeprefix(OPERATION)
        if name == case.case["kind"]:
            continue
        for backend in model.BACKENDS:
            if backend not in case.arms:
                continue
            try:
                launches = layers.launches_of(name, backend, case.shape(), card.family)
            except NoCosts:
                continue
            said = [model.predict(launches, card, r) for r in rates]
            cells = [
                case.shape().brief,
                backend,
                f"{1e6 * case.arms[backend].stats['median']:.1f}",
            ]
            rows.append([*cells, *(f"{1e6 * p.seconds:.1f}" for p in said), said[-1].limit])
    return head, rows


def _html(head: list[str], rows: list[list[str]]) -> str:
    lines = [markup.row([escape(cell) for cell in row], first="wrap") for row in rows]
    return markup.table([escape(cell) for cell in head], lines)


def _predicted(card: cards.Card, cases: list[Case]) -> str:
    usual: dict[tuple, LayerPrediction] = {
        (p.case, p.backend, p.precision): p for p in model.layers_of(card, cards.typical(card), cases)
    }
    rows = []
    for peak in model.layers_of(card, card.peak, cases):
        case, typical = peak.case, usual[(peak.case, peak.backend, peak.precision)]
        cells = [case.brief, peak.backend, peak.precision, f"{1e6 * peak.floor.seconds:.0f}"]
        rows.append([*cells, _percent(peak.added), peak.limit, _percent(typical.added), typical.limit])
    return _html(_HEAD, rows)


def _goals() -> str:
    """Each goal and what every backend is predicted to add."""
    card = cards.card("H100")
    text = ""
    for goal in model.GOALS:
        judged = {}
        for verdict in model.verdicts(goal, card):
            judged.setdefault((verdict.found.backend, verdict.found.precision), []).append(verdict)
        rows = []
        for ways, both in judged.items():
            cells = [*ways, f"{1e6 * both[0].found.floor.seconds:.0f}"]
            for verdict in both:
                css, mark = ("ok", "✓") if verdict.reached else ("bad", "✗")
                cells += [f'<span class="{css}">{_percent(verdict.found.added)} {mark}</span>', verdict.found.limit]
            rows.append(markup.row(cells))
        text += f'<p class="small" style="margin:16px 0 4px"><b>{escape(goal.sentence(card))}</b></p>'
        text += markup.table([escape(name) for name in _HEAD[1:]], rows) if rows else ""
        reason = "" if rows else "No backend states its costs, so nothing is predicted. "
        text += f'<p class="small soft">{reason}{escape(" ".join(model.least(goal, card)))}</p>'
    return text


_HEAD = ["layer", "backend", "precision", "frozen, µs", "adds, at peaks", "limit", "adds, typically", "limit"]


def section(results: Path) -> str:
    """The section of the page: predictions for every card, and what was measured beside them; empty without costs."""
    if not any(model.verdicts(goal, cards.card("H100")) for goal in model.GOALS):
        return ""
    body = _goals()
    for result in measured_results(results):
        head, rows = beside_layers(result)
        if rows:
            body += f"<h3>Measured: {escape(result.gpu['card']['name'])}</h3>" + _html(head, rows)
    for card in cards.CARDS.values():
        body += (
            f"<details class='dense'><summary>Predicted: {escape(card.name)}</summary>"
            f"<p class='small soft'>{escape(card.source)}</p>{_predicted(card, model.CASES)}</details>"
        )
    body += "".join(f'<p class="small soft">{escape(line)}</p>' for line in cards.ASSUMPTIONS)
    text = (
        f"<b>{LABEL}</b> What an adapter adds to its frozen layer, forward + backward, from the bytes, flops and "
        "launches that the kernels state and tests count, and a card's rates."
    )
    return markup.section("On GPUs, predicted", text, body)
