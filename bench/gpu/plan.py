"""What is timed, the most telling first: where time is short, the end of this list is what is dropped."""

from __future__ import annotations

from dataclasses import replace

from bench.cases import Case

TOKENS = 8192
HEAD = Case("linear", 4096, 4096, TOKENS, 32, "bf16+fp32")
DTYPES = ("bf16+fp32", "bf16", "fp32")
OP_FAMILIES = ("householder", "gram_schmidt")
ORDER = (
    "layers 4096 wide, r 32; the operations at that shape in bf16 with fp32 columns; layers 4096 wide, r 8; "
    "Gram-Schmidt 4096 wide, r 32; layers 2048 and 8192 wide, r 32, then r 8; the operations in fp32; layers with "
    "r 128; Gram-Schmidt at the other shapes"
)


def _layers(width: int, r: int, kind: str = "linear") -> list[Case]:
    return [Case(kind, width, width, TOKENS, r, dtype) for dtype in DTYPES]


def _operations(names: list[str], dtype: str) -> list[Case]:
    return [replace(HEAD, kind=f"op:{name}", dtype=dtype) for name in names]


def cases(operations: list[str]) -> list[Case]:
    """All cases in the order of ORDER; operations: names of torch.ops.peftkern that are to be timed alone."""
    listed = _layers(4096, 32) + _operations(operations, "bf16+fp32") + _layers(4096, 8)
    listed += _layers(4096, 32, "gram_schmidt")
    for r in (32, 8):
        listed += [case for width in (2048, 8192) for case in _layers(width, r)]
    listed += _operations(operations, "fp32")
    listed += [case for width in (4096, 2048, 8192) for case in _layers(width, 128)]
    for width, r in ((4096, 8), (2048, 8), (8192, 32)):
        listed += _layers(width, r, "gram_schmidt")
    return listed


def shrunk(case: Case, tokens: int = 48, width: int = 256) -> Case:
    """The same case at a size that a dry run can prepare on a processor."""
    return replace(case, width_in=width, width_out=width, tokens=tokens)
