"""A small set for compute-sanitizer: every operation and layer of one backend, forward and backward, at odd shapes.

python -m bench.gpu.small cuda
"""

from __future__ import annotations

import sys

from bench.arms import NotAvailable
from bench.cases import Case, make_problem
from bench.gpu import contenders
from bench.gpu.child import timed_operations

# Neither rows, nor features, nor columns fill a tile; the weight is not square.
ODD = (200, 136, 37, 6)


def run(backend: str, device) -> list[str]:
    """Run the set; returns what did not run, each with the reason."""
    left_out = []
    K, N, M, r = ODD
    kinds = [f"op:{name}" for name in timed_operations()]
    # A dry run has to compile each of them.
    dtypes = ("bf16+fp32",) if device.simulated else ("bf16+fp32", "fp32")
    work = [(Case(kind, K, N, M, r, dtype), backend) for kind in kinds for dtype in dtypes]
    work += [
        (Case(kind, K, N, M, r, "bf16+fp32"), f"{backend}-{precision}")
        for kind in ("linear", "gram_schmidt")
        for precision in ("fast", "exact")
    ]
    for case, name in work:
        problem = make_problem(case, device=device.kind)
        try:
            contender = contenders.build(name, problem, device)
        except NotAvailable as reason:
            left_out.append(f"{case.kind}: {reason}")
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
