"""CPU backend of the `gram_schmidt` operations: C++ kernels (csrc/cpu/gram_schmidt.h), float64 inside.

Two calls give the same bits, whatever the number of threads.
"""

import torch

from peftkern import _native
from peftkern.ops.householder import cpu_backend as householder
from peftkern.ops.householder.cpu_backend import _factor, _threads

_library, _level, _reason = _native.cpu()

available = householder.available


def supports(name, *args):
    """`(ok, reason)` for one kind of call; r is bounded by the kernels' scratch rows."""
    if _library is None:
        return False, _reason
    if any(t.device.type != "cpu" for t in args):
        return False, "serves CPU tensors only"
    if args[0].shape[1] > _library.MAX_RANK:
        return False, f"serves up to {_library.MAX_RANK} reflections; this call has {args[0].shape[1]}"
    return True, None


def orthonormal_factor(V):
    Q, r = V.new_empty(V.shape), V.shape[1]
    T, B = (V.new_empty(r, r, dtype=torch.float64) for _ in range(2))
    _library.orthonormal_factor(_level, _threads(), *_factor(V), Q.data_ptr(), T.data_ptr(), B.data_ptr())
    return Q, T, B


def orthonormal_factor_backward(dQ, dT, Q, B):
    dT, Q, B, dV = dT.contiguous(), Q.contiguous(), B.contiguous(), Q.new_empty(Q.shape)
    # fmt: off
    _library.orthonormal_factor_backward(_level, _threads(), *_factor(dQ), dT.data_ptr(), Q.data_ptr(), B.data_ptr(),
                                         dV.data_ptr())
    # fmt: on
    return dV
