"""What `accelerate` did, layer by layer, and the small table it prints."""

import re
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Layer:
    """One accelerated layer: its kind (HRALinear, ...), adapters, and the precision that serves it, with the reason."""

    kind: str
    adapters: tuple
    precision: str
    reason: str


def table(header, rows):
    """Rows of strings as lines of text, columns aligned, a rule under the header."""
    rows = [tuple(map(str, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    ]
    return "\n".join((lines[0], "  ".join("-" * width for width in widths), *lines[1:]))


def _grouped(entries):
    """(name, rest) pairs as (pattern, count, rest): names that differ only in numbers share a line."""
    groups = {}
    for name, rest in entries:
        groups.setdefault((re.sub(r"(?<![^.])\d+(?![^.])", "*", name), rest), []).append(name)
    return [(names[0] if len(names) == 1 else key[0], len(names), key[1]) for key, names in groups.items()]


@dataclass
class Report:
    """The result of `peftkern.accelerate`.

    Attributes:
        replaced: names of the layers that peftkern serves.
        skipped: (name, reason) of the adapter layers that PEFT serves as before.
        reason: why nothing was done at all, or None.
        layers: name to `Layer`, for every name in `replaced`.
    """

    replaced: list = field(default_factory=list)
    skipped: list = field(default_factory=list)
    reason: str | None = None
    layers: dict = field(default_factory=dict)

    def __str__(self):
        if self.reason is not None:
            return f"peftkern: nothing accelerated: {self.reason}"
        title = f"peftkern: {len(self.replaced)} layers accelerated, {len(self.skipped)} left to PEFT"
        rows = []
        for name, count, layer in _grouped(self.layers.items()):
            served = f"{layer.precision} ({layer.reason})" if layer.reason else layer.precision
            rows.append((name or "(the model itself)", count, layer.kind, ", ".join(layer.adapters), served))
        for name, count, reason in _grouped(self.skipped):
            rows.append((name or "(the model itself)", count, "-", "-", f"PEFT: {reason}"))
        return f"{title}\n{table(('layer', 'count', 'kind', 'adapters', 'precision'), rows)}"

    __repr__ = __str__
