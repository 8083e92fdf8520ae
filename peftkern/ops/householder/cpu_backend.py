"""CPU backend of the `householder` operations: C++ kernels (csrc/cpu), chosen by what the processor has.

Half-precision activations are read in place, accumulated in float32 and rounded once. The small algebra (Gram, T and
the products with T) is float64. Two calls give the same bits, whatever the number of threads.
"""

import torch
import torch.nn.functional as F

from peftkern import _native
from peftkern.ops._rows import CODES as _CODES
from peftkern.ops._rows import HALF as _HALF
from peftkern.ops._rows import add_product, adds_in_one_accumulator
from peftkern.ops._rows import like_rows as _like_rows
from peftkern.ops._rows import rows as _rows
from peftkern.ops._scratch import take as _take
from peftkern.ops.householder import reference

_library, _level, _reason = _native.cpu()

# Up to here a product of float32 rows with W in place beats the library's, in half precision one that copies W or adds
# an update to its result; less without vectors.
_FEW_ROWS = {torch.float64: 0, torch.float32: 4, **dict.fromkeys(_HALF, 12 if _level else 4)}

_threads = torch.get_num_threads
_empty = torch.empty


def available():
    return _library is not None, _reason


def supports(name, *args):
    """`(ok, reason)` for one kind of call; r is bounded by the kernels' scratch rows."""
    if _library is None:
        return False, _reason
    if any(t.device.type != "cpu" for t in args if isinstance(t, torch.Tensor)):
        return False, "serves CPU tensors only"
    r = _rank_of[name](*args)
    if r > _library.MAX_RANK:
        return False, f"serves up to {_library.MAX_RANK} reflections; this call has {r}"
    return True, None


_rank_of = {
    "wy_factor": lambda V: V.shape[1],
    "wy_factor_backward": lambda dT, V, T: V.shape[1],
    "rotate": lambda x, V, T, reverse: V.shape[1],
    "rotate_backward": lambda dz, x, P, V, *_: V.shape[1],
    "rotated_linear": lambda x, weight, bias, V, *_: V.shape[1],
    "rotated_linear_backward": lambda dy, x, weight, P, B, V, *_: V.shape[1],
    "project": lambda x, V: V.shape[1],
    "project_backward": lambda dP, x, V, output_mask: V.shape[1],
    "orthogonality_penalty": lambda V, squared: V.shape[1],
    "orthogonality_penalty_backward": lambda grad, V, squared: V.shape[1],
}


def _factor(V):
    """The facts of V [K, r] that every kernel takes: pointer, dtype, K, r and both strides."""
    return V.data_ptr(), _CODES[V.dtype], *V.shape, *V.stride()


def wy_factor(V):
    T = V.new_empty(V.shape[1], V.shape[1], dtype=torch.float64)
    _library.wy_factor(_level, _threads(), *_factor(V), T.data_ptr())
    return T


def wy_factor_backward(dT, V, T):
    dT, T, dV = dT.contiguous(), T.contiguous(), V.new_empty(V.shape)
    _library.wy_factor_backward(_level, _threads(), dT.data_ptr(), *_factor(V), T.data_ptr(), dV.data_ptr())
    return dV


def rotate(x, V, T, reverse):
    K, r = V.shape
    M, T = x.numel() // K, T.contiguous()
    rows, stride = _rows(x, K)
    z, P = _take(x), V.new_empty(M, r)
    # fmt: off
    _library.rotate(_level, _threads(), rows.data_ptr(), _CODES[x.dtype], M, stride, *_factor(V), T.data_ptr(), reverse,
                    z.data_ptr(), P.data_ptr())
    # fmt: on
    return z, P


def rotate_backward(dz, x, P, V, T, reverse, output_mask):
    return _rotate_backward(dz, x, P, V, T, reverse, output_mask)


def _rotate_backward(dz, x, P, V, T, reverse, output_mask, dx=None):
    """dx may be a contiguous dz, which is then overwritten."""
    (K, r), (want_dx, want_dV) = V.shape, output_mask
    M, P, T = x.numel() // K, P.contiguous(), T.contiguous()
    rows, stride = _rows(x, K)
    dz_rows, dz_stride = _rows(dz, K)
    if not want_dx:
        dx = dz.new_empty(0)
    elif dx is None:
        dx = _like_rows(dz)
    dV, dT = (V.new_empty(K, r), T.new_empty(r, r)) if want_dV else (V.new_empty(0), T.new_empty(0))
    if want_dx or want_dV:
        # fmt: off
        _library.rotate_backward(_level, _threads(), dz_rows.data_ptr(), dz_stride, rows.data_ptr(), _CODES[x.dtype], M,
                                 stride, P.data_ptr(), *_factor(V), T.data_ptr(), reverse,
                                 dx.data_ptr(), dV.data_ptr(), dT.data_ptr())
        # fmt: on
    return dx, dV, dT


def _few(rows, dtype):
    return rows <= _FEW_ROWS[dtype]


