"""CUDA C++ backend of the `block_rotation` operations: csrc/cuda/block_*.cu, for compute capability 8.0 and newer.

Activations are read once and written once, in place and in their dtype, accumulated in float32 and rounded once. Sums
over rows have a fixed order: two runs give the same bits. A block rotation is a butterfly of one stage: what works on
rows takes R [blocks, b, b] or [f, K/b, b, b] and serves both families.
"""

import torch
import torch.nn.functional as F

from peftkern.ops import _cuda
from peftkern.ops._rows import CODES, HALF, like_rows, rows
from peftkern.ops.block_rotation import reference
from peftkern.ops.block_rotation.contract import block_size

_MAX_TERMS = 32


def available():
    return _cuda.available()


def most_columns(rows_dtype):
    """The greatest group of columns whose matrix fits the registers beside rows of this dtype."""
    return 128 if rows_dtype in HALF else 64


def supports(name, *args):
    """`(ok, reason)` for one kind of call; b is bounded by registers, that of the maps by shared memory."""
    ok, reason = _cuda.serves(*args)
    if not ok:
        return ok, reason
    b, most = _block_of[name](*args), most_columns(None if name.startswith("skew") else _x_of(args, name).dtype)
    if b > most:
        return False, f"serves blocks of up to {most} in this dtype; this call has {b}"
    if name == "skew_polynomial_backward" and args[0].dtype is torch.float64:
        with _cuda.guard(args[0]):
            if not _cuda.library().block_map_fits(b):
                return False, f"in float64 the factors of blocks of {b} are more than this device's shared memory"
    return True, None


def _x_of(args, name):
    return args[1 if name.endswith("backward") else 0]


_block_of = {
    "skew_polynomial": lambda q, coefficients: block_size(q.shape[1]),
    "skew_polynomial_backward": lambda dR, q, coefficients: block_size(q.shape[1]),
    "skew_cayley": lambda q: block_size(q.shape[1]),
    "skew_cayley_backward": lambda dR, R: R.shape[1],
    "block_rotate": lambda x, R, transpose: R.shape[1],
    "block_rotate_backward": lambda dz, x, R, *_: R.shape[1],
    "block_rotated_linear": lambda x, weight, bias, R: R.shape[1],
    "block_rotated_linear_backward": lambda dy, x, weight, R, output_mask: R.shape[1],
}


def run_map(parameter, out, S, b, packed, dR=None, coefficients=()):
    """Rotations of S parameters, or the gradient in them, into `out`; no coefficients: the exact map."""
    if S and b:
        with _cuda.guard(parameter):
            _cuda.library().block_map(
                parameter.dtype is torch.float64, packed, parameter.data_ptr(), 0 if dR is None else dR.data_ptr(),
                out.data_ptr(), S, b, coefficients, _cuda.stream(parameter),
            )  # fmt: skip
    return out


def skew_polynomial(q, coefficients):
    if len(coefficients) > _MAX_TERMS:
        return reference.skew_polynomial(q, coefficients).contiguous()
    q, S, b = q.contiguous(), q.shape[0], block_size(q.shape[1])
    return run_map(q, q.new_empty(S, b, b), S, b, True, coefficients=coefficients)


def skew_polynomial_backward(dR, q, coefficients):
    if len(coefficients) > _MAX_TERMS:
        return reference.skew_polynomial_backward(dR, q, coefficients).contiguous()
    q, S, b = q.contiguous(), q.shape[0], block_size(q.shape[1])
    return run_map(q, torch.empty_like(q), S, b, True, dR.contiguous(), coefficients)


def skew_cayley(q):
    q, S, b = q.contiguous(), q.shape[0], block_size(q.shape[1])
    return run_map(q, q.new_empty(S, b, b), S, b, True)


