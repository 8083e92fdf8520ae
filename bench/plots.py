"""The page's plots: inline SVG by matplotlib. Colours are Okabe and Ito's, and every arm has a marker of its own."""

from __future__ import annotations

import io
import re
from collections.abc import Callable

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from bench.arms import LABELS
from bench.measure import GAIN_SIZES
from bench.result import CaseResult, Entry, megabytes, ratio

STYLE = {
    "frozen": ("#8a8f98", "|"),
    "peft": ("#d55e00", "s"),
    "torch": ("#e69f00", "D"),
    "lycoris": ("#009e73", "v"),
    "lycoris-bypass": ("#009e73", "<"),
    "fast": ("#56b4e9", "o"),
    "auto": ("#0072b2", "o"),
    "auto-terms6": ("#0072b2", "P"),
    "auto-cayley": ("#0072b2", "X"),
    "exact": ("#cc79a7", "^"),
}
INK, GRID = "#1f2430", "#e4e6ea"
DTYPE_TITLES = {"fp32": "fp32", "bf16": "bf16", "bf16+fp32": "bf16, fp32 adapter (PEFT's default)"}
plt.rcParams.update(
    {
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "text.color": INK,
        "axes.edgecolor": "#b7bbc2",
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        # Fixed ids: the same result gives the same page.
        "svg.hashsalt": "peftkern",
    }
)


def _svg(figure, label: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", transparent=True, metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # Scales with the page; ids are made unique, for several plots share one document.
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    prefix = re.sub(r"\W+", "-", label.lower())[:24]
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'(xlink:href="#|url\(#)', rf"\1{prefix}-", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def _shape(case: CaseResult) -> str:
    title = case.case["title"]
    return title.rsplit(", ", 1)[0]


def _legend(figure, arms: list[str]) -> None:
    handles = [
        plt.Line2D([], [], color=STYLE[arm][0], marker=STYLE[arm][1], linestyle="", markersize=6, label=LABELS[arm])
        for arm in arms
    ]
    figure.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        ncols=len(arms) if len(arms) < 7 else 4,
        frameon=False,
        handletextpad=0.2,
    )


def dots(
    cases: list[CaseResult],
    arms: list[str],
    value: Callable[[CaseResult, Entry], float | None],
    label: str,
    spread: Callable[[CaseResult, Entry], tuple[float, float]] | None = None,
    form: Callable[[float], str] = ratio,
    ticks: list[float] = (),
    line: float | None = None,
    zero: float = 0.0,
) -> str:
    """Dot plot, a panel per dtype, a line per shape: `value` of each arm with its spread, along log(value - zero)."""
    dtypes = [dtype for dtype in DTYPE_TITLES if any(case.case["dtype"] == dtype for case in cases)]
    shapes = list(dict.fromkeys(_shape(case) for case in sorted(cases, key=lambda c: _size(c.case))))
    arms = [arm for arm in arms if any(arm in case.arms for case in cases)]
    entries = [(case, case.arms[arm]) for case in cases for arm in arms if arm in case.arms]
    reached = [value(*item) for item in entries] + [
        end for item in entries for end in (spread(*item) if spread else ())
    ]
    reached = [number for number in reached if number] + ([line] if line is not None else [])
    # A margin at both ends, along the stretched axis.
    margin = ((max(reached) - zero) / (min(reached) - zero)) ** 0.03 * 1.03
    low, high = (min(reached) - zero) / margin + zero, (max(reached) - zero) * margin + zero
    # Arms that agree would hide each other on one line.
    apart = min(0.13, 0.84 / len(arms))
    figure, axes = plt.subplots(
        1,
        len(dtypes),
        figsize=(11, 0.62 + max(0.36, 0.08 * len(arms)) * len(shapes)),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="tight",
    )
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        axis.set_title(DTYPE_TITLES[dtype])
        for case in cases:
            if case.case["dtype"] != dtype:
                continue
            row = shapes.index(_shape(case))
            offsets = {arm: (i - (len(arms) - 1) / 2) * apart for i, arm in enumerate(arms)}
            for arm in arms:
                number = value(case, case.arms[arm]) if arm in case.arms else None
                if not number:
                    continue
                colour, marker = STYLE[arm]
                at = row + offsets[arm]
                if spread:
                    axis.plot(spread(case, case.arms[arm]), (at, at), color=colour, lw=1.6, alpha=0.5, zorder=2)
                axis.plot(number, at, color=colour, marker=marker, ms=5.5, mec="white", mew=0.6, zorder=3)
        axis.set_xscale(
            "function", functions=(lambda x: np.log(np.maximum(x - zero, 1e-3)), lambda t: np.exp(t) + zero)
        )
        axis.xaxis.set_major_locator(FixedLocator(_thinned(ticks, low, high, zero, 0.034 * len(dtypes))))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: form(x)))
        axis.grid(axis="x", color=GRID, lw=0.8)
        axis.set_axisbelow(True)
        axis.tick_params(length=0)
        for row in range(0, len(shapes), 2):
            axis.axhspan(row - 0.5, row + 0.5, color="#f5f6f8", zorder=0)
        if line is not None:
            axis.axvline(line, color=STYLE["frozen"][0], lw=1.2, zorder=1)
    axes[0][0].set_yticks(range(len(shapes)), shapes)
    axes[0][0].set_xlim(low, high)
    axes[0][0].set_ylim(len(shapes) - 0.5, -0.5)
    _legend(figure, arms)
    return _svg(figure, label)


