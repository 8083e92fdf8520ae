"""What the Triton kernels of the `block_rotation` operations move and compute, by triton_tiles.py.

Every formula is the sum over programs of what their loads and stores ask for, padding left out of bytes (masked) and
left in flops (computed). Additions outside of products are not counted, nor are the inversions of the exact map: they
take b steps that wait for each other, whatever a device computes beside.
"""

import torch

from peftkern.ops._costs import Launch
from peftkern.ops.block_rotation import coefficients
from peftkern.ops.block_rotation import triton_tiles as tiles
from peftkern.ops.householder.costs_triton import _library, _over, _padded, _reduce

_KINDS = {torch.bfloat16: "tensor_bf16", torch.float16: "tensor_fp16", torch.float32: "tensor_bf16"}
# Products of half-precision terms in x R, and in x^T dz.
_ROTATED = {2: 2, 4: 6}
_SUMMED = {2: 1, 4: 6}


def repeated(rows, columns, warps):
    """How often a square product is computed: Triton gives every warp 16 rows of it."""
    return max(1, 16 * warps // rows) if rows == columns else 1


def _flops(dtype, **products):
    """Flops by kind; `flags` are the products that tell which blocks of a panel a number spoils, in bfloat16."""
    flops = {_KINDS[dtype]: products["flops"]}
    if products["flags"]:
        flops["tensor_bf16"] = flops.get("tensor_bf16", 0) + products["flags"]
    return flops


def _scales(M, rows, columns, warps):
    """Bytes of the numbers of M rows: read by four lanes of each warp beside others on the same rows."""
    return 16 * M * (warps if columns >= 2 * rows else repeated(rows, rows, warps))


def _wide_rotate(family, dtype, M, K, b, shared, terms, scaled=False):
    s, (BM, BC, warps) = dtype.itemsize, tiles.wide(family, dtype)
    chunks, programs = _over(b, BC), _over(M, BM)
    R, rows, scales = 4 * K * b, M * K * s, _scales(M, BM, BC, warps) * K // b * chunks if scaled else 0
    flops = {_KINDS[dtype]: _ROTATED[s] * 2 * programs * BM * K // b * (chunks * BC) ** 2}
    unique = rows * (1 + terms) + (4 * b * b if shared else R) + 4 * M * scaled
    read = chunks * rows + programs * R + scales
    return Launch("wide_rotate_kernel", read, terms * rows, unique, flops, programs * K // b * chunks)


def _wide_sums(family, dtype, M, K, b):
    """(launch, numbers in all partial sums)."""
    s, (BM, BC, _) = dtype.itemsize, tiles.wide(family, dtype)
    chunks = _over(b, BC)
    programs = K // b * chunks**2
    splits, _ = tiles.splits(family, 2, BM, programs, M)
    rows, partial = 2 * M * K * s, splits * K * b
    flops = {_KINDS[dtype]: _SUMMED[s] * 2 * _padded(M, BM) * K // b * (chunks * BC) ** 2}
    return Launch("wide_sums_kernel", chunks * rows, 4 * partial, rows + 4 * partial, flops, programs * splits), partial


def rotate(family, dtype, M, K, b, shared=False, terms=1, scaled=False):
    """x R, written in `terms` terms; scaled: times a number of each row."""
    if b > tiles.PANEL_MOST[dtype]:
        return _wide_rotate(family, dtype, M, K, b, shared, terms, scaled)
    s, tile = dtype.itemsize, tiles.tile(family, dtype, b)
    panels = _over(K, tile.width)
    splits, _ = tiles.splits(family, tile.programs, tile.rows, panels, M)
    R, written = 4 * K * b, terms * M * K * s
    square = 2 * panels * _padded(M, tile.rows) * tile.panel**2 * repeated(tile.rows, tile.panel, tile.warps)
    flops = _flops(dtype, flops=_ROTATED[s] * square, flags=square * (tile.width > b))
    unique = M * K * s + (4 * b * b if shared else R) + written + 4 * M * scaled
    read = M * K * s + splits * R + (_scales(M, tile.rows, tile.panel, tile.warps) * panels if scaled else 0)
    return Launch("rotate_kernel", read, written, unique, flops, panels * splits)


def rotate_backward(family, dtype, M, K, b, shared=False, mask=None):
    """dx and partial sums of dR; (launches, numbers in all partial sums)."""
    want_dx, want_dR = mask or (True, True)
    if b > tiles.PANEL_MOST[dtype]:
        sums, partial = _wide_sums(family, dtype, M, K, b)
        dx = [_wide_rotate(family, dtype, M, K, b, shared, 1)] if want_dx else []
        return (dx + [sums], partial) if want_dR else (dx, 0)
    s, tile = dtype.itemsize, tiles.tile(family, dtype, b)
    panels = _over(K, tile.width)
    each = tiles.panels_per_program(panels) if shared else 1
    programs = _over(panels, each)
    splits, _ = tiles.splits(family, tile.programs, tile.rows, programs, M)
    R = 4 * (programs * tile.width if shared else K) * b
    rows, partial = M * K * s, splits * R * want_dR
    read, written = rows * (1 + want_dR) + splits * R * want_dx, rows * want_dx + partial
    square = 2 * programs * each * _padded(M, tile.rows) * tile.panel**2
    rotated = square * repeated(tile.rows, tile.panel, tile.warps) * want_dx
    # Beside a product of 16 rows, that of the rows' transpose is laid out well.
    summed = square * (1 if tile.rows == 16 else repeated(tile.panel, tile.panel, tile.warps)) * want_dR
    flops = _flops(dtype, flops=_ROTATED[s] * rotated + _SUMMED[s] * summed, flags=rotated * (tile.width > b))
    unique = rows * (1 + want_dR) + (4 * b * b if shared else R) * want_dx + written
    return [Launch("rotate_backward_kernel", read, written, unique, flops, programs * splits)], partial // 4


def _maps(family, K, b, strips=False):
    """(panels, flops of a product, whether it goes by strips)."""
    panel, width, strip, warps = tiles.map_panel(family, b)
    panels, by_strips = _over(K, width), strips and strip < panel
    # Six products of terms make up one of float32.
    once = 1 if by_strips else repeated(panel, panel, warps)
    return panels, 6 * once * 2 * panels * panel**3, by_strips


def _polynomial(family, K, b, terms, backward):
    products = max(len(coefficients(terms)) - 2, 0) * (2 if backward else 1)
    panels, flops, by_strips = _maps(family, K, b, strips=True)
    packed, R = 2 * K * (b - 1), 4 * K * b
    # Off the diagonal both halves of Q are read; and all once more where the backward cuts strips of it.
    read, written = (2 * packed * (1 + by_strips) + R, packed) if backward else (2 * packed, R)
    name = "polynomial_backward_kernel" if backward else "polynomial_kernel"
    return Launch(name, read, written, packed + R + backward * packed, {"tensor_bf16": products * flops}, panels)


def cayley(K, b, dense):
    A, R = (8 * K * b, 4 * K * b) if dense else (4 * K * (b - 1), 4 * K * b)
    _, side, _ = tiles.inverses(b)
    return Launch("cayley_kernel", A, R, A // 2 + R, {}, _over(K // b, side))


def cayley_backward(family, K, b, dense):
    panels, flops, _ = _maps(family, K, b)
    R, written = 4 * K * b, 4 * K * b if dense else 2 * K * (b - 1)
    return Launch("cayley_backward_kernel", 2 * R, written, 2 * R + written, {"tensor_bf16": 2 * flops}, panels)


def linear(family, dtype, M, N, K):
    """y = s (z_h + z_l) W^T and p, with a scale and no bias."""
    s, tile = dtype.itemsize, tiles.linear(family, M)
    tiles_m, tiles_n = _over(M, tile.rows), _over(N, tile.cols)
    # Every thread loads the numbers of the scale that it multiplies with.
    read = tiles_n * 2 * M * K * s + tiles_m * N * (K * s + 32 * tile.warps)
    flops = {_KINDS[dtype]: 4 * tiles_m * tile.rows * tiles_n * tile.cols * _padded(K, tile.depth)}
    unique = (2 * M + N) * K * s + 4 * N + 2 * M * N * s
    return Launch("linear_kernel", read, 2 * M * N * s, unique, flops, tiles_m * tiles_n)


def launches(op, *, M, K, N, b, dtype, family, shared=False, terms=5, mask=None):
    """The launches of one call, as in peftkern.ops._costs."""
    if dtype is torch.float64:
        raise NotImplementedError("costs are stated for float32 and half precision")
    stored = b if shared else K
    if op in ("skew_polynomial", "skew_polynomial_backward"):
        return [_polynomial(family, stored, b, terms, op.endswith("backward"))]
    if op == "skew_cayley":
        return [cayley(stored, b, False)]
    if op == "skew_cayley_backward":
        return [cayley_backward(family, stored, b, False)]
    if op == "block_rotate":
        return [rotate(family, dtype, M, K, b, shared)]
    if op == "block_rotate_backward":
        rotated, partial = rotate_backward(family, dtype, M, K, b, shared, mask)
        n = stored * b
        return rotated if partial <= n else [*rotated, _reduce(n, partial // n)]
    half = dtype.itemsize == 2
    if op == "block_rotated_linear" and half:
        product = _library("z_l W^T", M, N, K, dtype)
        return [
            rotate(family, dtype, M, K, b, shared, terms=2), product,
            _library("y += z_h W^T", M, N, K, dtype, accumulate=True),
        ]  # fmt: skip
    if op == "block_rotated_linear":
        return [rotate(family, dtype, M, K, b, shared), _library("z W^T", M, N, K, dtype)]
    if op == "block_rotated_linear_backward":
        sizes = {"M": M, "K": K, "N": N, "b": b, "dtype": dtype, "family": family, "shared": shared, "mask": mask}
        return [_library("dy W", M, K, N, dtype), *launches("block_rotate_backward", **sizes)]
    raise NotImplementedError(f"triton does not write {op}")
