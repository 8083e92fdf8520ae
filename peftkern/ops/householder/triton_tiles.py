"""Tile sizes of the Triton kernels: a closed table per architecture family and shape bucket, never tuned at run time,
so that the order of every sum is a function of shapes and device alone. Reasons: README.md, "On GPUs: Triton".
"""

from typing import NamedTuple

import torch

HALF = (torch.bfloat16, torch.float16)
_SMALL_SHARED = ("gfx942", "generic")
# Where a product of one's own keeps up with the library's: without multicast loads a tile reads L2 more often than
# Hopper's and Blackwell's caches can serve, and wider tiles do not fit the registers.
_FUSED = ("sm80", "sm86")
# Programs that keep every multiprocessor busy; fewer row tiles than that are split along K.
_PROGRAMS = {"sm80": 108, "sm86": 128, "sm90": 132, "sm100": 148, "gfx942": 304, "generic": 64}


class Tile(NamedTuple):
    rows: int
    cols: int
    depth: int
    warps: int
    stages: int


def rank(r):
    """r padded to the width of the term arrays."""
    return max(16, 1 << (r - 1).bit_length())


def _row_bucket(M, largest):
    return next((rows for rows in (16, 32, 64) if M <= rows < largest), largest)


def project(family, dtype, M, R):
    """rows of x, -, K per step."""
    if dtype is torch.float64:
        return Tile(32, 0, 16, 4, 1 if family in _SMALL_SHARED else 2)
    if dtype is torch.float32:
        return Tile(_row_bucket(M, 64), 0, 32, 4 if R < 128 else 8, 2)
    if family in _SMALL_SHARED:
        return Tile(_row_bucket(M, 64), 0, 32, 4, 2)
    if family == "sm86":
        return Tile(_row_bucket(M, 64), 0, 32 if R > 64 else 64, 4, 2 if R > 32 else 3)
    rows = _row_bucket(M, 128)
    warps = 8 if rows == 128 and (R > 32 or dtype is torch.float16) else 4
    return Tile(rows, 0, 32 if R > 64 else 64, warps, 4 if R < 64 else 3)


def splits(family, programs, length, least):
    """Into how many ranges of at least `least` a sum of `length` is cut, so that the programs fill the device."""
    return max(1, min(_PROGRAMS[family] // max(programs, 1), length // least))


def update(family, dtype, R):
    """rows per step, columns of K. Wider tiles spill; more than four warps would share tiles too small for them."""
    if dtype is torch.float64:
        return Tile(16, 32, 0, 4 if R < 128 else 8, 1)
    if dtype is torch.float32:
        return Tile(32, 64, 0, 4, 1) if R < 64 else Tile(16, 32, 0, 4, 1)
    stages = 1 if family in _SMALL_SHARED else 2
    if R == 128 or (R == 64 and family in _FUSED):
        return Tile(32, 32, 0, 4, stages)
    # The second term of float16 rows is what spills on sm100.
    short = family in _FUSED or (family == "sm100" and dtype is torch.float16)
    return Tile(32 if R > 16 and short else 64, 64, 0, 4, stages)


def linear(family, M, R, with_bias):
    """rows of x, rows of W, K per step; None where the library's product and one more pass over y are the better way.

    The library cannot take both the update and a bias into its accumulator, so a bias always takes the fused product.
    """
    small = _row_bucket(M, 128)
    if small < 128:
        return Tile(small, 64, 64, 4, 2 if family in _SMALL_SHARED else 3)
    if family not in _FUSED and not with_bias:
        return None
    if R == 128 and family in _FUSED:
        return Tile(64, 128, 32, 8, 3) if family == "sm80" else Tile(64, 64, 32, 4, 3)
    return {
        "sm80": Tile(128, 128, 32, 8, 4),
        "sm86": Tile(128, 128, 32, 8, 3),
        "sm90": Tile(128, 256, 64, 8, 4),
        "sm100": Tile(128, 256, 64, 8, 3),
    }.get(family, Tile(128, 128, 32, 8, 2))


def linear_backward(family, M, R):
    """rows of dy, columns of W, N per step; None where the library's product and more passes are the better way.

    The tail keeps dz and its terms in registers: tiles of 64 rows and more spill, or read L2 too often.
    """
    small = _row_bucket(M, 64)
    return Tile(small, 64, 32, 4, 2) if family in _FUSED and R < 64 and small < 64 else None


def dx_terms(x_dtype, K, r):
    """Terms (bfloat16) of the two factors of R V^T in dx, which is rounded to x's dtype, half precision.

    One adds at most 4 r / K of the variance of a rounding to bfloat16; where that is not small, or for float16, two.
    """
    return 1 if x_dtype is torch.bfloat16 and 32 * r <= K else 2


# Layers whose factors one launch makes; a kernel is compiled for each of these numbers.
LAYERS = (1, 8, 64)


def layers(count):
    """The least number of layers that a kernel is compiled for and `count` fit into."""
    return next(n for n in LAYERS if count <= n)


# Along the second and third dimension of a launch.
MOST_PROGRAMS = 65535
GROUP = 8
CORE_ROWS = 64
SPLIT_ROWS = {16: 128, 32: 64, 64: 32, 128: 16}
GRAM_ROWS = 32


def reduce(n):
    """Numbers per program of a sum of partial buffers: enough programs for small matrices, too."""
    return 512 if n >= 1 << 16 else 64
