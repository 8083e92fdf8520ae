"""The report of a run on a GPU: an HTML page, and its tables as text. Needs nothing beyond torch."""

from __future__ import annotations

from collections.abc import Callable
from html import escape

from bench import layers, markup
from bench.arms import label
from bench.cases import OPERATION, Case
from bench.gpu import contenders, predictions
from bench.result import HRA, ROTATIONS, CaseResult, Result, duration, megabytes, ratio

DRY = "A dry run on a machine without a GPU: its figures mean nothing."


def _arms(cases: list[CaseResult]) -> list[str]:
    """Contenders in their usual order, of which any case has a row or a reason."""
    shapes = [Case(kind, 1, 1, 1, 1, "fp32") for kind in (*layers.KINDS, OPERATION)]
    listed = list(dict.fromkeys(name for case in shapes for name in contenders.names(case)))
    return [name for name in listed if any(name in case.arms or case.why_missing(name) for case in cases)]


def table(cases: list[CaseResult], value: Callable[[CaseResult, str], str]) -> tuple[list[str], list[list[str]]]:
    """(head, rows of cells): a row per case; `value` of every contender that any case has, or refused."""
    arms = [arm for arm in _arms(cases) if any(arm in case.arms or case.refused(arm) for case in cases)]
    return ["layer", *map(label, arms)], [[case.shape().brief, *(value(case, arm) for arm in arms)] for case in cases]


def _cell(case: CaseResult, arm: str, text: Callable) -> str:
    if arm in case.arms:
        return text(case.arms[arm])
    reason = case.why_missing(arm)
    return "–" if reason is None else "refused" if case.refused(arm) else "n/a"


def total(case: CaseResult, arm: str) -> str:
    def show(entry):
        text = duration(entry.stats["median"]) if arm == "frozen" else ratio(entry.overhead)
        return text + "*" * entry.info["host_bound"]

    return _cell(case, arm, show)


def forward(case: CaseResult, arm: str) -> str:
    def show(entry):
        if arm == "frozen":
            return duration(entry.info["forward"]["median"])
        return ratio(entry.info["forward_overhead"]["median_of_ratios"])

    return _cell(case, arm, show)


def peak(case: CaseResult, arm: str) -> str:
    return _cell(case, arm, lambda entry: megabytes(entry.info.get("peak_bytes")))


def operation(case: CaseResult, arm: str) -> str:
    def show(entry):
        own = duration(entry.stats["median"])
        return own if arm == "frozen" else f"{own} ({100 * entry.overhead:.1f} %)"

    return _cell(case, arm, show)


def _operations(result: Result) -> list[CaseResult]:
    return [case for case in result.cases.values() if case.case["kind"].startswith(OPERATION)]


def _html(head: list[str], rows: list[list[str]]) -> str:
    lines = [markup.row([escape(cell) for cell in row], first="wrap") for row in rows]
    return markup.table([escape(cell) for cell in head], lines)


def _layers(result: Result, value: Callable[[CaseResult, str], str]) -> list[tuple[list[str], list[list[str]]]]:
    """A table of HRA's layers and one of those that rotate blocks, as far as there are any."""
    found = [result.of_kind(*group.kinds) for group in (HRA, ROTATIONS)]
    return [table(cases, value) for cases in found if cases]


def _tokens(result: Result) -> str:
    return " or ".join(map(str, sorted({case.case["tokens"] for case in result.cases.values()})))


def _plain(head: list[str], rows: list[list[str]]) -> str:
    width = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    line = "  ".join
    return "\n".join(line(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, width, strict=True)))
                     for row in [head, *rows])  # fmt: skip


def card_rows(gpu: dict) -> list[list[str]]:
    """What the card is and what it reached."""
    found, peaks = gpu["card"], gpu["peaks"]
    rows = [[name.replace("_", " "), str(value)] for name, value in found.items() if value is not None]
    if "copy_bytes_per_second" in peaks:
        rows.append(["copy, bytes read and written", f"{peaks['copy_bytes_per_second'] / 1e12:.2f} TB/s"])
        rows += [
            [f"matrix product, {kind.replace('_', ' ')}", f"{rate / 1e12:.3g} TF/s"]
            for kind, rate in peaks["flops_per_second"].items()
        ]
        rows.append(["gap between two launches", duration(peaks["launch_seconds"])])
    return rows


