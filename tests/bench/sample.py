"""A made-up result file of the form that the benchmarks write, for the tests of the report."""

import random

from bench.arms import names
from bench.cases import SETS

SURROUNDINGS = {
    "machine": {
        "cpu": "Test CPU",
        "model": "1 2 3",
        "features": ["avx512f"],
        "cores": 2,
        "threads": 2,
        "system": "Linux",
    },
    "versions": {"python": "3.11.7", "torch": "2.13.0", "peft": "0.21.2", "peftkern": "0.1.0"},
    "backends": {"rotate": "cpu", "projector_factor": "reference"},
    "commit": "0123456789ab",
}
TIMES = {
    "frozen": 1.0,
    "peft": 24.0,
    "torch": 1.6,
    "lycoris": 2.7,
    "lycoris-bypass": 1.4,
    "fast": 1.14,
    "auto": 1.24,
    "auto-terms6": 1.3,
    "auto-cayley": 1.26,
    "exact": 1.25,
}
ORTHOGONALITY = {"auto-terms6": 3e-7, "auto-cayley": 1e-7}
GAINS = {"peft": (1.0, 1.0, 1.0), "torch": (0.3, 0.6, 1.0), "fast": (0.2, 0.55, 1.0), "auto": (1.0, 1.0, 1.0)}


def row(case, arm, wobble=1.0):
    overhead = 1.0 if arm == "frozen" else 1 + (TIMES[arm] - 1) * wobble
    info = {
        "case": case.fields(),
        "arm": arm,
        "overhead": {
            "median_of_ratios": overhead,
            "q1": overhead * 0.98,
            "q3": overhead * 1.03,
            "ratio_of_medians": overhead,
            "ratio_of_minima": overhead,
            "rounds": 9,
        },
        **SURROUNDINGS,
    }
    if arm == "frozen":
        info.update(not_available={}, refused={})
    else:
        info["error"] = {"y": 1e-3, "dx": 1e-3, "du": 2e-3}
        info["error_ratio"] = {"y": 1.0, "dx": 1.4, "du": 0.9}
    if case.rotates and arm != "frozen":
        info["orthogonality_error"] = ORTHOGONALITY.get(arm, 5e-3)
    if arm.startswith("lycoris"):
        info["differs"] = "it rotates something else"
    if case.trains:
        own = 8 * case.r * (case.width_in if case.rotates else case.tokens)
        kept = {"frozen": 0, "peft": 44 * case.width_in**2}.get(arm, own)
        info.update(saved_bytes=kept, saved_beyond_frozen_bytes=kept, saved_outside_hooks_bytes=0)
        info["saved_x_bytes"] = 0 if arm == "frozen" else 2 * case.tokens * case.width_in
    if case.half and case.kind == "linear" and arm != "frozen":
        info["gain"] = dict(zip(("0.0003", "0.001", "0.01"), GAINS.get(arm, GAINS["auto"]), strict=True))
    return {"name": f"test_layer[{case.id}-{arm}]", "extra_info": info, "stats": {"median": 0.01 * overhead}}


def result(which="quick", seed=0):
    """A result with every arm of every case of a set, and the import's row."""
    noise = random.Random(seed)
    rows = []
    for case in SETS[which]:
        wobble = noise.uniform(0.7, 1.6)
        rows += [row(case, arm, wobble) for arm in names(case)]
    imported = {"kind": "import", "id": "import", "title": "import peftkern"}
    rows.append({"name": "test_import", "extra_info": {"case": imported, **SURROUNDINGS}, "stats": {"median": 0.02}})
    return {"datetime": "2026-01-02T03:04:05", "benchmarks": rows}
