"""The tables of README.md, generated from a result file between two markers."""

from __future__ import annotations

import re
from pathlib import Path

from bench.measure import GAIN_SIZES
from bench.result import ROTATIONS, CaseResult, Result, megabytes, ratio, scientific

BEGIN, END = "<!-- bench:hra:begin -->", "<!-- bench:hra:end -->"
ARMS = {
    "peft": "PEFT",
    "torch": "plain torch",
    "lycoris": "LyCORIS",
    "lycoris-bypass": "LyCORIS, bypass mode",
    "auto": "peftkern `auto`",
    "auto-terms6": "peftkern `auto`, 6 terms",
    "auto-cayley": "peftkern `auto`, exact Cayley map",
    "exact": "peftkern `exact`",
}
GAIN_CASE = "linear-2048x2048-t1024-r8-bf16+fp32"


class MarkersMissing(ValueError):
    pass


def _measured(case: CaseResult, arm: str) -> str:
    if arm not in case.arms:
        return "refused" if case.refused(arm) else "–"
    value, target = case.arms[arm].overhead, case.target(arm)
    text = ratio(value)
    if target is None:
        return text
    # Judged as printed: 1.064 prints as 1.06 and meets 1.06.
    return f"**{text}** ✓" if float(text) <= target else f"**{text}** ✗ (target {target:g})"


def _saved(case: CaseResult, arm: str) -> str:
    if arm not in case.arms or case.arms[arm].saved is None:
        return "–"
    entry = case.arms[arm]
    return megabytes(entry.saved + entry.kept_x)


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


def block(result: Result) -> str:
    """Markdown between the markers, without them."""
    lines = [
        "One HRA layer, forward + backward, time relative to the frozen base layer (1.00 is the physical limit); "
        "the last two columns are what it keeps in memory for backward:",
        "",
    ]
    rows = []
    for case in result.table():
        if case.case["kind"] in ROTATIONS.kinds:
            continue
        title = case.case["title"]
        if case.case["kind"] == "decode":
            title = title.replace("1 token", "1 token, forward only")
        if case.case["kind"] == "gram_schmidt":
            title += ", `apply_GS`"
        cells = [_measured(case, arm) for arm in ("peft", "torch", "fast", "auto")]
        rows.append([title, *cells, _saved(case, "peft"), _saved(case, "auto")])
    head = ["layer", "PEFT", "plain torch", "peftkern `fast`", "peftkern `auto`", "PEFT keeps", "peftkern keeps"]
    lines += _table(head, rows)
    lines += _rotations(result)

    gains = result.cases.get(GAIN_CASE)
    if gains and any("gain" in entry.info for entry in gains.arms.values()):
        lines += ["", "How much of a small update reaches the output (bf16 base, fp32 adapter; 100 % keeps it):", ""]
        arms = [("PEFT", "peft"), ("plain torch", "torch"), ("peftkern `fast`", "fast"), ("peftkern `auto`", "auto")]
        rows = []
        for label, arm in arms:
            found = [gains.arms[arm].gain(size) if arm in gains.arms else None for size in GAIN_SIZES]
            rows.append([label, *("–" if value is None else f"{100 * value:.0f} %" for value in found)])
        lines += _table(["update, relative to the output", *(f"{size:g}" for size in GAIN_SIZES)], rows)

    if result.import_seconds is not None:
        lines += ["", f"`import peftkern` takes {1e3 * result.import_seconds:.0f} ms beyond torch."]
    lines += ["", f"Measured {result.date} on {result.setting()} (`bench/results/{result.name}`)."]
    return "\n".join(lines)


def _rotations(result: Result) -> list[str]:
    """The tables of OFT and BOFT."""
    cases = [case for case in result.table() if case.case["kind"] in ROTATIONS.kinds]
    if not cases:
        return []
    arms = ROTATIONS.shown(cases)
    lines = ["", "One OFT or BOFT layer, in the same way (`auto` is `fast` here; PEFT has no second factor):", ""]
    head = ["layer", *(ARMS[arm] for arm in arms), "PEFT keeps", "peftkern keeps"]
    rows = []
    for case in cases:
        cells = [_measured(case, arm) for arm in arms]
        rows.append([case.case["title"], *cells, _saved(case, "peft"), _saved(case, "auto")])
    lines += _table(head, rows)

    errors = result.orthogonality_errors("oft")
    if errors:
        lines += ["", "How far the blocks of OFT are from orthogonal, and what that takes beside the frozen layer:", ""]
        cases = [case for case in cases if case.case["kind"] == "oft"]
        head = ["", "largest \\|RᵀR − I\\|", *(case.case["title"].removeprefix("OFT, ") for case in cases)]
        rows = [
            [ARMS[arm], scientific(error), *(_measured(case, arm) for case in cases)]
            for arm, error in errors.items()
            if arm in ARMS
        ]
        lines += _table(head, rows)
    return lines


def _split(text: str, where: str) -> tuple[str, str, str]:
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise MarkersMissing(f"{where} must hold one line `{BEGIN}` and after it one line `{END}`; it does not")
    before, rest = text.split(BEGIN)
    inside, after = rest.split(END)
    return before, inside, after


def write(result: Result, path: Path) -> None:
    """Put the generated tables between the markers of `path`. Raises MarkersMissing."""
    before, _, after = _split(path.read_text(), str(path))
    path.write_text(f"{before}{BEGIN}\n{block(result)}\n{END}{after}")


def check(path: Path, results: Path) -> str | None:
    """None where the tables of `path` are those of the result file they name; else a sentence that says what is wrong.

    Empty markers are right as long as there is no result file.
    """
    _, inside, _ = _split(path.read_text(), str(path))
    inside = inside.strip()
    if not inside:
        files = sorted(results.glob("*.json"))
        return f"{path} has no tables though {files[0]} exists; run `make report`" if files else None
    source = re.search(r"\(`bench/results/([^`/]+)`\)", inside)
    if source is None:
        return f"the tables in {path} do not name their result file; run `make report`"
    file = results / source[1]
    if not file.exists():
        return f"{path} was made from {file}, which does not exist; run `make report`"
    if inside != block(Result.load(file)):
        return f"the tables in {path} are not those of {file}; run `make report`"
    return None
