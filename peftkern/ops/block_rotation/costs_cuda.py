"""What the CUDA C++ kernels of `block_rotation` and `butterfly` (csrc/cuda/block_*.cu) move and compute.

Constants and choices are those of the launchers; tests hold the formulas to what the PTX machine counts. Flops outside
of products are left out where they cannot limit. A rotation's matrices are read twice per panel of columns and chunk of
rows, the second time from the L1 cache; `unique` counts them once.
"""

import torch

from peftkern.ops._costs import Launch

_DEVICE = 132  # multiprocessors of a large one
_TILE_ROWS, _STAGE_ROWS, _SLICE = 64, 32, 32
_UNITS = {torch.bfloat16: "tensor_bf16", torch.float16: "tensor_fp16", torch.float32: "tensor_tf32"}


def over(a, b):
    return -(-a // b)


def fewest(most, across, steps, resident=4):
    """Runs, at most `most`, of `across` blocks each that fill a device; of as many whole steps each as it takes."""
    chunks = min(most, max(1, resident * _DEVICE // across))
    return over(steps, over(steps, chunks)) if chunks else 0


class Groups:
    """K columns in groups of G, each with its matrix, or all with one."""

    def __init__(self, dtype, K, b, f=1, shared=False):
        self.dtype, self.size, self.b, self.f = dtype, dtype.itemsize, b, f
        self.G = b << (f - 1)
        self.n, self.shared = K // self.G, shared
        self.padded = next(P for P in (8, 16, 32, 64, 128) if self.G <= P)
        self.panel = max(self.padded, 64)
        self.panels = over(self.n * self.padded, self.panel)
        self.stored = 4 * (1 if shared else self.n) * self.G**2

    def chunks(self, M):
        steps = over(M, _TILE_ROWS)
        return fewest((steps + 1) // 2, self.panels, steps, 4 if self.padded < 64 else 3 if self.padded == 64 else 2)

    def product(self):
        """The stages of a butterfly as one matrix per group."""
        if self.f == 1:
            return []
        n, G, b, runs = self.n, self.G, self.b, over(self.G, _STAGE_ROWS)
        stages, D = 4 * self.f * n * G * b, 4 * n * G * G
        flops = {"fp32": 2 * n * runs * _STAGE_ROWS * self.f * G * b}
        return [Launch("butterfly_product_kernel", runs * stages, D, stages + D, flops, n * runs)]

    def _products(self, M, terms, width):
        """Flops of M rows, in whole tiles, times padded matrices, of which `width` columns are made at once."""
        return {_UNITS[self.dtype]: 2 * terms * over(M, _TILE_ROWS) * _TILE_ROWS * self.panels * self.panel * width}

    def rotate(self, M, outputs=1, scaled=False):
        """z = x D, and what z lacks where there are two outputs; scaled: times a number of each row."""
        n, G, chunks, rows = self.n, self.G, self.chunks(M), self.size * M * self.n * self.G
        flops = self._products(M, 3 if self.size == 4 else 2, self.padded)
        # Four lanes of each slice of a panel read the number of a row.
        read, written = rows + 8 * chunks * n * G * G, outputs * rows
        unique = rows + written + self.stored
        name = "block_rotate_kernel"
        if scaled:
            name, read = "block_rotate_scaled_kernel", read + 16 * M * self.panels * self.panel // _SLICE
            unique += 4 * M
        return [*self.product(), Launch(name, read, written, unique, flops, chunks * self.panels)]

    def rotate_backward(self, M, mask):
        want_dx, want_dR = mask
        if not want_dR:
            return self.rotate(M) if want_dx else []
        if want_dx and self.padded > 64:
            return [*self.rotate(M), *self.rotate_backward(M, (False, True))[len(self.product()) :]]
        n, G, chunks, rows = self.n, self.G, self.chunks(M), self.size * M * self.n * self.G
        unit = _UNITS[self.dtype]
        flops = self._products(M, 3 if self.size == 4 else 1, max(self.padded, 16))
        if want_dx:
            flops[unit] += self._products(M, 3 if self.size == 4 else 2, self.padded)[unit]
        D, partial = 8 * chunks * n * G * G * want_dx, 4 * chunks * n * G * G
        unique = (2 + want_dx) * rows + self.stored * want_dx + partial
        launch = Launch("block_rotate_backward_kernel", 2 * rows + D, want_dx * rows + partial, unique, flops,
                        chunks * self.panels)  # fmt: skip
        return [*self.product(), launch, *self.gradient(chunks)]

    def gradient(self, chunks):
        """dR of partial sums of the gradient in the matrices."""
        n, G, b, f = self.n, self.G, self.b, self.f
        if f == 1:
            return [summed(G * G if self.shared else n * G * G, chunks * (n if self.shared else 1))]
        runs = over(G, _STAGE_ROWS)
        partial, stages = 4 * chunks * n * G * G, 4 * f * n * G * b
        flops = {"fp32": 2 * n * f * runs * _STAGE_ROWS * f * G * b + f * n * chunks * G * G}
        read = f * partial + (runs * f - 1) * stages
        unique = partial + 2 * stages
        return [Launch("butterfly_product_backward_kernel", read, runs * stages, unique, flops, n * f)]


def summed(count, terms):
    """`terms` vectors of float32 added up."""
    blocks = over(count, 32 if terms > 64 else 256)
    return Launch("block_sum_kernel", 4 * count * terms, 4 * count, 4 * count * (terms + 1), {}, blocks)


def _side(b):
    """The size that the maps' threads cover."""
    return next(n for n in (8, 16, 32, 64) if b <= n)


def polynomial(S, b, terms, backward=False):
    n, packed, full, degree = _side(b), 4 * S * b * (b - 1) // 2, 4 * S * b * b, terms - 1
    products = (3 * degree - 4 if backward else degree - 1) if degree > 1 else 0
    flops = {"fp32": 2 * products * S * n * n * b}
    if backward:
        moved = 2 * packed + full
        return Launch("skew_polynomial_backward_kernel", packed + full, packed, moved, flops, S)
    return Launch("skew_polynomial_kernel", packed, full, packed + full, flops, S)


def cayley(S, b, packed, backward=False):
    n, full = _side(b), 4 * S * b * b
    parameter = 4 * S * b * (b - 1) // 2 if packed else full
    if backward:
        flops = {"fp64": S * (4 * n * n * b + n * min(n, 16) * b + 2 * n * n)}
        return Launch("cayley_backward_kernel", 2 * full, parameter, 2 * full + parameter, flops, S)
    flops = {"fp64": 3 * S * b**3}
    return Launch("cayley_kernel", parameter, full, parameter + full, flops, S)


def library(name, M, N, K, dtype, accumulate=False):
    """C [M, N] = A [M, K] B [K, N], or C += A B, by the vendor's library."""
    size = dtype.itemsize
    read, written = size * (M * K + K * N + M * N * accumulate), size * M * N
    kind = {torch.bfloat16: "tensor_bf16", torch.float16: "tensor_fp16", torch.float32: "fp32"}[dtype]
    return Launch(f"library: {name}", read, written, read + written, {kind: 2 * M * N * K})


def linear_of_rotated(groups, M, K, N):
    """(x R) W^T without a bias, x R unrounded."""
    if groups.size == 4:
        return [*groups.rotate(M), library("z W^T", M, N, K, groups.dtype)]
    return [
        *groups.rotate(M, outputs=2),
        library("z_low W^T", M, N, K, groups.dtype),
        library("y += z W^T", M, N, K, groups.dtype, accumulate=True),
    ]


def launches(op, *, M, K, N, b, f=1, dtype, family, shared=False, terms=5, mask=None):
    """The launches of one call, as in peftkern.ops._costs; f is one, and there is no bias."""
    if dtype is torch.float64:
        raise NotImplementedError("costs are stated for float32 and half precision")
    S, groups = 1 if shared else K // b, Groups(dtype, K, b, 1, shared)
    if op == "skew_polynomial":
        return [polynomial(S, b, terms)]
    if op == "skew_polynomial_backward":
        return [polynomial(S, b, terms, backward=True)]
    if op == "skew_cayley":
        return [cayley(S, b, packed=True)]
    if op == "skew_cayley_backward":
        return [cayley(S, b, packed=True, backward=True)]
    if op == "block_rotate":
        return groups.rotate(M)
    if op == "block_rotate_backward":
        return groups.rotate_backward(M, mask or (True, True))
    if op == "block_rotated_linear":
        return linear_of_rotated(groups, M, K, N)
    if op == "block_rotated_linear_backward":
        return [library("dy W", M, K, N, dtype), *groups.rotate_backward(M, mask or (True, True))]
    raise NotImplementedError(f"cuda does not write {op}")
