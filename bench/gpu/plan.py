"""What is timed, the most telling first: where time is short, the end of this list is what is dropped."""

from __future__ import annotations

from dataclasses import replace

from bench.cases import OPERATION, Case

TOKENS = 8192
DTYPES = ("bf16+fp32", "bf16", "fp32")
HEAD = Case("linear", 4096, 4096, TOKENS, 32, "bf16+fp32")
OFT = replace(HEAD, kind="oft")
BOFT = replace(HEAD, kind="boft", r=8, factors=4)
# The families whose operations are timed one by one, each at the shape of a layer.
OP_FAMILIES = {"householder": HEAD, "gram_schmidt": HEAD, "block_rotation": OFT, "butterfly": BOFT}
ORDER = (
    "layers 4096 wide: HRA r 32, OFT b 32, BOFT b 8 with 4 factors; the operations at these shapes in bf16 with fp32 "
    "adapters; 4096 wide: HRA r 8, Gram-Schmidt r 32, BOFT with 1 factor; 2048 and 8192 wide: HRA r 32, OFT, BOFT with "
    "4 factors, then HRA r 8; the operations in fp32; HRA r 128; Gram-Schmidt at the other shapes"
)


def _layers(head: Case, width: int = HEAD.width_in, **changes) -> list[Case]:
    return [replace(head, width_in=width, width_out=width, dtype=dtype, **changes) for dtype in DTYPES]


def _operations(families: dict[str, str], dtype: str) -> list[Case]:
    heads = {name: OP_FAMILIES[family] for name, family in families.items()}
    return [replace(head, kind=OPERATION + name, of=head.kind, dtype=dtype) for name, head in heads.items()]


def cases(operations: dict[str, str]) -> list[Case]:
    """All cases in the order of ORDER; operations: those of torch.ops.peftkern that are timed alone, and the family of
    each."""
    heads = (HEAD, OFT, BOFT)
    listed = [case for head in heads for case in _layers(head)]
    listed += _operations(operations, "bf16+fp32")
    listed += _layers(HEAD, r=8) + _layers(HEAD, kind="gram_schmidt") + _layers(BOFT, factors=1)
    listed += [case for head in heads for width in (2048, 8192) for case in _layers(head, width)]
    listed += [case for width in (2048, 8192) for case in _layers(HEAD, width, r=8)]
    listed += _operations(operations, "fp32")
    listed += [case for width in (4096, 2048, 8192) for case in _layers(HEAD, width, r=128)]
    for width, r in ((4096, 8), (2048, 8), (8192, 32)):
        listed += _layers(HEAD, width, kind="gram_schmidt", r=r)
    return listed


def shrunk(case: Case, tokens: int = 48, width: int = 256) -> Case:
    """The same case at a size that a dry run can prepare on a processor."""
    # LyCORIS has no blocks larger than their number.
    width = max(width, case.r**2) if case.rotates else width
    return replace(case, width_in=width, width_out=width, tokens=tokens)
