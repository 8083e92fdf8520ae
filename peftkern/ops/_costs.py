"""What a kernel launch moves and computes: the unit in which `<family>/costs.py` states the cost of an operation.

A family's `costs.py` has

    launches(op, backend, *, M, K, N, r, dtype, family) -> list[Launch]

the launches of one call of `torch.ops.peftkern.<op>` served by `backend`, in order, as plain formulas of the shapes: M
rows of x, K and N features in and out (N is ignored by operations without a weight), r reflections, dtype of x, and
`family`, the architecture whose tile table counts ("sm80", "sm90", "sm100", ...). Calls of the vendor's library (a
product that cuBLAS serves) are launches too. It raises NotImplementedError where a backend does not write the
operation. Tests hold `read`, `written` and `flops` to what the PTX machine counts; `bench/model.py` turns them into
time.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

# The units that do the arithmetic. Names as the PTX machine counts them; an fma is two flops.
FLOP_KINDS = ("fp32", "fp64", "tensor_bf16", "tensor_fp16", "tensor_tf32", "tensor_fp64")


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    kernel: its name; `library: ...` for a call of the vendor's library.
    read, written: bytes requested from and sent to global memory. A tile that two blocks read counts twice: this is
        the traffic of the L2 cache.
    unique: bytes of distinct memory read plus distinct memory written: the least that crosses HBM when nothing is in
        the cache before and nothing is evicted too early.
    flops: by kind, see FLOP_KINDS; three products that make up one float32 product count as three.
    blocks: blocks of the grid, None for enough to fill any device. A launch of fewer blocks than the device has
        multiprocessors has only their share of its arithmetic and of its L2 bandwidth.
    """

    kernel: str
    read: int
    written: int
    unique: int
    flops: Mapping[str, int] = field(default_factory=dict)
    blocks: int | None = None

    def __post_init__(self):
        unknown = set(self.flops) - set(FLOP_KINDS)
        if unknown:
            raise ValueError(f"Launch: flops must be of the kinds {', '.join(FLOP_KINDS)}; got {sorted(unknown)}")
