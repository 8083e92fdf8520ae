"""The HTML page: one file, nothing loaded from elsewhere."""

from __future__ import annotations

from html import escape

from bench import markup, plots
from bench.arms import LABELS
from bench.gpu import predictions
from bench.measure import GAIN_SIZES
from bench.result import RESULTS, TARGETS, CaseResult, Entry, Result, duration, megabytes, ratio

_KIND_NOTES = {"decode": ", forward", "gram_schmidt": ", <code>apply_GS</code>"}


def _mark(met: bool, text: str, note: str) -> str:
    return (
        f'<span class="{"ok" if met else "bad"}">{text} {"✓" if met else "✗"}</span> <span class="note">{note}</span>'
    )


def _overhead(case: CaseResult, arm: str) -> str:
    if arm not in case.arms:
        return f'<span class="note" title="{escape(case.why_missing(arm) or "not measured")}">–</span>'
    entry, target = case.arms[arm], case.target(arm)
    text = ratio(entry.overhead)
    if target is None:
        return text
    return _mark(float(text) <= target, text, f"≤ {target:g}")


def _saved(case: CaseResult, arm: str) -> str:
    if arm not in case.arms or case.arms[arm].saved is None:
        return "–"
    entry, target = case.arms[arm], case.saved_target()
    text = f"x + {megabytes(entry.saved)}" if entry.kept_x else megabytes(entry.saved)
    return _mark(entry.saved <= target, text, "") if arm != "peft" else text


def _targets(result: Result) -> str:
    rows = []
    for case in result.table():
        speed = case.speedup("auto")
        rows.append(
            markup.row(
                [
                    escape(case.case["title"]) + _KIND_NOTES.get(case.case["kind"], ""),
                    *(_overhead(case, arm) for arm in ("peft", "torch", "fast", "auto")),
                    f"<b>{ratio(speed)} x</b>" if speed else "–",
                    _saved(case, "peft"),
                    _saved(case, "auto"),
                ]
            )
        )
    head = ["layer", "PEFT", "plain torch", "fast", "auto", "faster than PEFT", "PEFT keeps", "auto keeps"]
    text = markup.table(head, rows)
    missing = [name for name in TARGETS["overhead"] if name not in result.cases]
    if missing:
        text += f'<p class="small soft">Not in this run: {", ".join(map(escape, missing))}.</p>'
    notes = []
    if result.import_seconds is not None:
        target = TARGETS["import_seconds"]
        seconds = result.import_seconds
        mark = _mark(seconds <= target, f"{1e3 * seconds:.0f} ms", f"of {1e3 * target:g} ms")
        notes.append(f"<code>import peftkern</code> beyond torch: {mark}")
    gains = [
        entry.gain(size)
        for case in result.of_kind("linear")
        for entry in [case.arms.get(TARGETS["gain"]["arm"])]
        if entry
        for size in GAIN_SIZES
        if entry.gain(size) is not None
    ]
    if gains:
        low, high = TARGETS["gain"]["low"], TARGETS["gain"]["high"]
        text_of = f"{100 * min(gains):.0f} to {100 * max(gains):.0f} %"
        met = low <= min(gains) and max(gains) <= high
        notes.append(
            f"part of a small update that <code>exact</code> keeps: "
            f"{_mark(met, text_of, f'of {100 * low:g} to {100 * high:g} %, {len(gains)} measurements')}"
        )
    return text + "".join(f'<p class="small" style="margin:10px 0 0">{note}</p>' for note in notes)


