"""The HTML page: one file, nothing loaded from elsewhere."""

from __future__ import annotations

from html import escape

from bench import markup, plots, tables
from bench.gpu import predictions
from bench.result import HRA, RESULTS, ROTATIONS, CaseResult, Result, megabytes, ratio

# Kinds of cases with a plot and a table of their own: title, what the plot shows.
KINDS = {
    "gram_schmidt": ("HRA with Gram-Schmidt", "PEFT's <code>apply_GS=True</code>, forward + backward."),
    "conv": ("HRA on convolutions", "3 x 3, padding 1, forward + backward."),
    "decode": ("HRA, one token", "Forward under <code>no_grad</code> with a frozen adapter."),
    "oft": ("OFT", "Blocks of the input rotated, forward + backward."),
    "boft": ("BOFT", "The input through a butterfly, forward + backward; PEFT alone has one factor."),
}


def _range(values: list[float]) -> str:
    return f"{ratio(min(values))} to {ratio(max(values))}"


def _tiles(result: Result) -> str:
    tiles = []
    for kinds, what in ((("linear",), "HRA layer"), (("oft", "boft"), "OFT or BOFT layer")):
        cases = result.of_kind(*kinds)
        speedups = [speedup for case in cases if (speedup := case.speedup("auto"))]
        if speedups:
            tiles.append((f"{_range(speedups)} x", f"faster than PEFT, forward + backward of one {what}"))
        overheads = [case.arms["auto"].overhead for case in cases if "auto" in case.arms]
        if overheads:
            tiles.append((_range(overheads), f"times the frozen layer, the physical limit: one {what}"))
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
        title = escape(case.case["title"])
        tiles.append((f"{megabytes(theirs)} → {megabytes(ours)}", f"kept for backward by one layer, {title}"))
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


def render(result: Result) -> str:
    """The whole page as one string."""
    linear = result.of_kind("linear")
    sections = [
        markup.section(
            "Measured against the targets",
            "Time of one adapted layer over that of its frozen base layer, forward + backward: 1.00 is the "
            "physical limit. A tick or a cross judges the figure as printed. PEFT / auto: how many times smaller the "
            "overhead is.",
            tables.targets(result),
        )
    ]
    if linear:
        sections += _hra(linear)
    for kind, (title, text) in KINDS.items():
        if result.of_kind(kind):
            sections.append(markup.section(title, text, plots.overhead(result.of_kind(kind), title)))
    orthogonality = tables.orthogonality(result)
    if orthogonality:
        sections.append(
            markup.section(
                "How orthogonal the blocks of OFT are, and at what speed",
                "The largest |RᵀR − I|₂ of a block over the cases, beside the overhead in each. PEFT's default is five "
                "terms of its polynomial; six, an odd number of factors, and the exact Cayley map are options of PEFT "
                "(<code>num_cayley_neumann_terms=6</code>, <code>use_cayley_neumann=False</code>) and of "
                "<code>OFTLinear(terms=...)</code>.",
                orthogonality,
            )
        )
    sections.append(
        markup.section(
            "Accuracy",
            "Largest error against float64 over all shapes, and the same over that of the baseline: plain torch "
            "in the same dtype; where dtypes are mixed, PEFT's own path if it has one. At most 2 is asked of peftkern. "
            "Where PEFT keeps the gradient of the rotated input in fp32, a base layer that is called as it is rounds "
            "it once: hence the ratio of du with an fp32 adapter.",
            "".join(
                f"<h3>{group.title}</h3>{found}"
                for group in (HRA, ROTATIONS)
                if (found := tables.accuracy(result, [kind for kind in group.kinds if kind != "decode"]))
            ),
        )
    )
    sections.append(predictions.section(RESULTS))
    details = "".join(
        f"<details class='dense'><summary>{title}</summary>{tables.everything(result, (kind,))}</details>"
        for kind, title in {"linear": "HRA", **{kind: title for kind, (title, _) in KINDS.items()}}.items()
        if result.of_kind(kind)
    )
    sections.append(markup.section("Every figure", "Losses included; an arm that did not run says why.", details))
    sections.append(_method(result))
    return markup.document(
        "HRA, OFT and BOFT layers, measured",
        "peftkern against PEFT, LyCORIS, plain torch and the frozen layer that all of them adapt.",
        f"{_tiles(result)}{''.join(sections)}",
    )


def _hra(linear: list[CaseResult]) -> list[str]:
    sections = [
        markup.section(
            "HRA: overhead over the frozen layer",
            "Median of the rounds' ratios; the bar is their middle half. Lower is better. The axis is stretched "
            "towards 1; the grey line is the frozen layer.",
            plots.overhead(linear, "Overhead over the frozen layer"),
        ),
        markup.section(
            "HRA: memory kept for backward",
            "What autograd keeps of one layer beyond the frozen layer, parameters left out, the input x counted in.",
            plots.saved(linear, "Memory kept for backward"),
        ),
    ]
    if any("gain" in entry.info for case in linear for entry in case.arms.values()):
        sections.append(
            markup.section(
                "HRA: what reaches the output of a small update",
                "In half precision an update that meets an already rounded product is rounded away. Mean over the"
                " shapes, the bar is their range, the green band is 100 ± 6 %. An adapter in bf16 can only hold "
                "coarse steps, and is judged by the update that its own entries stand for.",
                plots.gain(linear, "Part of a small update that is kept"),
            )
        )
    return sections


def _method(result: Result) -> str:
    served = ", ".join(f"{operation} {backend}" for operation, backend in sorted(result.backends.items()))
    return markup.section(
        "How it was measured",
        "All arms of a row run in turn within each round, in an order in which each follows each other "
        "equally often, on the same tensors and the same weight. The overhead is the median over the rounds "
        "of the ratio to the frozen layer of the same round. Before it is timed an arm's output and gradients"
        " are compared with a float64 computation that shares no formula with it; an arm that fails is not "
        "timed. Slow arms run in fewer rounds. The adapter of HRA is one whose pairs of vectors have moved 10 % "
        "apart, those of OFT and BOFT are random rotations. LyCORIS rotates outputs instead of inputs: it gets the "
        "same blocks and is compared with the float64 layer that it makes of them.",
        f'<p class="small soft">{escape(result.setting())}. Measured {result.date}: {escape(result.name)}.</p>'
        f'<p class="small soft">Served by: {escape(served)}.</p>',
    )
