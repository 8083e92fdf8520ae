"""A result file of pytest-benchmark, read back as cases and arms."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path

from bench.arms import LABELS
from bench.cases import Case

RESULTS = Path(__file__).parent / "results"
TARGETS = json.loads((Path(__file__).parent / "targets.json").read_text())


@dataclass
class Entry:
    """One arm of one case: the extra_info of its row and pytest-benchmark's statistics of its seconds."""

    info: dict
    stats: dict

    @property
    def overhead(self) -> float:
        return self.info["overhead"]["median_of_ratios"]

    @property
    def spread(self) -> tuple[float, float]:
        """Quartiles of the per-round ratios."""
        return self.info["overhead"]["q1"], self.info["overhead"]["q3"]

    @property
    def saved(self) -> int | None:
        return self.info.get("saved_beyond_frozen_bytes")

    @property
    def kept_x(self) -> int:
        return self.info.get("saved_x_bytes", 0)

    @property
    def differs(self) -> str | None:
        """In what the layer that this arm makes differs from the others'."""
        return self.info.get("differs")

    @property
    def orthogonality_error(self) -> float | None:
        return self.info.get("orthogonality_error")

    def error_ratio(self, *parts: str) -> float | None:
        """Largest of the ratios of the named parts to the baseline's."""
        ratios = self.info.get("error_ratio", {})
        found = [ratios[part] for part in parts if part in ratios]
        return max(found) if found else None

    def gain(self, size: float) -> float | None:
        return self.info.get("gain", {}).get(f"{size:g}")


@dataclass
class CaseResult:
    case: dict
    arms: dict[str, Entry] = field(default_factory=dict)

    def shape(self) -> Case:
        """What was measured; a file from before a field existed leaves it out."""
        return Case(**{field.name: self.case[field.name] for field in fields(Case) if field.name in self.case})

    def refused(self, arm: str) -> bool:
        return arm in self.arms["frozen"].info.get("refused", {})

    def why_missing(self, arm: str) -> str | None:
        """The reason an arm has no row, as the run noted it."""
        info = self.arms["frozen"].info
        return info.get("refused", {}).get(arm) or info.get("not_available", {}).get(arm)

    def target(self, arm: str) -> float | None:
        return TARGETS["overhead"].get(self.case["id"], {}).get(arm)

    def saved_target(self) -> int | None:
        """O(tokens r) + O(width r) in bytes; None where the case keeps nothing for backward.

        OFT and BOFT: the blocks, and the output that BOFT's trained scale multiplies.
        """
        if self.case["kind"] == "decode":
            return None
        if self.case["kind"] in ("oft", "boft"):
            blocks = 16 * self.case["width_in"] * self.case["r"] * self.case["factors"]
            output = self.case["tokens"] * self.case["width_out"] * (4 if self.case["dtype"] == "fp32" else 2)
            return blocks + (output if self.case["kind"] == "boft" else 0)
        width = self.case["width_in"] * (9 if self.case["kind"] == "conv" else 1)
        factor = TARGETS["saved_bytes_per_entry_of_tokens_by_r_and_width_by_r"]
        return factor * self.case["r"] * (self.case["tokens"] + width)

    def speedup(self, arm: str) -> float | None:
        """PEFT's overhead over that of `arm`."""
        if "peft" in self.arms and arm in self.arms:
            return self.arms["peft"].overhead / self.arms[arm].overhead
        return None


@dataclass(frozen=True)
class Group:
    """Kinds of cases that share a table, and the arms that it shows."""

    title: str
    kinds: tuple[str, ...]
    arms: tuple[str, ...]

    def shown(self, cases: list[CaseResult]) -> list[str]:
        """The arms that any of the cases has."""
        return [arm for arm in self.arms if any(arm in case.arms for case in cases)]


HRA = Group("HRA", ("linear", "decode", "gram_schmidt"), ("peft", "torch", "fast", "auto"))
ROTATIONS = Group("OFT and BOFT", ("oft", "boft"), ("peft", "torch", "lycoris", "lycoris-bypass", "auto", "exact"))


@dataclass
class Result:
    name: str
    machine: dict
    versions: dict
    backends: dict
    commit: str | None
    date: str
    cases: dict[str, CaseResult]
    import_seconds: float | None
    # Of a run on a GPU (bench/gpu): card, peaks, steps, order, dropped; None in other files.
    gpu: dict | None = None

    @classmethod
    def load(cls, path: Path) -> Result:
        """Read a JSON file written by `--benchmark-json` or by bench.gpu (which may hold no rows, where no step got so
        far). Raises ValueError with a sentence where there is nothing to report."""
        data = json.loads(Path(path).read_text())
        rows = [row for row in data["benchmarks"] if "case" in row["extra_info"]]
        if not rows and "gpu" not in data:
            raise ValueError(f"{path} holds no rows of these benchmarks; run `make bench` first")
        cases: dict[str, CaseResult] = {}
        import_seconds = None
        for row in rows:
            info = row["extra_info"]
            if info["case"]["kind"] == "import":
                import_seconds = row["stats"]["median"]
                continue
            case = cases.setdefault(info["case"]["id"], CaseResult(info["case"]))
            case.arms[info["arm"]] = Entry(info, row["stats"])
        first = rows[0]["extra_info"] if rows else {}
        return cls(
            name=Path(path).name,
            machine=first.get("machine", data.get("machine_info")),
            versions=first.get("versions", {}),
            backends=first.get("backends", {}),
            commit=first.get("commit"),
            date=data["datetime"][:10],
            cases={name: case for name, case in cases.items() if "frozen" in case.arms},
            import_seconds=import_seconds,
            gpu=data.get("gpu"),
        )

    def of_kind(self, *kinds: str) -> list[CaseResult]:
        return [case for case in self.cases.values() if case.case["kind"] in kinds]

    def table(self) -> list[CaseResult]:
        """The cases that have a target, in the targets' order."""
        return [self.cases[name] for name in TARGETS["overhead"] if name in self.cases]

    def orthogonality_errors(self, kind: str) -> dict[str, float]:
        """By arm the largest |R^T R - I| of the cases of a kind; empty for a run that did not measure it."""
        found = {}
        for arm in LABELS:
            errors = [case.arms[arm].orthogonality_error for case in self.of_kind(kind) if arm in case.arms]
            if errors and None not in errors:
                found[arm] = max(errors)
        return found

    def setting(self) -> str:
        """One sentence: machine, threads, versions, backends that served, commit."""
        machine, versions = self.machine, self.versions
        features = "AMX" if "amx_bf16" in machine["features"] else "AVX-512" if "avx512f" in machine["features"] else ""
        cpu = f"{machine['cpu']}{f' with {features}' if features else ''}"
        listed = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
        served = " and ".join(sorted(set(self.backends.values()))) or "none"
        return (
            f"{cpu}, {_count(machine['cores'], 'core')}, {_count(machine['threads'], 'thread')}; {listed}; "
            f"peftkern's backends {served}; commit {self.commit}"
        )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"


def megabytes(count: float | None) -> str:
    if count is None:
        return "–"
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            value = count / size
            return f"{value:.0f} {unit}" if value >= 10 else f"{value:.1f} {unit}"
    return f"{count:.0f} B"


def duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def scientific(value: float | None) -> str:
    return "–" if value is None else f"{value:.0e}".replace("e-0", "e-")


def ratio(value: float | None) -> str:
    """An overhead: two decimals near 1, fewer where they mean nothing."""
    if value is None:
        return "–"
    return f"{value:.2f}" if value < 3 else f"{value:.1f}" if value < 20 else f"{value:.0f}"
