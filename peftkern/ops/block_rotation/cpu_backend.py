"""CPU backend of the `block_rotation` operations: C++ kernels (csrc/cpu/block*), chosen by what the processor has.

Activations are read once and written once, in place and in their dtype, accumulated in float32 and rounded once. Two
calls give the same bits, whatever the number of threads.
"""

import torch
import torch.nn.functional as F

from peftkern import _native
from peftkern.ops import _scratch
from peftkern.ops._rows import CODES, HALF, add_product, adds_in_one_accumulator, like_rows, rows
from peftkern.ops.block_rotation import reference
from peftkern.ops.block_rotation.contract import block_size

_library, _level, _reason = _native.cpu()
if _library is not None and not hasattr(_library, "rotate_blocks"):
    _library, _reason = None, "the CPU library was built from older sources; build it again (make install)"
_threads = torch.get_num_threads


def available():
    return _library is not None, _reason


def supports(name, *args):
    """`(ok, reason)` for one kind of call; b is bounded by the kernels' scratch."""
    if _library is None:
        return False, _reason
    if any(t.device.type != "cpu" for t in args if isinstance(t, torch.Tensor)):
        return False, "serves CPU tensors only"
    b = _block_of[name](*args)
    if b > _library.MAX_BLOCK:
        return False, f"serves blocks of up to {_library.MAX_BLOCK}; this call has {b}"
    return True, None


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


def skew_polynomial(q, coefficients):
    q, S, b = q.contiguous(), q.shape[0], block_size(q.shape[1])
    R = q.new_empty(S, b, b)
    _library.skew_polynomial(_level, _threads(), q.data_ptr(), CODES[q.dtype], S, b, coefficients, R.data_ptr())
    return R


def skew_polynomial_backward(dR, q, coefficients):
    dR, q, S, b = dR.contiguous(), q.contiguous(), q.shape[0], block_size(q.shape[1])
    dq = torch.empty_like(q)
    # fmt: off
    _library.skew_polynomial_backward(_level, _threads(), dR.data_ptr(), q.data_ptr(), CODES[q.dtype], S, b,
                                      coefficients, dq.data_ptr())
    # fmt: on
    return dq


def skew_cayley(q):
    q, S, b = q.contiguous(), q.shape[0], block_size(q.shape[1])
    R = q.new_empty(S, b, b)
    _library.cayley(_level, _threads(), q.data_ptr(), CODES[q.dtype], S, b, True, R.data_ptr())
    return R


def skew_cayley_backward(dR, R):
    dR, R, (S, b, _) = dR.contiguous(), R.contiguous(), R.shape
    dq = R.new_empty(S, b * (b - 1) // 2)
    # fmt: off
    _library.cayley_backward(_level, _threads(), dR.data_ptr(), R.data_ptr(), CODES[R.dtype], S, b, True,
                             dq.data_ptr())
    # fmt: on
    return dq


def _blocks(R, K):
    """The facts of contiguous blocks R [f, stored, b, b] (or [stored, b, b]) that every kernel takes."""
    return R.data_ptr(), CODES[R.dtype], K, R.shape[0] if R.dim() == 4 else 1, *R.shape[-3:-1]


def rotate_to(x, R, transpose, z, rest=None):
    """z = x R, and into `rest` what its rounding leaves; both contiguous; R [(f,) stored, b, b]."""
    K, R = x.shape[-1], R.contiguous()
    x_rows, stride = rows(x, K)
    # fmt: off
    _library.rotate_blocks(_level, _threads(), x_rows.data_ptr(), CODES[x.dtype], x.numel() // K, stride,
                           *_blocks(R, K), transpose, z.data_ptr(),
                           0 if rest is None else rest.data_ptr(), CODES[z.dtype])
    # fmt: on
    return z


def rotate_backward(dz, x, R, transpose, output_mask, dx=None):
    """(dx, dR) of z = x R; R [(f,) stored, b, b]. dx may be a contiguous dz, which is then overwritten."""
    (want_dx, want_dR), K, R = output_mask, x.shape[-1], R.contiguous()
    x_rows, stride = rows(x, K)
    dz_rows, dz_stride = rows(dz, K)
    if not want_dx:
        dx = x.new_empty(0)
    elif dx is None:
        dx = like_rows(x)
    dR = torch.empty_like(R) if want_dR else R.new_empty(0)
    if want_dx or want_dR:
        # fmt: off
        _library.rotate_blocks_backward(_level, _threads(), dz_rows.data_ptr(), dz_stride, x_rows.data_ptr(),
                                        CODES[x.dtype], x.numel() // K, stride, *_blocks(R, K), transpose,
                                        dx.data_ptr(), dR.data_ptr())
        # fmt: on
    return dx, dR


def block_rotate(x, R, transpose):
    return rotate_to(x, R, transpose, _scratch.take(x))


def block_rotate_backward(dz, x, R, transpose, output_mask):
    return rotate_backward(dz, x, R, transpose, output_mask)


def exact_linear(x, weight, bias, R, scale=None):
    """(s (x R) W^T + b, (x R) W^T or None without a scale) with x R unrounded, by library products with W as it lies.

    With x R = z + rest in two terms y = z W^T + u + b, where u = rest W^T is so small that its rounding vanishes; with
    a scale y = z W^T + [u + (s - 1) p] + b, where the rounding of p counts as little. None where scales are far from
    1, or where the library would round between the sums.
    """
    if not adds_in_one_accumulator(weight.dtype) or (scale is not None and (scale - 1).abs().max() > 1 / 2):
        return None
    shape, rows = (*x.shape[:-1], weight.shape[0]), x.reshape(-1, x.shape[-1])
    z, rest = weight.new_empty(2, *rows.shape)
    rotate_to(rows, R, False, z, rest)
    u = F.linear(rest, weight)
    if scale is None:
        return add_product(u, z, weight, bias).view(shape), None
    p = torch.addmm(u, z, weight.mT)
    y = add_product(u.addcmul_(p, (scale - 1).to(p.dtype)), z, weight, bias)
    return y.view(shape), p.view(shape)


def block_rotated_linear(x, weight, bias, R):
    if weight.dtype not in HALF:
        return F.linear(block_rotate(x, R, False), weight, bias)
    found = exact_linear(x, weight, bias, R)
    return reference.block_rotated_linear(x, weight, bias, R) if found is None else found[0]


def linear_backward(dy, x, weight, R, output_mask):
    """`rotate_backward` of dz = dy W, dx in its place."""
    dz = dy.matmul(weight).to(x.dtype)
    return rotate_backward(dz, x, R, False, output_mask, dz if dz.is_contiguous() else None)


def block_rotated_linear_backward(dy, x, weight, R, output_mask):
    return linear_backward(dy, x, weight, R, output_mask)
