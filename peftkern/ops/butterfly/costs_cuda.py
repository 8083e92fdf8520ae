"""What the CUDA C++ kernels of the `butterfly` operations move and compute: those of block_rotation/costs_cuda.py on
stages that were multiplied out, and the output scale.
"""

import torch

from peftkern.ops._costs import Launch
from peftkern.ops.block_rotation import costs_cuda as blocks


def _scale(M, N, dtype, backward=False, want_dy=True, want_scale=True, terms=1):
    """(y - b) s + b without b, y in `terms` terms. Each of eight warps reads s, seven of them from the L1 cache."""
    size = dtype.itemsize
    across = blocks.over(N, 32 * 16 // size)
    chunks, rows = blocks.fewest(blocks.over(M, 64), across, M), size * M * N
    if not backward:
        read = terms * rows + 32 * chunks * N
        return [Launch("scale_outputs_kernel", read, rows, (terms + 1) * rows + 4 * N, {}, chunks * across)]
    partial = 4 * chunks * N * want_scale
    read, written = (1 + want_scale) * rows + 32 * chunks * N, want_dy * rows + partial
    unique = (1 + want_scale + want_dy) * rows + 4 * N + partial
    launch = Launch("scale_outputs_kernel", read, written, unique, {}, chunks * across)
    return [launch, *([blocks.summed(N, chunks)] if want_scale else [])]


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
    if op == "scale_outputs":
        return _scale(M, N, dtype)
    if op == "scale_outputs_backward":
        want_dy, want_scale = mask or (True, True)
        return _scale(M, N, dtype, True, want_dy, want_scale)
    if op == "butterfly_rotated_linear" and dtype.itemsize == 4:
        return [*groups.rotate(M), blocks.library("p = z W^T", M, N, K, dtype), *_scale(M, N, dtype)]
    if op == "butterfly_rotated_linear":
        return [
            *groups.rotate(M, outputs=2),
            blocks.library("p = z W^T", M, N, K, dtype),
            blocks.library("p_low = z W^T - p", M, N, K, dtype, accumulate=True),
            blocks.library("p_low += z_low W^T", M, N, K, dtype, accumulate=True),
            *_scale(M, N, dtype, terms=2),
        ]
    if op == "butterfly_rotated_linear_backward":
        want_dx, want_scale, want_dR = mask or (True, True, True)
        scaled = _scale(M, N, dtype, True, want_dx or want_dR, want_scale)
        if not want_dx and not want_dR:
            return scaled
        product = blocks.library("dp W", M, K, N, dtype)
        return [*scaled, product, *groups.rotate_backward(M, (want_dx, want_dR))]
    raise NotImplementedError(f"cuda does not write {op}")
