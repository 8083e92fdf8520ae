"""CPU backend of the `block_rotation` operations: C++ kernels (csrc/cpu/block*), chosen by what the processor has.

Activations are read once and written once, in place and in their dtype, accumulated in float32 and rounded once. Two
calls give the same bits, whatever the number of threads.
"""

import torch
import torch.nn.functional as F

from peftkern import _native
from peftkern.ops._rows import CODES, HALF, like_rows, rows, weight_scratch
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


def rotate_to(x, R, transpose, terms, z):
    """z [M, terms K] = x R as a sum of one, two or three terms (csrc/cpu/blocks.h); R [(f,) stored, b, b]."""
    K, R = x.shape[-1], R.contiguous()
    x_rows, stride = rows(x, K)
    # fmt: off
    _library.rotate_blocks(_level, _threads(), x_rows.data_ptr(), CODES[x.dtype], x.numel() // K, stride,
                           *_blocks(R, K), transpose, terms, z.data_ptr(), CODES[z.dtype])
    # fmt: on
    return z


def rotate_backward(dz, x, R, transpose, output_mask):
    """(dx, dR) of z = x R; R [(f,) stored, b, b]."""
    (want_dx, want_dR), K, R = output_mask, x.shape[-1], R.contiguous()
    x_rows, stride = rows(x, K)
    dz_rows, dz_stride = rows(dz, K)
    dx = like_rows(x) if want_dx else x.new_empty(0)
    dR = torch.empty_like(R) if want_dR else R.new_empty(0)
    if want_dx or want_dR:
        # fmt: off
        _library.rotate_blocks_backward(_level, _threads(), dz_rows.data_ptr(), dz_stride, x_rows.data_ptr(),
                                        CODES[x.dtype], x.numel() // K, stride, *_blocks(R, K), transpose,
                                        dx.data_ptr(), dR.data_ptr())
        # fmt: on
    return dx, dR


def block_rotate(x, R, transpose):
    return rotate_to(x, R, transpose, 1, like_rows(x))


def block_rotate_backward(dz, x, R, transpose, output_mask):
    return rotate_backward(dz, x, R, transpose, output_mask)


def linear_of_terms(x, weight, bias, R):
    """(x R) W^T + b as one library product: x R unrounded, for half precision as two terms, [high | low] [W | W]^T."""
    N, K = weight.shape
    M = x.numel() // K
    if weight.dtype not in HALF:
        return F.linear(rotate_to(x, R, False, 1, x.new_empty(x.shape)), weight, bias)
    z = rotate_to(x, R, False, 2, weight.new_empty(M, 2 * K))
    twice = weight_scratch(N, 2 * K, weight.dtype)
    twice.view(N, 2, K).copy_(weight[:, None])
    return F.linear(z, twice, bias).view(*x.shape[:-1], N)


def block_rotated_linear(x, weight, bias, R):
    return linear_of_terms(x, weight, bias, R)


def block_rotated_linear_backward(dy, x, weight, R, output_mask):
    return rotate_backward(dy.matmul(weight).to(x.dtype), x, R, False, output_mask)