def _tiles(result: Result) -> str:
    tiles = []
    speedups = {case.case["id"]: case.speedup("auto") for case in result.of_kind("linear") if case.speedup("auto")}
    if speedups:
        best = result.cases[max(speedups, key=speedups.get)]
        worst = result.cases[min(speedups, key=speedups.get)]
        low, high = ratio(speedups[worst.case["id"]]), ratio(speedups[best.case["id"]])
        tiles.append(
            (f"{low} to {high} x", "faster than PEFT, forward + backward of one layer, over all shapes and dtypes")
        )
    overheads = [case.arms["auto"].overhead for case in result.of_kind("linear") if "auto" in case.arms]
    if overheads:
        tiles.append(
            (
                f"{ratio(min(overheads))} to {ratio(max(overheads))}",
                "times the frozen layer, which is the physical limit",
            )
        )
    savings = [
        (
            (case.arms["peft"].saved + case.arms["peft"].kept_x),
            (case.arms["auto"].saved + case.arms["auto"].kept_x),
            case,
        )
        for case in result.table()
        if {"peft", "auto"} <= case.arms.keys() and case.arms["auto"].saved is not None
    ]
    if savings:
        theirs, ours, case = max(savings, key=lambda item: item[0])
        tiles.append(
            (
                f"{megabytes(theirs)} → {megabytes(ours)}",
                f"kept for backward by one layer, {escape(case.case['title'])}",
            )
        )
    decode = [case for case in result.of_kind("decode") if "auto" in case.arms]
    if decode:
        case = max(decode, key=lambda c: c.speedup("auto") or 0)
        tiles.append(
            (f"{ratio(case.speedup('auto'))} x", f"faster than PEFT at one token, {escape(case.case['title'])}")
        )
    return (
        '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{a}</b><span>{b}</span></div>' for a, b in tiles)
        + "</div>"
    )


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def _errors(entry: Entry) -> list[str]:
    error = entry.info.get("error", {})
    return [f"{error[part]:.1e}" if part in error else "–" for part in ("y", "dx", "du")]


def _judged(entry: Entry, *parts: str) -> str:
    value = entry.error_ratio(*parts)
    if value is None:
        return "–"
    text = ratio(value)
    return text if value <= TARGETS["error_ratio"] else f'<span class="bad">{text}</span>'


def _accuracy(result: Result) -> str:
    """Largest errors and error ratios over all cases, by dtype and arm."""
    rows = []
    seen: set[str] = set()
    for dtype, title in plots.DTYPE_TITLES.items():
        for arm in ("peft", "torch", "fast", "auto", "exact"):
            entries = [
                (case, case.arms[arm])
                for case in result.of_kind("linear", "gram_schmidt")
                if case.case["dtype"] == dtype and arm in case.arms
            ]
            if not entries:
                continue

            def worst(*parts: str, entries=entries) -> str:
                return _judged(max(entries, key=lambda item: item[1].error_ratio(*parts) or 0)[1], *parts)

            error = [max(entry.info["error"][part] for _, entry in entries) for part in ("y", "dx", "du")]
            css = "ours" if arm in ("fast", "auto", "exact") else ""
            first = "" if title in seen else escape(title)
            seen.add(title)
            cells = [first, escape(LABELS[arm]), *(f"{value:.1e}" for value in error)]
            rows.append(
                markup.row([*cells, worst("y"), worst("dx"), worst("du")], css).replace("<td>", '<td class="name">', 2)
            )
    head = ["dtype", "arm", "error of y", "of dx", "of du", "y against baseline", "dx", "du"]
    return markup.table(head, rows).replace("<th>arm", '<th class="name">arm')


def _everything(result: Result, kinds: tuple[str, ...]) -> str:
    rows = []
    head = [
        "arm",
        "overhead",
        "middle half",
        "by medians",
        "by minima",
        "time",
        "rounds",
        "kept beyond frozen",
        "keeps x",
    ]
    head += ["error y", "dx", "du", "ratio y", "dx", "du", *(f"gain at {size:g}" for size in GAIN_SIZES)]
    for case in result.of_kind(*kinds):
        rows.append(f'<tr class="head"><td colspan="{len(head)}">{escape(case.case["title"])}</td></tr>')
        for arm, label in LABELS.items():
            if arm not in case.arms:
                reason = case.why_missing(arm)
                if reason:
                    rows.append(
                        f'<tr><td>{escape(label)}</td><td colspan="{len(head) - 1}" class="name note">'
                        f"{escape(reason)}</td></tr>"
                    )
                continue
            entry = case.arms[arm]
            times = entry.info["overhead"]
            low, high = entry.spread
            cells = [
                escape(label),
                ratio(entry.overhead),
                f"{ratio(low)} – {ratio(high)}",
                ratio(times["ratio_of_medians"]),
                ratio(times["ratio_of_minima"]),
                duration(entry.stats["median"]),
                str(times["rounds"]),
                megabytes(entry.saved),
                "yes" if entry.kept_x else "no",
                *_errors(entry),
                *(_judged(entry, part) for part in ("y", "dx", "du")),
                *(_percent(entry.gain(size)) for size in GAIN_SIZES),
            ]
            rows.append(markup.row(cells, "ours" if arm in ("fast", "auto", "exact") else ""))
    return markup.table(head, rows)


