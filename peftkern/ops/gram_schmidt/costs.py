"""What the kernels of the `gram_schmidt` operations move and compute, as formulas of the shapes (_costs.py).

For columns for which once is enough: the launches that orthonormalise a second time are there and return at once.
Everything is exact but Triton's fp64 flops: how many lanes repeat a sum is up to its layouts (up to twice either way).
"""

import torch

from peftkern.ops._costs import Launch
from peftkern.ops.gram_schmidt import triton_backend
from peftkern.ops.householder import triton_tiles

_CUDA_BLOCKS, _CUDA_THREADS = 32, 256


def _cdiv(a, b):
    return -(-a // b)


def _packed(n):
    return n * (n + 1) // 2


def _cuda_factor(K, r, size):
    rows = 32 if r <= 64 else 16
    per_block = _cdiv(_cdiv(K, rows), _CUDA_BLOCKS) * rows
    blocks, tiles = _cdiv(K, per_block), _cdiv(r, 8)
    columns, share = K * r * size, 8 * _packed(r)
    tensor = {"tensor_fp64": 128 * _cdiv(K, rows) * rows * _packed(tiles)}
    # Adding the shares, r eliminations (2/3 r^3 in all), and what every thread of a block computes alike.
    eliminations = sum(2 * j * (r - 1 - j) + (r - 1 - j) * (r - j) for j in range(r))
    algebra = blocks * ((_cdiv(blocks, 16) * 16 + 7) * _packed(r) + eliminations + r * r + _CUDA_THREADS * (2 * r + 3))
    again = blocks + _cdiv(r, rows)
    return [
        Launch("gram_schmidt_gram_kernel", columns, blocks * share, columns + blocks * share, tensor, blocks),
        Launch(
            "gram_schmidt_factor_kernel",
            blocks * blocks * share + columns,
            columns + 16 * r * r + 8,
            blocks * share + 2 * columns + 16 * r * r,
            {**tensor, "fp64": algebra},
            blocks,
        ),
        Launch("gram_schmidt_again_kernel", 8 * _CUDA_THREADS * again, 0, 8, {}, again),
    ]


def _cuda_backward(K, r, size):
    rows, pairs = (32, 2) if r <= 64 else (16, 1)
    blocks, tiles, columns = _cdiv(K, rows), _cdiv(r, 8), K * r * size
    # dT and its transpose once per pair of row tiles, B from the diagonal tile on.
    lower = sum(min(8, r - 8 * j) * (r - 8 * j) for j in range(tiles))
    read = 2 * columns + blocks * pairs * 8 * (2 * r * r + lower)
    steps = tiles * _cdiv(r, 4) + sum(_cdiv(r - 8 * j, 4) for j in range(tiles))
    flops = {"tensor_fp64": blocks * pairs * steps * 2 * 512, "fp64": blocks * pairs * 2 * r * r}
    return [Launch("gram_schmidt_backward_kernel", read, columns, 3 * columns + 16 * r * r, flops, blocks)]


def _widths(r, tile):
    return [min(tile, r - j) for j in range(0, r, tile)]


def _triton_factor(K, r, size, family):
    R, tile = triton_tiles.rank(r), triton_backend.column_tile(r)
    splits, per_split = triton_backend.gram_splits(family, K, r)
    widths, side, programs = _widths(r, tile), _cdiv(r, tile), _cdiv(K, triton_backend.ROWS)
    pairs = [(i, j) for j in range(side) for i in range(j + 1)]
    warps = triton_backend.FACTOR_WARPS[R]
    padded = triton_tiles.GRAM_ROWS * sum(
        _cdiv(min(per_split, K - first), triton_tiles.GRAM_ROWS) for first in range(0, K, per_split)
    )
    columns, square, triangle = K * r * size, 8 * r * r, 8 * _packed(r)
    # The scales, thrice as squares; by halves: three of four blocks, and four products of blocks of 64, in tiles of 32.
    block = 8 * 64 * 64
    algebra_read = 8 * splits * r + splits * triangle + 2 * square + 24 * R * R
    algebra_written = 8 * R + triangle + 3 * square + 4
    if R > 64:
        algebra_read += 4 * 4 * block + 2 * block - 8 * 64 * (r - 64)
        algebra_written += 7 * block
    shares = splits * 8 * sum(widths[i] * widths[j] for i, j in pairs)
    again = programs + _cdiv(r, triton_backend.ROWS)
    return [
        Launch(
            "gram_kernel",
            K * size * sum(widths[i] + widths[j] for i, j in pairs),
            shares,
            columns + shares,
            {"tensor_fp64": 2 * padded * tile * tile * len(pairs)},
            splits * len(pairs),
        ),
        Launch(
            "factor_kernel",
            algebra_read,
            algebra_written,
            splits * triangle + 2 * square,
            {"fp64": 8 * r * min(R, 64) ** 2, **({"tensor_fp64": 4 * 2 * 64**3} if R > 64 else {})},
            1,
        ),
        Launch(
            "multiply_kernel",
            K * size * sum(widths[i] for i, _ in pairs) + programs * 8 * sum(widths[i] * widths[j] for i, j in pairs),
            columns,
            2 * columns + square // 2,
            {"tensor_fp64": 2 * programs * triton_backend.ROWS * tile * tile * len(pairs)},
            programs,
        ),
        Launch("gram_kernel", 4 * (32 if tile == 16 else 128) * splits * side * side, 0, 4, {}, splits * side * side),
        Launch("factor_kernel", 4 * 32 * warps, 0, 4, {}, 1),
        Launch("multiply_kernel", 4 * 128 * again, 0, 4, {}, again),
    ]


def _triton_backward(K, r, size):
    R, tile, programs = triton_tiles.rank(r), triton_backend.column_tile(r), _cdiv(K, triton_backend.ROWS)
    widths, side, columns, square = _widths(r, tile), _cdiv(r, tile), K * r * size, 8 * r * r
    pairs = [(i, j) for j in range(side) for i in range(j + 1)]
    lower, whole = sum(widths[i] * widths[j] for i, j in pairs), r * r
    steps = _cdiv(r, 16)
    return [
        Launch(
            "core_gradient_kernel",
            2 * square + (R // 16) * square,
            square,
            3 * square,
            {"tensor_fp64": 2 * R * R * 16 * steps, "fp64": 2 * R * 16 * steps},
            R // 16,
        ),
        Launch(
            "gradient_kernel",
            K * size * (sum(widths[j] for _, j in pairs) + side * r) + programs * 8 * (lower + whole),
            columns,
            3 * columns + 2 * square,
            {"tensor_fp64": 2 * programs * triton_backend.ROWS * tile * tile * (len(pairs) + side * side)},
            programs * side,
        ),
    ]


def launches(op, backend, *, M, K, N, r, dtype, family):
    """The launches of one call; M and N do not count."""
    size = 8 if dtype is torch.float64 else 4
    table = {
        ("orthonormal_factor", "cuda"): lambda: _cuda_factor(K, r, size),
        ("orthonormal_factor_backward", "cuda"): lambda: _cuda_backward(K, r, size),
        ("orthonormal_factor", "triton"): lambda: _triton_factor(K, r, size, family),
        ("orthonormal_factor_backward", "triton"): lambda: _triton_backward(K, r, size),
    }
    if (op, backend) not in table:
        raise NotImplementedError(f"{backend} does not write {op}")
    return table[op, backend]()