def _steps(gpu: dict) -> str:
    state = {True: '<span class="ok">ok</span>', False: '<span class="bad">failed</span>', None: "not run, or in part"}
    rows = []
    for step in gpu["steps"]:
        said = "<br>".join(escape(sentence) for sentence in step["said"]) or "–"
        failures = "".join(f"<br>{escape(f['test'])}: {escape(f['said'])}" for f in step.get("failures", []))
        cells = [escape(step["name"]), state[step["ok"]], duration(step["seconds"]), said + failures]
        rows.append(markup.row(cells).replace("<td>", '<td class="wrap name">'))
    return markup.table(["step", "", "time", "what it says"], rows)


def _reasons(cases: list[CaseResult]) -> list[str]:
    """Every contender without a row and why, each sentence once, with the cases it holds for."""
    found: dict[tuple[str, str], list[str]] = {}
    for case in cases:
        for arm in _arms([case]):
            reason = case.why_missing(arm)
            if reason and arm not in case.arms:
                found.setdefault((arm, reason), []).append(case.shape().brief)
    lines = []
    for (arm, reason), titles in found.items():
        where = titles[0] if len(titles) == 1 else f"{len(titles)} cases"
        lines.append(f"{label(arm)} ({where}): {reason}")
    return lines


def text(result: Result) -> str:
    """The tables for a terminal."""
    gpu, totals = result.gpu, _layers(result, total)
    parts = [DRY] if gpu["dry_run"] else []
    parts.append("\n".join(f"{name}: {value}" for name, value in card_rows(gpu)))
    if totals:
        parts.append("forward + backward, over the frozen layer (frozen layer: its time)")
        parts += [_plain(*found) for found in totals]
    if _operations(result):
        parts.append("operations (share of the frozen layer's forward + backward)")
        parts.append(_plain(*table(_operations(result), operation)))
    parts += _reasons(list(result.cases.values()))
    if gpu["dropped"]:
        parts.append(f"not timed, for want of time: {len(gpu['dropped'])} cases")
    return "\n\n".join(part for part in parts if part)


def render(result: Result) -> str:
    """The whole page as one string."""
    gpu = result.gpu
    sections = [markup.section("The card", "As it describes itself, and as measured.", _html(["", ""], card_rows(gpu)))]
    for value, title, said in (
        (
            total,
            "Forward + backward",
            f"{_tokens(result)} tokens. Device time over that of the frozen layer, whose own time stands first; median "
            "of the rounds' ratios. * the device waited for Python within the step, as it would in use.",
        ),
        (forward, "Forward alone", "From the same runs."),
        (peak, "Peak memory", "Most memory allocated during forward + backward beyond parameters, x and dy."),
    ):
        if tables := _layers(result, value):
            sections.append(markup.section(title, said, "".join(_html(*found) for found in tables)))
    if _operations(result):
        sections.append(
            markup.section(
                "Operations",
                "Device time of one call, and its share of the frozen layer's forward + backward.",
                _html(*table(_operations(result), operation)),
            )
        )
    beside = [predictions.beside_layers(result), predictions.beside_operations(result)]
    if any(rows for _, rows in beside):
        tables = "".join(_html(head, rows) for head, rows in beside if rows)
        said = f"<b>{predictions.LABEL}</b> What a layer adds to its frozen layer, and operations in microseconds."
        sections.append(markup.section("Predicted beforehand, and measured", said, tables))
    reasons = _reasons(list(result.cases.values()))
    if reasons:
        body = "".join(f'<p class="small">{escape(line)}</p>' for line in reasons)
        sections.append(markup.section("What has no figure", "Each contender that was not timed, and why.", body))
    dropped = "".join(f"<li>{escape(name)}</li>" for name in gpu["dropped"]) or "<li>nothing</li>"
    sections.append(markup.section("Steps", "None depends on another's success.", _steps(gpu)))
    sections.append(
        markup.section(
            "How it was measured",
            "Each round runs every contender once, in an order in which each follows each other equally often. A "
            "waiting kernel holds the device while the host enqueues a whole step, so that CUDA events see the "
            "device's time without gaps. Before it is timed a contender's output and gradients are compared with a "
            "float64 computation that shares no formula with it; one that fails is not timed.",
            f'<p class="small soft">{escape(_setting(result))}</p>'
            f'<p class="small soft">Order: {escape(gpu["order"] or "nothing was timed")}. Dropped for want of time:</p>'
            f'<ul class="small soft">{dropped}</ul>',
        )
    )
    lead = escape(str(gpu["card"].get("name") or "no GPU")) + (f". <b>{DRY}</b>" if gpu["dry_run"] else "")
    return markup.document("HRA, OFT and BOFT layers on a GPU", lead, "".join(sections))


def _setting(result: Result) -> str:
    listed = ", ".join(f"{name} {version}" for name, version in result.gpu["versions"].items() if version)
    return f"{listed}; commit {result.commit}; {result.date}: {result.name}"
