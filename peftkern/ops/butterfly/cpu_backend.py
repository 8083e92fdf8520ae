"""CPU backend of the `butterfly` operations: C++ kernels (csrc/cpu/block*), chosen by what the processor has.

All stages in one pass: a tile of activations is read once, goes through the stages in float32 in cache, is rounded
once and written once. Two calls give the same bits, whatever the number of threads.
"""

import torch
import torch.nn.functional as F

from peftkern import _native
from peftkern.ops import _scratch
from peftkern.ops._rows import CODES, HALF, like_rows, rows
from peftkern.ops.block_rotation import cpu_backend as blocks
from peftkern.ops.butterfly import reference

_library, _level, _ = _native.cpu()
_threads = torch.get_num_threads

available = blocks.available


def supports(name, *args):
    """`(ok, reason)` for one kind of call; b is bounded by the kernels' scratch."""
    ok, reason = available()
    if not ok:
        return False, reason
    if any(t.device.type != "cpu" for t in args if isinstance(t, torch.Tensor)):
        return False, "serves CPU tensors only"
    b = _block_of[name](*args)
    if b > _library.MAX_BLOCK:
        return False, f"serves blocks of up to {_library.MAX_BLOCK}; this call has {b}"
    return True, None


_block_of = {
    "dense_cayley": lambda B: B.shape[-1],
    "dense_cayley_backward": lambda dR, R: R.shape[-1],
    "butterfly_rotate": lambda x, R, transpose: R.shape[-1],
    "butterfly_rotate_backward": lambda dz, x, R, *_: R.shape[-1],
    "butterfly_rotate_weight": lambda weight, scale, R: R.shape[-1],
    "scale_outputs": lambda *_: 1,
    "scale_outputs_backward": lambda *_: 1,
    "butterfly_rotated_linear": lambda x, weight, bias, scale, R: R.shape[-1],
    "butterfly_rotated_linear_backward": lambda dy, x, weight, scale, p, R, output_mask: R.shape[-1],
}


def dense_cayley(B):
    B, (f, n, b, _) = B.contiguous(), B.shape
    R = torch.empty_like(B)
    _library.cayley(_level, _threads(), B.data_ptr(), CODES[B.dtype], f * n, b, False, R.data_ptr())
    return R


def dense_cayley_backward(dR, R):
    dR, R, (f, n, b, _) = dR.contiguous(), R.contiguous(), R.shape
    dB = torch.empty_like(R)
    # fmt: off
    _library.cayley_backward(_level, _threads(), dR.data_ptr(), R.data_ptr(), CODES[R.dtype], f * n, b, False,
                             dB.data_ptr())
    # fmt: on
    return dB


def butterfly_rotate(x, R, transpose):
    return blocks.rotate_to(x, R, transpose, _scratch.take(x))


def butterfly_rotate_weight(weight, scale, R):
    wide = blocks.rotate_to(weight, R, True, R.new_empty(weight.shape))
    return wide.mul_(scale[:, None]).to(weight.dtype)


def butterfly_rotate_backward(dz, x, R, transpose, output_mask):
    return blocks.rotate_backward(dz, x, R, transpose, output_mask)


def _pointer(tensor):
    return 0 if tensor is None else tensor.data_ptr()


def scale_outputs(y, scale, bias):
    N, scale = len(scale), scale.contiguous()
    bias = None if bias is None else bias.contiguous()
    y_rows, stride = rows(y, N)
    out = like_rows(y)
    # fmt: off
    _library.scale_outputs(_level, _threads(), y_rows.data_ptr(), CODES[y.dtype], y.numel() // N, stride, N,
                           scale.data_ptr(), _pointer(bias), out.data_ptr())
    # fmt: on
    return out


def scale_outputs_backward(dy, y, scale, bias, output_mask):
    (want_dy, want_scale), N, scale = output_mask, len(scale), scale.contiguous()
    bias = None if bias is None else bias.contiguous()
    y_rows, stride = rows(y, N)
    dy_rows, dy_stride = rows(dy, N)
    dy0 = _scratch.take(y) if want_dy else y.new_empty(0)
    dscale = torch.empty_like(scale) if want_scale else scale.new_empty(0)
    if want_dy or want_scale:
        # fmt: off
        _library.scale_outputs_backward(_level, _threads(), dy_rows.data_ptr(), dy_stride, y_rows.data_ptr(),
                                        CODES[y.dtype], y.numel() // N, stride, N, scale.data_ptr(), _pointer(bias),
                                        dy0.data_ptr(), dscale.data_ptr())
        # fmt: on
    return dy0, dscale


def butterfly_rotated_linear(x, weight, bias, scale, R):
    if weight.dtype not in HALF:
        p = F.linear(butterfly_rotate(x, R, False), weight, bias if scale is None else None)
        if scale is None:
            return p, weight.new_empty(0)
        y = scale_outputs(p, scale, None)
        return y if bias is None else y.add_(bias), p
    found = blocks.exact_linear(x, weight, bias, R, scale)
    if found is None:
        return reference.butterfly_rotated_linear(x, weight, bias, scale, R)
    y, p = found
    return y, weight.new_empty(0) if p is None else p


def butterfly_rotated_linear_backward(dy, x, weight, scale, p, R, output_mask):
    parts = scale_outputs_backward, blocks.linear_backward
    return reference.linear_backward(*parts, dy, x, weight, scale, p, R, output_mask)
