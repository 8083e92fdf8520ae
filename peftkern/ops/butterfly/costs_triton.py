"""What the Triton kernels of the `butterfly` operations move and compute, as block_rotation/costs_triton.py has it."""

import torch

from peftkern.ops._costs import Launch
from peftkern.ops.block_rotation import costs_triton as blocks
from peftkern.ops.block_rotation import triton_tiles as tiles
from peftkern.ops.butterfly import triton_backend as backend
from peftkern.ops.householder.costs_triton import _library, _over, _reduce


def _group(K, b, f):
    G = b << (f - 1)
    return G, K // G, max(16, 1 << (G - 1).bit_length())


def _through_stages(K, b, f):
    """Bytes that rows of K / G matrices [G, G] read on their way through f - 1 stages: of themselves, and of R."""
    G, groups, _ = _group(K, b, f)
    return (f - 1) * b * groups * 8 * G * G


def _stages(K, b, f):
    G, groups, P = _group(K, b, f)
    R, V, programs = 4 * f * K * b, 4 * f * K * G, groups * _over(G, backend.rows_of_group(P))
    # Columns are padded; rows beyond the group are computed, too.
    flops = {"fp32": 2 * (f - 1) * b * programs * backend.rows_of_group(P) * P}
    return Launch("stages_kernel", _through_stages(K, b, f) + R // f, V, R + 2 * V - V // f, flops, programs)


def _gradient_of_blocks(K, b, f, partial):
    G, groups, P = _group(K, b, f)
    R, D, programs = 4 * f * K * b, 4 * K * G, groups * _over(G, backend.rows_of_group(P))
    sums = partial // (K * G) - 1
    flops = {"fp32": (2 * (f - 1) * b + sums) * programs * backend.rows_of_group(P) * P}
    through = Launch(
        "stages_backward_kernel", 4 * partial + _through_stages(K, b, f), f * D,
        4 * partial + R // f * (f - 1) + (2 * f - 1) * D, flops, programs,
    )  # fmt: skip
    depth, columns = _over(G, min(P, 32)) * min(P, 32), min(P, backend.COLUMNS)
    chunks, once = _over(G, columns), blocks.repeated(columns, columns, backend.warps(columns))
    products = {"tensor_bf16": 12 * once * groups * f * (chunks * columns) ** 2 * depth}
    read = (2 * f - 1) * D
    blocks_of = Launch("blocks_gradient_kernel", chunks * read, R, read + R, products, groups * f * chunks**2)
    return [through, blocks_of]


def _scale_splits(family, M, N):
    panels = _over(N, tiles.SCALE.width)
    return panels, tiles.splits(family, tiles.SCALE.programs, tiles.SCALE.rows, panels, M)[0]


def _scale(family, dtype, M, N):
    panels, splits = _scale_splits(family, M, N)
    rows = M * N * dtype.itemsize
    return Launch("scale_kernel", rows + 4 * N * splits, rows, 2 * rows + 4 * N, {}, panels * splits)


def _scale_backward(family, dtype, M, N, want_dy=True, want_scale=True):
    panels, splits = _scale_splits(family, M, N)
    rows, sums = M * N * dtype.itemsize, 4 * splits * N * want_scale
    read, written = rows * (1 + want_scale) + 4 * N * splits, rows * want_dy + sums
    unique = rows * (1 + want_scale) + 4 * N + written
    launch = Launch("scale_backward_kernel", read, written, unique, {}, panels * splits)
    return [launch, _reduce(N, splits)] if want_scale and splits > 1 else [launch]


def _rotate(family, dtype, M, K, b, f, terms=1, scaled=False):
    G = b << (f - 1)
    rotate = blocks.rotate(family, dtype, M, K, G, K == G, terms, scaled)
    return [rotate] if f == 1 else [_stages(K, b, f), rotate]


def _rotate_backward(family, dtype, M, K, b, f, mask):
    _, want_dR = mask
    G = b << (f - 1)
    rotated, partial = blocks.rotate_backward(family, dtype, M, K, G, K == G, mask)
    if f == 1:
        return [*rotated, _reduce(K * b, partial // (K * b))] if partial > K * b else rotated
    return [_stages(K, b, f), *rotated, *(_gradient_of_blocks(K, b, f, partial) if want_dR else ())]


def launches(op, *, M, K, N, b, f, dtype, family, mask=None):
    """The launches of one call, as in peftkern.ops._costs."""
    if dtype is torch.float64:
        raise NotImplementedError("costs are stated for float32 and half precision")
    half = dtype.itemsize == 2
    if op == "dense_cayley":
        return [blocks.cayley(f * K, b, True)]
    if op == "dense_cayley_backward":
        return [blocks.cayley_backward(family, f * K, b, True)]
    if op == "butterfly_rotate":
        return _rotate(family, dtype, M, K, b, f)
    if op == "butterfly_rotate_backward":
        return _rotate_backward(family, dtype, M, K, b, f, mask or (True, True))
    if op == "butterfly_rotate_weight":
        return _rotate(family, dtype, N, K, b, f, scaled=True)
    if op == "scale_outputs":
        return [_scale(family, dtype, M, N)]
    if op == "scale_outputs_backward":
        return _scale_backward(family, dtype, M, N, *(mask or (True, True)))
    if op == "butterfly_rotated_linear":
        if half:
            return [*_rotate(family, dtype, M, K, b, f, 2), blocks.linear(family, dtype, M, N, K)]
        product = _library("z W^T", M, N, K, dtype)
        return [*_rotate(family, dtype, M, K, b, f), product, _scale(family, dtype, M, N)]
    if op == "butterfly_rotated_linear_backward":
        want_dx, want_scale, want_dR = mask or (True, True, True)
        scaled = _scale_backward(family, dtype, M, N, want_dx or want_dR, want_scale)
        if not (want_dx or want_dR):
            return scaled
        rotated = _rotate_backward(family, dtype, M, K, b, f, (want_dx, want_dR))
        return [*scaled, _library("dy s W", M, K, N, dtype), *rotated]
    raise NotImplementedError(f"triton does not write {op}")
