"""What the CUDA C++ kernels of the `householder` operations (csrc/cuda/householder_*.cu) move and compute.

Constants and choices are those of csrc/cuda/tiles.h and of the launchers; tests hold the formulas to what the PTX
machine counts. Flops outside of products are left out where they cannot limit. x that a second sweep reads again comes
from the L2 cache as far as it fits there, so `unique` counts it once.
"""

import torch

from peftkern.ops._costs import Launch

# (shared memory of one block, of one of two blocks) in bytes: csrc/cuda/tiles.h.
_SHARED = {"sm80": (163, 81), "sm86": (99, 49), "sm89": (99, 49), "sm90": (227, 113), "sm100": (227, 113)}
_FILL = 4 * 132
_GRAM_TILE = 8 * 32 * 32


def _over(a, b):
    return -(-a // b)


def _padded(r):
    return 32 if r <= 32 else 64 if r <= 64 else 128


def _part_columns(M, K):
    tiles = _over(M, 64)
    if tiles >= _FILL // 6 or K < 512:
        return K
    return _over(K, 64 * min(_FILL // 2 // tiles, K // 256)) * 64


def _core_bytes(r):
    """Of T, for 8 rows times the core: tiles of eight at and below the diagonal."""
    widths = [min(8, r - i) for i in range(0, r, 8)]
    return 8 * (r * r + sum(w * w for w in widths)) // 2


def _core_flops(r):
    tiles = _over(r, 8)
    return 512 * tiles * (tiles + 1)


class _Rows:
    """One call of householder_rows: what `cuda_backend._run_rows` is given."""

    def __init__(self, dtype, family, M, K, r, *, x=True, z=False, P=False, S=False, core=False, given=False,
                 saved=False):  # fmt: skip
        self.size, self.family, self.M, self.K, self.r = dtype.itemsize, family, M, K, r
        self.x, self.z, self.P, self.S, self.core, self.given, self.saved = x, z, P, S, core, given, saved
        R = _padded(r)
        self.columns = (64 if R == 128 else 128) // self.size
        self.x_bytes, self.fixed = 64 * (self.columns + 8) * self.size, (3 * self.columns * R + 64 * R) * 4
        self.tiles, self.terms = _over(M, 64), 3 if self.size == 4 else 2
        self.warps = 8 * self.tiles

    def launches(self):
        parts = _over(self.K, _part_columns(self.M, self.K))
        if self.given or parts == 1:
            return [self._sweeps(parts if self.given else 1)]
        small = 4 * self.M * self.r
        first = self._sweeps(parts, z=False, S=False, core=False, saved=False, P=parts)
        cores = self.core + self.saved
        read = small * (parts + self.saved) + cores * self.warps * _core_bytes(self.r)
        written = small * (self.P + (self.S or self.z) + self.saved)
        unique = small * (parts + self.saved) + written + 8 * self.r**2 * (cores > 0)
        flops = {"tensor_fp64": cores * self.warps * _core_flops(self.r)}
        second = Launch("householder_parts_kernel", read, written, unique, flops, self.tiles)
        return [first, second] + ([self._sweeps(parts, given=True, P=0, S=False, saved=False)] if self.z else [])

    def _sweeps(self, parts, **changes):
        use = {name: getattr(self, name) for name in ("x", "z", "P", "S", "core", "given", "saved")} | changes
        M, K, r, s = self.M, self.K, self.r, self.size
        part = K if parts == 1 else _part_columns(M, K)
        chunks, grid_y = _over(part, self.columns), _over(K, part)
        padded = (grid_y - 1) * part + _over(K - (grid_y - 1) * part, self.columns) * self.columns
        one, two = (1024 * kib for kib in _SHARED[self.family])
        fits = (one - self.fixed) // self.x_bytes
        stages = 3
        if use["z"] and not use["given"]:
            stages = max(chunks, 3) if chunks <= fits else max((two - self.fixed) // self.x_bytes, 3)
        small, V = 4 * M * r, 4 * self.tiles * K * r
        read = written = unique = tf32 = fp64 = 0
        if use["saved"]:
            read += small + self.warps * _core_bytes(r)
            written += small
            unique += 2 * small
            fp64 += self.warps * _core_flops(r)
        if use["given"]:
            read += grid_y * small
            unique += small
        else:
            read += M * K * s + V
            tf32 += 2 * 64 * self.tiles * padded * _over(r, 8) * 8 * self.terms
            written += small * use["P"]
            unique += M * K * s + small * use["P"]
        if use["core"] and not use["given"]:
            read += self.warps * _core_bytes(r)
            written += small * use["S"]
            unique += small * use["S"] + 8 * r * r
            fp64 += self.warps * _core_flops(r)
        if use["z"]:
            kept_x, kept_V = (0, 0) if use["given"] else (min(stages, chunks), min(3, chunks))
            again = [min((chunks - kept) * self.columns, K) for kept in (kept_x, kept_V)]
            x_read, V_read = (K, K) if use["given"] else again
            read += M * x_read * s * use["x"] + 4 * self.tiles * V_read * r
            written += M * K * s
            unique += M * K * s * (1 + (use["given"] and use["x"]))
            tf32 += 2 * 64 * self.tiles * padded * _over(r, 16) * 16 * 3
        unique += 4 * K * r
        flops = {"tensor_tf32": tf32} | ({"tensor_fp64": fp64} if fp64 else {})
        return Launch("householder_rows_kernel", read, written, unique, flops, self.tiles * grid_y)


def _outer_chunks(rows, K):
    return min(_over(rows, 128), _over(_FILL, _over(K, 64)))


def _outer(dtype, pairs, K, r, core_rows=0):
    """householder_outer over pairs of so many rows, with D from core_rows, and the sum of its partial buffers."""
    columns, chunks = _over(K, 64), sum(_outer_chunks(rows, K) for rows in pairs)
    tiles = _over(r, 32)
    core_chunks = _over(core_rows, 128)
    core_blocks = core_chunks * tiles * tiles
    read = sum(rows * K * dtype.itemsize + 4 * columns * rows * r for rows in pairs) + 8 * tiles * core_rows * r
    written = 4 * chunks * K * r + core_blocks * _GRAM_TILE
    unique = sum(rows * K * dtype.itemsize + 4 * rows * r for rows in pairs) + 8 * core_rows * r + written
    terms = 3 if dtype.itemsize == 4 else 2
    padded = sum(_over(_over(rows, 32), n) * 32 * n for rows in pairs if (n := _outer_chunks(rows, K)))
    flops = {"tensor_tf32": 2 * padded * columns * 64 * _over(r, 8) * 8 * terms}
    if core_rows:
        flops["tensor_fp64"] = 2 * _over(core_rows, 4) * 4 * (32 * tiles) ** 2
    first = Launch("householder_outer_kernel", read, written, unique, flops, columns * chunks + core_blocks)
    read = 4 * chunks * K * r + 8 * core_chunks * r * r
    written = 4 * K * r + (8 * r * r if core_rows else 0)
    blocks = _over(K * r, 1024) + (4 * tiles * tiles if core_rows else 0)
    return [first, Launch("householder_outer_sum_kernel", read, written, read + written, {}, blocks)]


def _inverse_flops(n):
    """Diagonal blocks by substitution, a division counting as nine; two triangular products per merge."""
    flops = 373 * n
    for s in (16, 32, 64):
        for begin in range(0, n - s, 2 * s):
            columns = min(s, n - begin - s)
            flops += s * columns * (columns + 1) + s * (s + 1) * columns
    return flops


def _factor(K, r, out, job="T"):
    """The Gram matrix of float32 V [K, r] and what the last block makes of it: `out` bytes."""
    tiles = _over(r, 32)
    jobs, slices, n = tiles * (tiles + 1) // 2, _over(K, 256), _over(r, 16) * 16
    partial, last = slices * jobs * _GRAM_TILE, slices * 4 * n * (n + 1)
    end = {"T": _inverse_flops(n), "penalty": 8 * r * r + 256 * r, "core": 21 * r * r + 256 * r}[job]
    flops = {"tensor_fp64": 2 * jobs * 32 * 32 * _over(K, 4) * 4, "fp64": jobs * slices * _GRAM_TILE + last // 8 + end}
    read = 4 * tiles * K * r + last + (1024 if job == "core" else 0)
    return Launch("householder_factor_kernel", read, partial + out, 4 * K * r + last + partial + out, flops,
                  jobs * slices)  # fmt: skip


def _factor_backward(K, r, from_T=True):
    n, blocks = _over(r, 8), _over(K, 32)
    products = sum((J + 1) * (n - J) for J in range(n)) * 1024 + sum((J + 1) * (J + 2) for J in range(n)) * 256
    per_block = products if from_T else _core_bytes(r)
    small = sum((J + 1) * (n - J) + (J + 1) * (J + 2) // 2 for J in range(n)) if from_T else 0
    flops = {"tensor_fp64": blocks * (2 * 512 * small + 4 * n * n * 2 * 512)}
    matrices = (16 if from_T else 8) * r * r
    return Launch("householder_factor_backward_kernel", 4 * K * r + blocks * per_block, 4 * K * r,
                  8 * K * r + matrices, flops, blocks)  # fmt: skip


def _library(name, M, N, K, dtype, accumulate=False):
    """C [M, N] = A [M, K] B [K, N], or C += A B, by the vendor's library."""
    size = dtype.itemsize
    read, written = size * (M * K + K * N + M * N * accumulate), size * M * N
    kind = {torch.bfloat16: "tensor_bf16", torch.float16: "tensor_fp16", torch.float32: "fp32"}[dtype]
    return Launch(f"library: {name}", read, written, read + written, {kind: 2 * M * N * K})


def launches(op, *, M, K, N, r, dtype, family):
    """The launches of one call, as in peftkern.ops._costs; both gradients are wanted, and no bias."""
    if dtype is torch.float64:
        raise NotImplementedError("costs are stated for float32 and half precision")

    def rows(M, K, **use):
        return _Rows(dtype, family, M, K, r, **use).launches()

    half = dtype.itemsize == 2
    if op == "wy_factor":
        return [_factor(K, r, 8 * r * r)]
    if op == "wy_factor_backward":
        return [_factor_backward(K, r)]
    if op == "orthogonality_penalty":
        return [_factor(K, r, 4, "penalty")]
    if op == "orthogonality_penalty_backward":
        return [_factor(K, r, 8 * r * r, "core"), _factor_backward(K, r, from_T=False)]
    if op == "project":
        return rows(M, K, P=True)
    if op == "project_backward":
        return [*rows(M, K, x=False, z=True, given=True), *_outer(dtype, [M], K, r)]
    if op == "rotate":
        return rows(M, K, z=True, P=True, core=True)
    if op == "rotate_backward":
        return [*rows(M, K, z=True, P=True, S=True, core=True, saved=True), *_outer(dtype, [M, M], K, r, M)]
    if op == "rotated_linear" and not half:
        return [*rows(M, K, z=True, P=True, core=True), _library("z W^T", M, N, K, dtype)]
    if op == "rotated_linear":
        basis = 4 * K * r + 8 * r * r
        pair = Launch("householder_pair_basis_kernel", 8 * K * r + 32 * r * r, basis, 2 * basis, {},
                      _over(_over(K * r, 1024) * 256 + r * r, 256))  # fmt: skip
        return [
            pair,
            *rows(M, K, P=True, S=True, core=True),
            *rows(N, K, P=True),
            *rows(M, N, x=False, z=True, given=True),
            _library("y += x W^T", M, N, K, dtype, accumulate=True),
        ]
    if op == "rotated_linear_backward" and not half:
        return [_library("dy W", M, K, N, dtype), *launches("rotate_backward", M=M, K=K, N=N, r=r, dtype=dtype,
                                                            family=family)]  # fmt: skip
    if op == "rotated_linear_backward":
        return [
            Launch(
                "householder_plain_basis_kernel",
                8 * N * r - 4 * N * (r % 2),
                4 * N * r,
                8 * N * r,
                {},
                _over(N * r, 256),
            ),
            *rows(M, N, P=True, S=True, core=True, saved=True),
            *rows(M, K, x=False, z=True, given=True),
            _library("dx += dy W", M, K, N, dtype, accumulate=True),
            *_outer(dtype, [M], N, r),
            *_outer(dtype, [N, M], K, r, M),
        ]
    raise NotImplementedError(f"cuda does not write {op}")
