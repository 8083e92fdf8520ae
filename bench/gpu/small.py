"""A small set for compute-sanitizer: every operation and layer of one backend, forward and backward, at odd shapes.

python -m bench.gpu.small cuda
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

from bench.arm import NotAvailable
from bench.cases import OPERATION, Case, make_problem
from bench.gpu import contenders
from bench.gpu.child import timed_operations

# Neither rows, nor features, nor columns fill a tile; the weight is not square.
ODD = Case("linear", 200, 136, 37, 6, "bf16+fp32")
LAYERS = [
    ODD,
    replace(ODD, kind="gram_schmidt"),
    *(replace(ODD, kind="oft", r=b) for b in (8, 25)),
    *(replace(ODD, kind="boft", r=b, factors=f) for b, f in ((4, 2), (10, 3))),
]


def work(backend: str, dtypes: Sequence[str]) -> list[tuple[Case, str]]:
    """(case, contender) of the set."""
    kinds = {"householder": "linear", "gram_schmidt": "linear", "block_rotation": "oft", "butterfly": "boft"}
    found = [
        (replace(layer, kind=OPERATION + name, of=layer.kind, dtype=dtype), backend)
        for name, family in timed_operations().items()
        for layer in LAYERS
        if layer.kind == kinds[family]
        for dtype in dtypes
    ]
    return found + [(layer, f"{backend}-{precision}") for layer in LAYERS for precision in ("fast", "exact")]


def run(backend: str, device) -> list[str]:
    """Run the set; returns what did not run, each with the reason."""
    left_out = []
    # A dry run has to compile each of them.
    dtypes = ("bf16+fp32",) if device.simulated else ("bf16+fp32", "fp32")
    for case, name in work(backend, dtypes):
        problem = make_problem(case, device=device.kind)
        try:
            contender = contenders.build(name, problem, device)
        except NotAvailable as reason:
            left_out.append(f"{case.kind}, {case.title}: {reason}")
            continue
        with contender.serving():
            for stage in contender.stages:
                stage()
        if contender.serving.failed():
            raise RuntimeError("; ".join(contender.serving.failed()))
        device.release()
    return left_out


if __name__ == "__main__":
    from bench.gpu.device import Cuda

    for line in run(sys.argv[1], Cuda()):
        print(line)
