"""Rates of the cards that bench/model.py predicts for, with their sources."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

# TFLOP/s and TB/s, dense, without sparsity; tensor cores with fp32 accumulators. `fp64`, `fp32`: plain units.
_KINDS = ("tensor_bf16", "tensor_fp16", "tensor_tf32", "fp32", "fp64", "tensor_fp64")


@dataclass(frozen=True)
class Rates:
    """What a card does per second. flops by kind; own: what a kernel of this package reaches of the rate that the
    vendor's library reaches on tensor cores; launch: seconds from the end of one kernel to the start of the next."""

    name: str
    flops: Mapping[str, float]
    hbm: float
    l2: float
    launch: float
    own: float = 1.0


@dataclass(frozen=True)
class Card:
    """family: key of the kernels' tables of tiles (peftkern/ops/_triton.py). matmul: the part of the tensor cores' peak
    that a matrix product typically reaches."""

    name: str
    family: str
    multiprocessors: int
    peak: Rates
    matmul: float
    source: str
    matmul_source: str


LAUNCH = 1e-6
TYPICAL_LAUNCH = 2e-6
TYPICAL_HBM = 0.90
TYPICAL_L2 = 0.80
TYPICAL_UNITS = 0.85  # fp32 and fp64 outside the tensor cores
TYPICAL_OWN = 0.90
_MAMF = "MAMF table of github.com/stas00/ml-engineering, August 2026"
_ASSUMED = "assumed; the MAMF table has no such card"

ASSUMPTIONS = (
    "Peaks: data sheets. None gives the bandwidth of the L2 cache: 5120 bytes per clock is from the A100 white paper "
    "and is taken for H100 and H200 too; 5 TB/s for the Ada cards is an assumption.",
    f"Typical rates: matrix products at the best rate that the {_MAMF}, found on the card (assumed for L40S and RTX "
    f"4090); assumed: {100 * TYPICAL_HBM:.0f} % of HBM's and {100 * TYPICAL_L2:.0f} % of L2's bandwidth, "
    f"{100 * TYPICAL_UNITS:.0f} % of fp32 and fp64 units; a product in a kernel of this package at "
    f"{100 * TYPICAL_OWN:.0f} % of the library's rate.",
    f"From one kernel to the next: {1e6 * LAUNCH:.0f} us at peaks, {1e6 * TYPICAL_LAUNCH:.0f} us typically, assumed; "
    "the host is taken to stay ahead of the device.",
    "A launch takes the longest of its HBM, L2 and arithmetic time, all of them perfectly overlapped, and nothing "
    "stays in the L2 cache from one launch to the next. Neither the number of waves nor latencies inside a block are "
    "modelled. The library's products count their operands once, for how it tiles is its own affair.",
)


def _rates(name: str, tera: tuple[float, ...], hbm: float, l2: float) -> Rates:
    flops = {kind: 1e12 * rate for kind, rate in zip(_KINDS, tera, strict=True)}
    return Rates(name, MappingProxyType(flops), 1e12 * hbm, 1e12 * l2, LAUNCH)


def _card(name, family, sms, tera, hbm, l2, matmul, source, matmul_source) -> Card:
    return Card(name, family, sms, _rates("data-sheet peaks", tera, hbm, l2), matmul, source, matmul_source)


CARDS = {
    "A100": _card(
        "A100 80G SXM", "sm80", 108, (312, 312, 156, 19.5, 9.7, 19.5), 2.039, 7.2, 0.869,
        "NVIDIA A100 80GB data sheet; L2: 5120 B/clk at 1.41 GHz", _MAMF,
    ),
    "H100": _card(
        "H100 SXM", "sm90", 132, (989.4, 989.4, 494.7, 66.9, 33.5, 66.9), 3.35, 9.4, 0.803,
        "NVIDIA H100 data sheet (SXM); L2: 5120 B/clk at 1.83 GHz", _MAMF,
    ),
    "H200": _card(
        "H200 SXM", "sm90", 132, (989.4, 989.4, 494.7, 66.9, 33.5, 66.9), 4.8, 9.4, 0.803,
        "NVIDIA H200 data sheet (SXM); L2 as H100", f"{_MAMF}, which gives it H100's rate",
    ),
    "L40S": _card(
        "L40S", "sm86", 142, (362.05, 362.05, 183, 91.6, 1.43, 1.43), 0.864, 5.0, 0.85,
        "NVIDIA L40S data sheet; fp64: 1/64 of fp32, as the Ada white paper has it; L2 assumed", _ASSUMED,
    ),
    "RTX 4090": _card(
        "RTX 4090", "sm86", 128, (165.2, 165.2, 82.6, 82.6, 1.29, 1.29), 1.008, 5.0, 0.85,
        "NVIDIA Ada GPU architecture white paper, appendix A; L2 assumed", _ASSUMED,
    ),
}  # fmt: skip


def card(name: str) -> Card:
    """A card by (a part of) its name here, or by the name that its driver gives ("NVIDIA H100 80GB HBM3")."""
    for key, found in CARDS.items():
        if key.lower() in name.lower() or (name and name.lower() in key.lower()):
            return found
    raise ValueError(f"no rates are known for a card {name!r}; the cards are {', '.join(CARDS)}")


def typical(of: Card) -> Rates:
    """Rates that are usually reached, see ASSUMPTIONS."""
    flops = {
        kind: rate * (of.matmul if kind.startswith("tensor") else TYPICAL_UNITS) for kind, rate in of.peak.flops.items()
    }
    return replace(
        of.peak,
        name="typical rates",
        flops=MappingProxyType(flops),
        hbm=TYPICAL_HBM * of.peak.hbm,
        l2=TYPICAL_L2 * of.peak.l2,
        launch=TYPICAL_LAUNCH,
        own=TYPICAL_OWN,
    )


def measured(of: Card, peaks: Mapping) -> Rates:
    """The typical rates with what a result file of bench.gpu found: its copy bandwidth, products and launch gap."""
    usual = typical(of)
    return replace(
        usual,
        name="this card's measured rates",
        flops=MappingProxyType({**usual.flops, **peaks["flops_per_second"]}),
        hbm=peaks["copy_bytes_per_second"],
        launch=peaks["launch_seconds"],
    )