def render(result: Result) -> str:
    """The whole page as one string."""
    linear = result.of_kind("linear")
    served = ", ".join(f"{operation} {backend}" for operation, backend in sorted(result.backends.items()))
    sections = [
        markup.section(
            "Measured against the targets",
            "Time of one adapted layer over that of its frozen base layer, forward + backward: 1.00 is the "
            "physical limit. A tick or a cross judges the figure as printed.",
            _targets(result),
        ),
        markup.section(
            "Overhead over the frozen layer",
            "Median of the rounds' ratios; the bar is their middle half. Lower is better. "
            "The axis is stretched towards 1; the grey line is the "
            "frozen layer.",
            plots.overhead(linear, "Overhead over the frozen layer"),
        ),
        markup.section(
            "Memory kept for backward",
            "What autograd keeps of one layer beyond the frozen layer, parameters left out, the input x counted in.",
            plots.saved(linear, "Memory kept for backward"),
        ),
    ]
    if any("gain" in entry.info for case in linear for entry in case.arms.values()):
        sections.append(
            markup.section(
                "What reaches the output of a small update",
                "In half precision an update that meets an already rounded product is rounded away. Mean over the"
                " shapes, the bar is their range, the green band is 100 ± 6 %. An adapter in bf16 can only hold "
                "coarse steps, and is judged by the update that its own entries stand for.",
                plots.gain(linear, "Part of a small update that is kept"),
            )
        )
    sections.append(
        markup.section(
            "Accuracy",
            "Largest error against float64 over all shapes, and the same over that of the baseline: plain torch "
            "in the same dtype; where dtypes are mixed, PEFT's own path. At most 2 is asked. Where PEFT keeps the"
            " gradient of the rotated input in fp32, a base layer that is called as it is rounds it once: hence "
            "the ratio of du with an fp32 adapter.",
            _accuracy(result),
        )
    )
    for kind, title, text in (
        ("gram_schmidt", "HRA with Gram-Schmidt", "PEFT's <code>apply_GS=True</code>, forward + backward."),
        ("conv", "HRA on convolutions", "3 x 3, padding 1, forward + backward."),
        ("decode", "One-token decoding", "Forward under <code>no_grad</code> with a frozen adapter."),
        ("oft", "OFT", "Blocks of the input rotated, forward + backward."),
        ("boft", "BOFT", "The input through a butterfly, forward + backward; PEFT alone has one factor."),
    ):
        if result.of_kind(kind):
            sections.append(markup.section(title, text, plots.overhead(result.of_kind(kind), title)))
    sections.append(predictions.section(RESULTS))
    tables = "".join(
        f"<details class='dense'><summary>{title}</summary>{_everything(result, (kind,))}</details>"
        for kind, title in (
            ("linear", "Linear layers"),
            ("gram_schmidt", "Gram-Schmidt"),
            ("conv", "Convolutions"),
            ("decode", "One-token decoding"),
            ("oft", "OFT"),
            ("boft", "BOFT"),
        )
        if result.of_kind(kind)
    )
    sections.append(markup.section("Every figure", "Losses included; an arm that did not run says why.", tables))
    sections.append(
        markup.section(
            "How it was measured",
            "All arms of a row run in turn within each round, in an order in which each follows each other "
            "equally often, on the same tensors and the same weight. The overhead is the median over the rounds "
            "of the ratio to the frozen layer of the same round. Before it is timed an arm's output and gradients"
            " are compared with a float64 computation that shares no formula with it; an arm that fails is not "
            "timed. Slow arms run in fewer rounds. The adapter is one whose pairs of vectors have moved 10 % "
            "apart.",
            f'<p class="small soft">{escape(result.setting())}. Measured {result.date}: {escape(result.name)}.</p>'
            f'<p class="small soft">Served by: {escape(served)}.</p>',
        )
    )
    return markup.document(
        "Householder reflection adapters, measured",
        "peftkern against PEFT, plain torch and the frozen layer that all of them adapt.",
        f"{_tiles(result)}{''.join(sections)}",
    )
