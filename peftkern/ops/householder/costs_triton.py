"""What the Triton kernels of the `householder` operations (triton_kernels.py) move and compute, by triton_tiles.py.

Every formula is the sum over programs of what their loads and stores ask for, padding left out of bytes (masked) and
left in flops (computed). Work of order r^2 per program is counted, additions outside of products are not.
"""

import torch

from peftkern.ops._costs import Launch
from peftkern.ops.householder import triton_tiles as tiles

_KINDS = {torch.bfloat16: "tensor_bf16", torch.float16: "tensor_fp16", torch.float32: "fp32", torch.float64: "fp64"}
# Terms of x, and products of terms that make up one of float32.
_TERMS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
_PRODUCTS = {1: 3, 2: 5, 3: 6}
_OF_TERMS = {1: 1, 2: 3, 3: 6}


def _over(a, b):
    return -(-a // b)


def _padded(a, b):
    return _over(a, b) * b


def _split(rows, r, terms, pair=False):
    R = tiles.rank(r)
    read, written = 4 * rows * (r + (r - r % 2) * pair), 2 * terms * rows * R
    return Launch("split_kernel", read, written, 4 * rows * r + written, {}, _over(rows, tiles.SPLIT_ROWS[R]))


def _project_splits(family, dtype, M, K, R):
    tile = tiles.project(family, dtype, M, R)
    splits = tiles.splits(family, _over(M, tile.rows), K, 8 * tile.depth)
    per_split = _padded(_over(K, splits), tile.depth)
    return tile, _over(K, per_split)


def _project(family, dtype, M, K, r):
    """x V from three terms of V; (launches, splits)."""
    R = tiles.rank(r)
    tile, splits = _project_splits(family, dtype, M, K, R)
    programs = _over(M, tile.rows)
    rows, V, written = M * K * dtype.itemsize, 6 * K * R, 4 * splits * M * r
    flops = 2 * _padded(M, tile.rows) * _padded(K, tile.depth) * R * _PRODUCTS[_TERMS[dtype]]
    return (
        Launch("project_kernel", rows + programs * V, written, rows + V + written, {"tensor_bf16": flops},
               programs * splits),
        splits,
    )  # fmt: skip


def _reduce(n, splits, size=4):
    read = splits * n * size
    return Launch("reduce_kernel", read, n * size, read + n * size, {}, _over(n, tiles.reduce(n)))


def _gathered(project):
    launch, splits = project
    return [launch] if splits == 1 else [launch, _reduce(launch.written // 4 // splits, splits)]


def _core(rows, r, terms, splits=1, keep=False, pair=False, padded=True):
    """P C in float64: terms of it, or (padded false) float32."""
    R = tiles.rank(r)
    BR = min(R, 32)
    columns, programs = (R if padded else _padded(r, BR)) // BR, _over(rows, tiles.CORE_ROWS)
    P, C = 4 * splits * rows * r, 8 * r * r
    wide = 1 + pair
    read = columns * P + programs * C * wide**2 + keep * wide * P
    written = (2 * terms * rows * R if padded else 4 * rows * r) + keep * 4 * rows * r
    flops = 2 * _padded(rows, tiles.CORE_ROWS) * columns * BR * _padded(r, BR)
    return Launch("core_kernel", read, written, P + C + written, {"tensor_fp64": flops}, programs * columns)


def _row_splits(family, M, K, tile):
    splits = tiles.splits(family, _over(K, tile.cols), M, 2 * tile.rows)
    return _padded(_over(M, splits), tile.rows)


def _update(family, dtype, M, K, r, with_y=False, with_s=False, z=False, dV=False):
    """z = y - R V^T and dV; (launch, splits of dV)."""
    s, R, tile = dtype.itemsize, tiles.rank(r), tiles.update(family, dtype, tiles.rank(r))
    per_split = _row_splits(family, M, K, tile) if dV else tile.rows
    splits, columns, row_tiles = _over(M, per_split), _over(K, tile.cols), _over(M, tile.rows)
    z_terms = (3 if dtype is torch.float32 else 2) * z
    rows, of_rows, V = M * K * s, 2 * M * R, 2 * K * R
    factors = dV * 3 * (1 + with_s) + z_terms
    read = rows * (with_y + dV) + columns * of_rows * factors + row_tiles * V * z_terms
    written = rows * z + 4 * splits * K * r * dV
    unique = rows * (with_y + dV) + of_rows * (3 * dV * (1 + with_s) or z_terms) + V * z_terms + written
    # How Triton lays four warps over z's tile: some are computed twice.
    twice = tile.rows == 32 and (tile.cols == 64) == dV
    products = _OF_TERMS.get(z_terms, 0) * (2 if twice else 1)
    products += dV * (1 + with_s) * _PRODUCTS[_TERMS[dtype]]
    flops = 2 * row_tiles * tile.rows * columns * tile.cols * R * products
    return Launch("update_kernel", read, written, unique, {"tensor_bf16": flops}, columns * splits), splits


def _gram(family, rows, r, upper):
    """Partial sums of a^T b (float32 a, b) in float64; (launch, splits)."""
    BR = min(tiles.rank(r), 32)
    side = _over(r, BR)
    splits = tiles.splits(family, side * side, rows, 4 * tiles.GRAM_ROWS)
    per_split = _padded(_over(rows, splits), tiles.GRAM_ROWS)
    splits = _over(rows, per_split)
    width = [min(BR, r - i * BR) for i in range(side)]
    pairs = [(a, b) for i, a in enumerate(width) for j, b in enumerate(width) if j >= i or not upper]
    written = 8 * splits * sum(a * b for a, b in pairs)
    read = 4 * rows * sum(a + b for a, b in pairs)
    flops = {"tensor_fp64": 2 * BR * BR * _padded(rows, tiles.GRAM_ROWS) * len(pairs)}
    unique = 4 * rows * r * (1 if upper else 2) + written
    return Launch("gram_kernel", read, written, unique, flops, splits * side * side), splits


def factor(family, Ks, r):
    """The factors of layers of K features, one launch; the last program of a layer adds and inverts V^T V."""
    grams = [_gram(family, K, r, upper=True) for K in Ks]
    R, side = tiles.rank(r), _over(r, min(tiles.rank(r), 32))
    merges = [(B, R // (2 * B)) for B in (16, 32, 64) if B < R]
    n, splits = len(Ks), [splits for _, splits in grams]
    programs = sum(splits) * side * (side + 1) // 2
    read = 8 * (16 * R + R * R + sum(3 * B * B * pairs for B, pairs in merges))
    written = 8 * (2 * R * R + 16 * R + r * r + sum(B * B * pairs for B, pairs in merges)) + 4
    # Four warps share a 16 x 16 product by doing it twice.
    flops = sum(4 * B**3 * pairs * (2 if B == 16 else 1) for B, pairs in merges)
    sums = 8 * sum(splits) * r * r
    return Launch(
        "wy_factor_kernel",
        sum(gram.read for gram, _ in grams) + n * read + sums + 4 * programs,
        sum(gram.written for gram, _ in grams) + n * written + 4 * programs,
        sum(gram.unique for gram, _ in grams) + n * 8 * (r * r + 4 * R * R) + sums,
        {"tensor_fp64": sum(gram.flops["tensor_fp64"] for gram, _ in grams) + n * flops},
        n * max(splits) * side * side,
    )


def _gram_gradient(r):
    R, programs = tiles.rank(r), _over(r, 16)
    flops = {"tensor_fp64": programs * programs * 4 * 16 * 16 * R}
    return Launch("gram_gradient_kernel", 8 * r * (2 * r * programs + r), 8 * r * r, 24 * r * r, flops, programs)


def _penalty(r, splits, backward):
    # Every thread loads what it needs of a vector of R, and the incoming gradient.
    read = 8 * splits * (r * r + r * max(1, 128 // tiles.rank(r))) + 512 * backward
    written = 8 * r * r if backward else 4
    return Launch("penalty_kernel", read, written, read + written, {}, 1)


def _linear(dtype, M, N, K, r, tile):
    s, R = dtype.itemsize, tiles.rank(r)
    tiles_m, tiles_n = _over(M, tile.rows), _over(N, tile.cols)
    low_rank = 4 * R
    read = tiles_n * M * (K * s + low_rank) + tiles_m * N * (K * s + low_rank)
    written, area = M * N * s, tiles_m * tile.rows * tiles_n * tile.cols
    flops = {"tensor_bf16": 6 * area * R}
    flops[_KINDS[dtype]] = flops.get(_KINDS[dtype], 0) + 2 * area * _padded(K, tile.depth)
    unique = (M + N) * (K * s + low_rank) + written
    return Launch("linear_kernel", read, written, unique, flops, tiles_m * tiles_n)


def _linear_backward(dtype, M, N, K, r, tile):
    """(launch, splits of dV)."""
    s, R = dtype.itemsize, tiles.rank(r)
    tiles_m, tiles_k = _over(M, tile.rows), _over(K, tile.cols)
    terms = tiles.dx_terms(dtype, K, r)
    read = tiles_k * M * (N * s + 12 * R) + tiles_m * K * (N * s + 2 * R * terms) + M * K * s
    written, area = M * K * s + 4 * tiles_m * K * r, tiles_m * tile.rows * tiles_k * tile.cols
    products = _OF_TERMS[terms] + _PRODUCTS[3] + _PRODUCTS[_TERMS[dtype]]
    flops = {"tensor_bf16": 2 * area * R * products}
    flops[_KINDS[dtype]] = flops.get(_KINDS[dtype], 0) + 2 * area * _padded(N, tile.depth)
    unique = (M * N + N * K + M * K) * s + 12 * M * R + 2 * terms * K * R + written
    return Launch("linear_backward_kernel", read, written, unique, flops, tiles_m * tiles_k), tiles_m


def _library(name, M, N, K, dtype, accumulate=False):
    """C [M, N] = A [M, K] B [K, N], or C += A B, by the vendor's library."""
    size = dtype.itemsize
    read, written = size * (M * K + K * N + M * N * accumulate), size * M * N
    return Launch(f"library: {name}", read, written, read + written, {_KINDS[dtype]: 2 * M * N * K})


def _gradient_of_factor(family, M, r):
    launch, splits = _gram(family, M, r, upper=False)
    return [launch, _reduce(r * r, splits, 8)]


def _rotated_linear(family, dtype, M, N, K, r):
    tile = tiles.linear(family, M, tiles.rank(r), False)
    project, splits = _project(family, dtype, M, K, r)
    small = [
        _split(K, r, 3, pair=True),
        *_gathered(_project(family, dtype, N, K, r)),
        _split(N, r, 2),
        project,
        _core(M, r, 2, splits, keep=True, pair=True),
    ]
    if tile is not None:
        return [*small, _linear(dtype, M, N, K, r, tile)]
    update = _update(family, dtype, M, N, r, z=True)[0]
    return [*small, update, _library("y += x W^T", M, N, K, dtype, accumulate=True)]


def _rotated_linear_backward(family, dtype, M, N, K, r):
    tile = tiles.linear_backward(family, M, tiles.rank(r))
    project, splits = _project(family, dtype, M, N, r)
    small = [
        _split(K, r, 3),
        _split(N, r, 3, pair=True),
        project,
        _core(M, r, 3, splits, keep=True),
        _core(M, r, 3),
    ]
    if tile is not None:
        product, partial = _linear_backward(dtype, M, N, K, r, tile)
        return [*small, product, _reduce(K * r, partial), *_gradient_of_factor(family, M, r)]
    of_x, x_splits = _update(family, dtype, M, K, r, z=True, dV=True)
    of_y, y_splits = _update(family, dtype, M, N, r, dV=True)
    of_W, W_splits = _update(family, dtype, N, K, r, dV=True)
    sums = [of_x, _library("dx += dy W", M, K, N, dtype, accumulate=True), of_y]
    sums += [_reduce(N * r, y_splits)] if y_splits > 1 else []
    return [
        *small, *sums, _split(N, r, 3), of_W, _reduce(K * r, x_splits + W_splits), *_gradient_of_factor(family, M, r)
    ]  # fmt: skip


def launches(op, *, M, K, N, r, dtype, family):
    """The launches of one call, as in peftkern.ops._costs; both gradients are wanted, and no bias."""
    if dtype is torch.float64:
        raise NotImplementedError("costs are stated for float32 and half precision")
    half = dtype.itemsize == 2
    if op == "wy_factor":
        return [factor(family, [K], r)]
    if op in ("orthogonality_penalty", "orthogonality_penalty_backward"):
        gram, splits = _gram(family, K, r, upper=True)
        backward = op.endswith("backward")
        return [gram, _penalty(r, splits, backward)] + [_core(K, r, 1, padded=False)] * backward
    if op == "wy_factor_backward":
        return [_gram_gradient(r), _core(K, r, 1, padded=False)]
    if op == "project":
        return [_split(K, r, 3), *_gathered(_project(family, dtype, M, K, r))]
    if op == "project_backward":
        update, splits = _update(family, dtype, M, K, r, z=True, dV=True)
        return [_split(K, r, 3), _split(M, r, 3), update, _reduce(K * r, splits)]
    if op == "rotate":
        project, splits = _project(family, dtype, M, K, r)
        terms = 2 if half else 3
        update = _update(family, dtype, M, K, r, with_y=True, z=True)[0]
        return [_split(K, r, 3), project, _core(M, r, terms, splits, keep=True), update]
    if op == "rotate_backward":
        project, splits = _project(family, dtype, M, K, r)
        update, partial = _update(family, dtype, M, K, r, with_y=True, with_s=True, z=True, dV=True)
        small = [_split(K, r, 3), project, _core(M, r, 3, splits, keep=True), _core(M, r, 3)]
        return [*small, update, _reduce(K * r, partial), *_gradient_of_factor(family, M, r)]
    if op in ("rotated_linear", "rotated_linear_backward") and not half:
        forward = op == "rotated_linear"
        rotate = launches("rotate" if forward else "rotate_backward", M=M, K=K, N=N, r=r, dtype=dtype, family=family)
        return [*rotate, _library("z W^T", M, N, K, dtype)] if forward else [_library("dy W", M, K, N, dtype), *rotate]
    if op == "rotated_linear":
        return _rotated_linear(family, dtype, M, N, K, r)
    if op == "rotated_linear_backward":
        return _rotated_linear_backward(family, dtype, M, N, K, r)
    raise NotImplementedError(f"triton does not write {op}")