def _size(case: dict) -> tuple:
    return (case["kind"], case["width_in"], case["tokens"], case["r"])


def _thinned(ticks: list[float], low: float, high: float, zero: float, gap: float) -> list[float]:
    """The ticks between low and high whose labels keep clear of each other; gap: a part of the axis."""
    length = np.log(high - zero) - np.log(low - zero)
    kept: list[float] = []
    for tick in ticks:
        if low <= tick <= high and (not kept or np.log((tick - zero) / (kept[-1] - zero)) > gap * length):
            kept.append(tick)
    return kept


def overhead(cases: list[CaseResult], label: str) -> str:
    return dots(
        cases,
        [arm for arm in LABELS if arm != "frozen"],
        lambda case, entry: max(entry.overhead, 0.85),
        label,
        spread=lambda case, entry: tuple(max(x, 0.85) for x in entry.spread),
        form=lambda x: f"{x:g}",
        ticks=[1, 1.2, 1.5, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000],
        line=1.0,
        # Most of what there is to see lies between 1 and 1.5.
        zero=0.8,
    )


def saved(cases: list[CaseResult], label: str) -> str:
    return dots(
        cases,
        ["peft", "torch", "fast", "auto"],
        lambda case, entry: entry.saved + entry.kept_x if entry.saved is not None else None,
        label,
        form=lambda x: megabytes(x).replace(".0 ", " "),
        ticks=[2.0**power for power in range(10, 36, 3)],
    )


def gain(cases: list[CaseResult], label: str) -> str:
    """Kept part of an update by its size: the mean of the cases of a dtype, and their range."""
    dtypes = [
        dtype
        for dtype in ("bf16", "bf16+fp32")
        if any(case.case["dtype"] == dtype and "gain" in entry.info for case in cases for entry in case.arms.values())
    ]
    arms = ["peft", "torch", "fast", "auto", "exact"]
    figure, axes = plt.subplots(
        1, len(dtypes), figsize=(5.5 * len(dtypes), 2.9), sharey=True, squeeze=False, layout="tight"
    )
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        axis.set_title(DTYPE_TITLES[dtype])
        axis.axhspan(94, 106, color="#eaf4ea", zorder=0)
        for place, arm in enumerate(arms):
            runs = [
                [case.arms[arm].gain(size) for size in GAIN_SIZES]
                for case in cases
                if case.case["dtype"] == dtype and arm in case.arms and case.arms[arm].gain(GAIN_SIZES[0]) is not None
            ]
            if not runs:
                continue
            colour, marker = STYLE[arm]
            columns = [[100 * run[i] for run in runs] for i in range(len(GAIN_SIZES))]
            mean = [sum(column) / len(column) for column in columns]
            at = [i + (place - 2) * 0.045 for i in range(len(GAIN_SIZES))]
            axis.plot(at, mean, color=colour, marker=marker, ms=6, mec="white", mew=0.7, lw=1.6, zorder=3)
            for i, column in enumerate(columns):
                axis.plot((at[i], at[i]), (min(column), max(column)), color=colour, lw=1.6, alpha=0.5, zorder=2)
        axis.set_xticks(range(len(GAIN_SIZES)), [f"{size:g}" for size in GAIN_SIZES])
        axis.set_xlabel("size of the update, relative to the output")
        axis.set_ylim(0, 118)
        axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.0f} %"))
        axis.grid(axis="y", color=GRID, lw=0.8)
        axis.set_axisbelow(True)
        axis.tick_params(length=0)
    _legend(figure, [arm for arm in arms if any("gain" in c.arms[arm].info for c in cases if arm in c.arms)])
    return _svg(figure, label)
