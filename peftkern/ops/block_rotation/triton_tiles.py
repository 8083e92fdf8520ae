"""Tile sizes of the Triton kernels that rotate blocks: a closed table, never tuned at run time, so that the order of
every sum is a function of shapes and device alone.
"""

from typing import NamedTuple

import torch

from peftkern.ops.householder import triton_tiles

# Columns of a block, or of a butterfly's group, whose R a program holds in registers; and what is served at all.
PANEL_MOST = {torch.bfloat16: 128, torch.float16: 128, torch.float32: 64, torch.float64: 64}
MOST, MAP_MOST = 512, 64
PANEL = 32  # the least width of a panel: 64 bytes of a half-precision row


class Tile(NamedTuple):
    panel: int  # columns, padded to a power of two
    width: int  # columns that are whole blocks
    rows: int
    warps: int
    stages: int
    programs: int  # for each multiprocessor, at most: each reads its R, and a backward ends in partial sums of dR


def tile(family, dtype, b):
    """The panel of blocks of b columns, and the rows of a step."""
    panel = max(PANEL, 1 << (b - 1).bit_length())
    width, programs = panel // b * b, 4 if panel < 64 else 2
    if dtype is torch.float64:
        return Tile(panel, width, 16, 4 if panel < 64 else 8, 1, programs)
    stages = 1 if family in ("gfx942", "generic") else 3
    if dtype is torch.float32:
        # Copied ahead, rows whose transpose is a factor would come in pieces of 4 bytes and with bank conflicts.
        return Tile(panel, width, 32 if panel < 64 else 16, 4 if panel < 64 else 8, 1, programs)
    # Rows for which R's terms, the products and the sum of dR fit the registers, two programs and more at a time.
    if panel == 128:
        return Tile(panel, width, 64 if family == "gfx942" else 32, 8, stages, programs)
    return Tile(panel, width, 64, 4, stages, programs)


def wide(family, dtype):
    """(rows, columns, warps) of a product where blocks are wider than a panel; four warps sum over the rows."""
    if dtype is torch.float64:
        return 32, 32, 4
    # Elsewhere the terms of 64 float32 rows fit the registers.
    return (32, 64, 8) if dtype is torch.float32 and family in ("sm80", "sm86", "sm100") else (64, 64, 4)


def _over(a, b):
    return -(-a // b)


def splits(family, each, rows, programs, M):
    """Ranges of rows, and the rows of each, that keep every multiprocessor busy with `each` programs at a time."""
    count = max(1, min(each * triton_tiles._PROGRAMS[family] // programs, _over(M, rows)))
    per_split = _over(_over(M, count), rows) * rows
    return _over(M, per_split), per_split


def panels_per_program(panels):
    """Of a backward whose blocks are shared: few sums, each of many panels."""
    return max(1, panels // 16)


def map_panel(family, b):
    """(columns, columns that are whole blocks, rows of a strip, warps) of blocks that are made, or whose parameters get
    gradients. A strip of fewer rows than columns gives each warp columns of its own, so that it holds few of a right
    factor's terms in registers: not needed by tensor cores that read it from shared memory, nor with AMD's registers.
    """
    panel = max(PANEL, 1 << (b - 1).bit_length())
    strip = panel if family in ("sm90", "sm100", "gfx942") else PANEL
    return panel, panel // b * b, strip, 4 if panel < 64 or family == "gfx942" else 8


def inverses(b):
    """(b padded, blocks side by side, warps) of an inversion: a warp alone needs no barrier, and 1024 numbers of 64
    bits are half its registers.
    """
    size = max(2, 1 << (b - 1).bit_length())
    return size, max(1, 1024 // (size * size)), 1 if size <= 32 else 4


# Columns and rows of y where only a scale acts.
SCALE = Tile(256, 256, 16, 4, 1, 4)


class LinearTile(NamedTuple):
    rows: int  # of z
    cols: int  # rows of W
    depth: int
    warps: int
    stages: int


def linear(family, M):
    """Of y = s (z_h + z_l) W^T + b."""
    small = next((rows for rows in (16, 32, 64) if rows >= M), None)
    if small:
        return LinearTile(small, 64, 64, 4, 2 if family in ("gfx942", "generic") else 3)
    return {
        "sm90": LinearTile(128, 256, 64, 8, 3),
        "sm100": LinearTile(128, 128, 64, 8, 3),
        "gfx942": LinearTile(128, 128, 32, 8, 2),
        "generic": LinearTile(64, 64, 32, 4, 1),
    }.get(family, LinearTile(128, 128, 32, 8, 3))
