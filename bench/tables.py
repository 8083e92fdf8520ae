"""The page's tables: targets, accuracy, orthogonality, every figure."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from bench import markup, plots
from bench.arms import LABELS, is_ours
from bench.measure import GAIN_SIZES
from bench.result import (
    HRA,
    ROTATIONS,
    TARGETS,
    CaseResult,
    Entry,
    Group,
    Result,
    duration,
    megabytes,
    ratio,
    scientific,
)

_KIND_NOTES = {"decode": ", forward", "gram_schmidt": ", <code>apply_GS</code>"}
_SHORT = {
    "peft": "PEFT", "torch": "plain torch", "lycoris": "LyCORIS", "lycoris-bypass": "LyCORIS, bypass",
    "fast": "fast", "auto": "auto", "exact": "exact",
}  # fmt: skip


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


def _group(group: Group, cases: list[CaseResult]) -> str:
    arms = group.shown(cases)
    rows = []
    for case in cases:
        speed = case.speedup("auto")
        cells = [
            escape(case.case["title"]) + _KIND_NOTES.get(case.case["kind"], ""),
            *(_overhead(case, arm) for arm in arms),
            f"<b>{ratio(speed)} x</b>" if speed else "–",
            _saved(case, "peft"),
            _saved(case, "auto"),
        ]
        rows.append(markup.row(cells, first="wrap"))
    head = [group.title, *(_SHORT[arm] for arm in arms), "PEFT / auto", "PEFT keeps", "auto keeps"]
    return markup.table(head, rows)


def targets(result: Result) -> str:
    """Everything that has a target, with a mark."""
    text = ""
    for group in (HRA, ROTATIONS):
        cases = [case for case in result.table() if case.case["kind"] in group.kinds]
        if cases:
            text += _group(group, cases)
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


def accuracy(result: Result, kinds: Sequence[str]) -> str:
    """Largest errors and error ratios over all cases of some kinds, by dtype and arm; empty where there are none."""
    rows = []
    seen: set[str] = set()
    for dtype, title in plots.DTYPE_TITLES.items():
        for arm, label in LABELS.items():
            entries = [
                case.arms[arm]
                for case in result.of_kind(*kinds)
                if case.case["dtype"] == dtype and arm in case.arms and "error" in case.arms[arm].info
            ]
            if not entries:
                continue

            def worst(*parts: str, entries=entries) -> str:
                return _judged(max(entries, key=lambda found: found.error_ratio(*parts) or 0), *parts)

            error = [max(entry.info["error"][part] for entry in entries) for part in ("y", "dx", "du")]
            first = "" if title in seen else escape(title)
            seen.add(title)
            cells = [first, escape(label), *(f"{value:.1e}" for value in error)]
            cells += [worst("y"), worst("dx"), worst("du")]
            line = markup.row(cells, "ours" if is_ours(arm) else "")
            rows.append(line.replace("<td>", '<td class="name">', 2))
    head = ["dtype", "arm", "error of y", "of dx", "of du", "y against baseline", "dx", "du"]
    return markup.table(head, rows).replace("<th>arm", '<th class="name">arm') if rows else ""


def orthogonality(result: Result) -> str:
    """The orthogonality error of each arm of the OFT cases, beside its overhead; empty without such figures."""
    cases = result.of_kind("oft")
    rows = []
    for arm, error in result.orthogonality_errors("oft").items():
        cells = [escape(LABELS[arm]), f"{scientific(error)}", *(_overhead(case, arm) for case in cases)]
        rows.append(markup.row(cells, "ours" if is_ours(arm) else ""))
    heads = [escape(case.case["title"].removeprefix("OFT, ")) for case in cases]
    return markup.table(["arm", "largest |RᵀR − I|", *heads], rows) if rows else ""


def everything(result: Result, kinds: tuple[str, ...]) -> str:
    """Every figure of every arm; an arm without one says why."""
    rows = []
    cases = result.of_kind(*kinds)
    gains = any("gain" in entry.info for case in cases for entry in case.arms.values())
    rotated = any("orthogonality_error" in entry.info for case in cases for entry in case.arms.values())
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
    head += ["error y", "dx", "du", "ratio y", "dx", "du"]
    head += [f"gain at {size:g}" for size in GAIN_SIZES] if gains else []
    head += ["|RᵀR − I|"] if rotated else []

    def said(first: str, sentence: str) -> str:
        return f'<tr><td>{first}</td><td colspan="{len(head) - 1}" class="name note wrap">{escape(sentence)}</td></tr>'

    for case in cases:
        rows.append(f'<tr class="head"><td colspan="{len(head)}">{escape(case.case["title"])}</td></tr>')
        for arm, label in LABELS.items():
            if arm not in case.arms:
                if reason := case.why_missing(arm):
                    rows.append(said(escape(label), reason))
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
                *((_percent(entry.gain(size)) for size in GAIN_SIZES) if gains else ()),
                *((scientific(entry.orthogonality_error),) if rotated else ()),
            ]
            rows.append(markup.row(cells, "ours" if is_ours(arm) else ""))
            if entry.differs:
                rows.append(said("", entry.differs))
    return markup.table(head, rows)
