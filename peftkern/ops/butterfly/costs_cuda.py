"""What the CUDA C++ kernels of the `butterfly` operations move and compute: those of block_rotation/costs_cuda.py on
stages that were multiplied out, and the output scale.
"""

from dataclasses import replace

import torch

from peftkern.ops._costs import Launch
from peftkern.ops.block_rotation import costs_cuda as blocks


def _runs(M, N, size):
    """Blocks across and runs of rows of the scale's kernels, whose lanes take 16 bytes of columns."""
    across = blocks.over(N, 32 * 16 // size)
    return across, blocks.fewest(blocks.over(M, 64), across, M)


def _scale(M, N, dtype):
    """(y - b) s + b without b. Each of eight warps reads s, seven of them from the L1 cache; so they do below."""
    (across, chunks), rows = _runs(M, N, dtype.itemsize), dtype.itemsize * M * N
    read = rows + 32 * chunks * N
    return [Launch("scale_outputs_kernel", read, rows, 2 * rows + 4 * N, {}, chunks * across)]


def _scale_backward(M, N, dtype, want_dy, want_scale):
    (across, chunks), rows = _runs(M, N, dtype.itemsize), dtype.itemsize * M * N
    partial = 4 * chunks * N * want_scale
    read, written = (1 + want_scale) * rows + 32 * chunks * N, want_dy * rows + partial
    unique = (1 + want_scale + want_dy) * rows + 4 * N + partial
    launch = Launch("scale_outputs_kernel", read, written, unique, {}, chunks * across)
    return [launch, *([blocks.summed(N, chunks)] if want_scale else [])]


def _scale_product(M, N, dtype):
    """(y + y_low) s of y in float32, and in half precision y + y_low, which is there else."""
    (across, chunks), half = _runs(M, N, 4), dtype.itemsize == 2
    moved, written = (4 + 2 * half) * M * N, 4 * M * N
    return [
        Launch("scale_product_kernel", moved + 32 * chunks * N, written, moved + written + 4 * N, {}, chunks * across)
    ]


def launches(op, *, M, K, N, b, f=1, dtype, family, shared=False, terms=5, mask=None):
    """The launches of one call, as in peftkern.ops._costs; with a scale of the outputs and without a bias."""
    if dtype is torch.float64:
        raise NotImplementedError("costs are stated for float32 and half precision")
    groups = blocks.Groups(dtype, K, b, f)
    if op == "dense_cayley":
        return [blocks.cayley(f * K // b, b, packed=False)]
    if op == "dense_cayley_backward":
        return [blocks.cayley(f * K // b, b, packed=False, backward=True)]
    if op == "butterfly_rotate":
        return groups.rotate(M)
    if op == "butterfly_rotate_backward":
        return groups.rotate_backward(M, mask or (True, True))
    if op == "butterfly_rotate_weight":
        return groups.rotate(N, scaled=True)
    if op == "scale_outputs":
        return _scale(M, N, dtype)
    if op == "scale_outputs_backward":
        want_dy, want_scale = mask or (True, True)
        return _scale_backward(M, N, dtype, want_dy, want_scale)
    if op == "butterfly_rotated_linear" and dtype.itemsize == 4:
        return [*groups.rotate(M), blocks.library("p = z W^T", M, N, K, dtype), *_scale_product(M, N, dtype)]
    if op == "butterfly_rotated_linear":
        wide = blocks.library("p = z W^T in float32", M, N, K, dtype)
        wide = replace(wide, written=2 * wide.written, unique=wide.unique + wide.written)
        low = blocks.library("p_low = z_low W^T", M, N, K, dtype)
        return [*groups.rotate(M, outputs=2), low, wide, *_scale_product(M, N, dtype)]
    if op == "butterfly_rotated_linear_backward":
        want_dx, want_scale, want_dR = mask or (True, True, True)
        scaled = _scale_backward(M, N, dtype, want_dx or want_dR, want_scale)
        if not want_dx and not want_dR:
            return scaled
        product = blocks.library("dp W", M, K, N, dtype)
        return [*scaled, product, *groups.rotate_backward(M, (want_dx, want_dR))]
    raise NotImplementedError(f"cuda does not write {op}")