def skew_cayley_backward(dR, R):
    R, (S, b, _) = R.contiguous(), R.shape
    return run_map(R, R.new_empty(S, b * (b - 1) // 2), S, b, True, dR.contiguous())


class _Groups:
    """R as one dense matrix D [n or 1, G, G] per group of columns: itself, or the product of a butterfly's stages."""

    def __init__(self, R, K):
        R = R.contiguous()
        self.R, self.b, self.f = R, R.shape[-1], R.shape[0] if R.dim() == 4 else 1
        self.G = self.b << (self.f - 1)
        self.n = K // self.G
        self.shared = R.dim() == 3 and len(R) == 1
        self.D = R if self.f == 1 else R.new_empty(self.n, self.G, self.G)
        if self.f > 1:
            self._run_stages(self.D, None, None, 0)

    def _run_stages(self, D, dD, dR, chunks):
        matrices = (0 if t is None else t.data_ptr() for t in (self.R, D, dD, dR))
        with _cuda.guard(self.R):
            _cuda.library().butterfly_stages(
                self.R.dtype is torch.float64, *matrices, chunks, self.n, self.b, self.f, _cuda.stream(self.R)
            )

    def gradient(self, partial):
        """dR of partial sums [chunks, n, G, G] of the gradient in D."""
        chunks, dR = len(partial), torch.empty_like(self.R)
        if self.f > 1:
            self._run_stages(None, partial, dR, chunks)
        else:
            terms = chunks * self.n if self.shared else chunks
            with _cuda.guard(dR):
                _cuda.library().block_sum(
                    dR.dtype is torch.float64, partial.data_ptr(), dR.data_ptr(), dR.numel(), terms, _cuda.stream(dR)
                )
        return dR

    def product_f64(self, A, B, C, A_strides, B_strides, C_strides, m, n, k):
        """C = A B for every group, in float64."""
        with _cuda.guard(C):
            _cuda.library().batched_product_f64(
                (A.data_ptr(), *A_strides), (B.data_ptr(), *B_strides), (C.data_ptr(), *C_strides), self.n, m, n, k,
                _cuda.stream(C),
            )  # fmt: skip
        return C

    def rotate_f64(self, x, transpose, row_scale=None):
        """x D, or x D^T, times a number of each row."""
        G, K, (x_rows, stride), z = self.G, self.n * self.G, rows(x, self.n * self.G), x.new_empty(x.shape)
        D = (0 if self.shared else G * G, *((1, G) if transpose else (G, 1)))
        self.product_f64(x_rows, self.D, z, (G, stride, 1), D, (G, K, 1), x.numel() // K, G, G)
        return z if row_scale is None else z.mul_(row_scale[:, None])


def rotate(x, R, transpose, low=False, row_scale=None):
    """z like x = x R, x R^T when transposed, times row_scale [M]; with `low` also what z lacks, as a second tensor."""
    K = x.shape[-1]
    groups = _Groups(R, K)
    if x.dtype is torch.float64:
        return groups.rotate_f64(x, transpose, row_scale)
    (x_rows, stride), z, z_low = rows(x, K), like_rows(x), like_rows(x) if low else None
    row_scale = None if row_scale is None else row_scale.contiguous()
    with _cuda.guard(x):
        _cuda.library().block_rows(
            CODES[x.dtype], x_rows.data_ptr(), stride, groups.D.data_ptr(), groups.shared, transpose, z.data_ptr(),
            z_low.data_ptr() if low else 0, 0 if row_scale is None else row_scale.data_ptr(), 0, 0, 0,
            x.numel() // K, groups.n, groups.G, _cuda.stream(x),
        )  # fmt: skip
    return (z, z_low) if low else z


def rotate_backward(dz, x, R, transpose, output_mask):
    """(dx, dR) of z = x R."""
    (want_dx, want_dR), K = output_mask, x.shape[-1]
    if not want_dR:
        return rotate(dz, R, not transpose) if want_dx else x.new_empty(0), R.new_empty(0)
    M, groups, library = x.numel() // K, _Groups(R, K), _cuda.library()
    n, G = groups.n, groups.G
    if M == 0:
        return x.new_empty(x.shape if want_dx else 0), R.new_zeros(R.shape)
    if x.dtype is torch.float64:
        dx = groups.rotate_f64(dz, not transpose) if want_dx else x.new_empty(0)
        (left, left_stride), (right, right_stride) = (rows(t, K) for t in ((dz, x) if transpose else (x, dz)))
        partial = x.new_empty(1, n, G, G)
        strides = (G, 1, left_stride), (G, right_stride, 1), (G * G, G, 1)
        groups.product_f64(left, right, partial, *strides, G, G, M)
        return dx, groups.gradient(partial)
    (dz_rows, dz_stride), (x_rows, x_stride) = rows(dz, K), rows(x, K)
    dx = like_rows(x) if want_dx else x.new_empty(0)
    partial = R.new_empty(library.block_chunks(M, n, G), n, G, G)
    with _cuda.guard(x):
        library.block_rows(
            CODES[x.dtype], dz_rows.data_ptr(), dz_stride, groups.D.data_ptr(), groups.shared, not transpose,
            dx.data_ptr() if want_dx else 0, 0, 0, x_rows.data_ptr(), x_stride, partial.data_ptr(), M, n, G,
            _cuda.stream(x),
        )  # fmt: skip
    return dx, groups.gradient(partial)


def block_rotate(x, R, transpose):
    return rotate(x, R, transpose)


def block_rotate_backward(dz, x, R, transpose, output_mask):
    return rotate_backward(dz, x, R, transpose, output_mask)


def rotated_terms(x, R, dtype):
    """x R as (high, low) in half precision, rows [M, K]: high + low is x R to twice the digits."""
    K = x.shape[-1]
    if x.dtype is dtype:
        high, low = rotate(x, R, False, low=True)
    else:
        z = rotate(x, R, False)
        high = z.to(dtype)
        low = z.sub_(high).to(dtype)
    return high.view(-1, K), low.view(-1, K)


def product_f32(a, b):
    """a b in float32 of half-precision matrices, one product on tensor cores."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float().mm(b.float())


def scale_product(y, low, scale, bias, z, p=None):
    """z = (y + low) scale + bias and p = y + low, of y in float32 or float64; None for no such term."""
    N = z.shape[-1]
    y, scale, bias = (t if t is None else t.contiguous() for t in (y, scale, bias))
    with _cuda.guard(z):
        _cuda.library().scale_product(
            CODES[z.dtype], *(0 if t is None else t.data_ptr() for t in (y, low, scale, bias, z, p)), z.numel() // N, N,
            _cuda.stream(z),
        )  # fmt: skip


def linear_of_rotated(x, weight, bias, R):
    """(x R) W^T + b with x R unrounded, rounded once."""
    if weight.dtype not in HALF:
        return F.linear(rotate(x, R, False), weight, bias)
    high, low = rotated_terms(x, R, weight.dtype)
    # What the rounded x R lacks is below 2^-8 of y, so its own rounding is nothing beside that of y.
    y_low = low.mm(weight.mT)
    if bias is None:
        y = y_low.addmm_(high, weight.mT)
    else:
        y = weight.new_empty(y_low.shape)
        scale_product(product_f32(high, weight.mT), y_low, None, bias, y)
    return y.view(*x.shape[:-1], len(weight))


def block_rotated_linear(x, weight, bias, R):
    return linear_of_rotated(x, weight, bias, R)


def block_rotated_linear_backward(dy, x, weight, R, output_mask):
    return rotate_backward(dy.matmul(weight).to(x.dtype), x, R, False, output_mask)