def rotated_linear(x, weight, bias, V, T, keep):
    K, r = V.shape
    M, N = x.numel() // K, weight.shape[0]
    if x.dtype not in _HALF and not _few(M, x.dtype):
        z, P = rotate(x, V, T, False)
        return F.linear(z, weight, bias), P, V.new_empty(0, r)
    T = T.contiguous()
    rows, stride = _rows(x, K)
    W, W_stride = _rows(weight, K)
    if _few(M, x.dtype):
        P, y = V.new_empty(M, r), x.new_empty(*x.shape[:-1], N)
        b = None if bias is None else bias.contiguous()
        # fmt: off
        _library.linear_few_rows(_level, _threads(), rows.data_ptr(), _CODES[x.dtype], M, stride,
                                 W.data_ptr(), N, W_stride, 0 if b is None else b.data_ptr(), *_factor(V), T.data_ptr(),
                                 y.data_ptr(), P.data_ptr())
        # fmt: on
        wanted = keep and x.dtype in _HALF
        return y, P, project(W, reference.pairs(V)) if wanted else V.new_empty(0, r)
    if not _starts_from_update(x.dtype, K, r):
        return reference.rotated_linear(x, weight, bias, V, T, keep)
    P, B, y = V.new_empty(M, r), V.new_empty(N, r), x.new_empty(M, N)
    # fmt: off
    _library.linear_update(_level, _threads(), rows.data_ptr(), _CODES[x.dtype], M, stride, W.data_ptr(), N, W_stride,
                           *_factor(V), T.data_ptr(), y.data_ptr(), P.data_ptr(), B.data_ptr())
    # fmt: on
    y = add_product(y, x.reshape(M, K), weight, bias)
    return y.view(*x.shape[:-1], N), P, B if keep else V.new_empty(0, r)


class Generator:
    """y of `rotated_linear` for a few rows by a (V, T) that was made of `kept`, in one native call per token.

    Called with x [..., K], weight [N, K], bias [N] or None and u, all contiguous. None where u no longer has the very
    bits of `kept`, or there are more rows than this serves.
    """

    def __init__(self, kept, V, T):
        # Column after column, as the product with a single row reads them.
        V, T = V.mT.contiguous().mT, T.contiguous()
        self._alive = kept, V, T
        self._kept = kept.data_ptr(), kept.numel() * kept.element_size()
        self._columns = *_factor(V), T.data_ptr()

    def __call__(self, x, weight, bias, u):
        (*rows, K), N, dtype = x.shape, len(weight), x.dtype
        M = x.numel() // K
        if not _few(M, dtype):
            return None
        y = _empty((*rows, N), dtype=dtype)
        # fmt: off
        same = _library.generate(_level, _threads(), u.data_ptr(), *self._kept, x.data_ptr(), _CODES[dtype], M, K,
                                 weight.data_ptr(), N, K, 0 if bias is None else bias.data_ptr(), *self._columns,
                                 y.data_ptr())
        # fmt: on
        return y if same else None


rotated_linear.generator = Generator


def _starts_from_update(dtype, K, r):
    """Whether y = u + x W^T may start from the update u rounded by itself.

    Its rounding counts where u is as large as y: with r columns of K, |u| is about 2 sqrt(r / K) |y|.
    """
    return 16 * r <= K and adds_in_one_accumulator(dtype)


def rotated_linear_backward(dy, x, weight, P, B, V, T, output_mask):
    if B.shape[0] == 0:
        dz = dy.matmul(weight)
        return _rotate_backward(dz, x, P, V, T, False, output_mask, dz if dz.is_contiguous() else None)
    (K, r), (want_dx, want_dV) = V.shape, output_mask
    if not _starts_from_update(x.dtype, K, r):
        return reference.rotated_linear_backward(dy, x, weight, P, B, V, T, output_mask)
    M, N, P, B, T = x.numel() // K, weight.shape[0], P.contiguous(), B.contiguous(), T.contiguous()
    rows, stride = _rows(x, K)
    dy_rows, dy_stride = _rows(dy, N)
    W, W_stride = _rows(weight, K)
    dx = x.new_empty(M, K) if want_dx else x.new_empty(0)
    dV, dT = (V.new_empty(K, r), T.new_empty(r, r)) if want_dV else (V.new_empty(0), T.new_empty(0))
    if want_dx or want_dV:
        # fmt: off
        _library.linear_backward(_level, _threads(), dy_rows.data_ptr(), dy_stride, rows.data_ptr(), _CODES[x.dtype], M,
                                 stride, W.data_ptr(), N, W_stride, P.data_ptr(), B.data_ptr(), *_factor(V),
                                 T.data_ptr(), dx.data_ptr(), dV.data_ptr(), dT.data_ptr())
        # fmt: on
    return dx.addmm_(dy.reshape(M, N), weight).view(x.shape) if want_dx else dx, dV, dT


def project(x, V):
    K, r = V.shape
    M = x.numel() // K
    rows, stride = _rows(x, K)
    P = V.new_empty(M, r)
    _library.project(_level, _threads(), rows.data_ptr(), _CODES[x.dtype], M, stride, *_factor(V), P.data_ptr())
    return P


def project_backward(dP, x, V, output_mask):
    (K, r), (want_dx, want_dV) = V.shape, output_mask
    M, dP = x.numel() // K, dP.contiguous()
    rows, stride = _rows(x, K)
    dx = _like_rows(x) if want_dx else x.new_empty(0)
    dV = V.new_empty(K, r) if want_dV else V.new_empty(0)
    if want_dx or want_dV:
        # fmt: off
        _library.project_backward(_level, _threads(), dP.data_ptr(), rows.data_ptr(), _CODES[x.dtype], M, stride,
                                  *_factor(V), dx.data_ptr(), dV.data_ptr())
        # fmt: on
    return dx, dV


def orthogonality_penalty(V, squared):
    return torch.tensor(_library.orthogonality_penalty(_level, _threads(), *_factor(V), squared), dtype=V.dtype)


def orthogonality_penalty_backward(grad, V, squared):
    dV = V.new_empty(V.shape)
    grad = grad.item()
    _library.orthogonality_penalty_backward(_level, _threads(), grad, *_factor(V), squared, dV.data_ptr())
    return dV
