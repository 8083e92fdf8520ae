"""CUDA C++ backend of the `gram_schmidt` operations (csrc/cuda/gram_schmidt.cu): NVIDIA devices, r up to 128.

Two calls give the same bits: sums over K are cut by K and r alone and added in order.
"""

import torch

from peftkern.ops import _cuda

MAX_RANK = 128


def available():
    return _cuda.available()


def supports(name, *args):
    """`(ok, reason)` for one kind of call; r is bounded by what one block factors."""
    ok, reason = _cuda.serves(*args)
    if ok and args[0].shape[1] > MAX_RANK:
        return False, f"serves up to {MAX_RANK} reflections; this call has {args[0].shape[1]}"
    return ok, reason


def orthonormal_factor(V):
    (K, r), library = V.shape, _cuda.library()
    Q, workspace = V.new_empty(K, r), V.new_empty(library.orthonormal_workspace(K, r), dtype=torch.float64)
    T, B = (V.new_empty(r, r, dtype=torch.float64) for _ in range(2))
    with _cuda.guard(V):
        library.orthonormal_factor(
            V.dtype is torch.float64, V.data_ptr(), *V.stride(), K, r, Q.data_ptr(), T.data_ptr(), B.data_ptr(),
            workspace.data_ptr(), _cuda.stream(V),
        )  # fmt: skip
    return Q, T, B


def orthonormal_factor_backward(dQ, dT, Q, B):
    dT, B, dV = dT.contiguous(), B.contiguous(), Q.new_empty(Q.shape)
    with _cuda.guard(Q):
        _cuda.library().orthonormal_factor_backward(
            Q.dtype is torch.float64, dQ.data_ptr(), *dQ.stride(), Q.data_ptr(), *Q.stride(), *Q.shape, dT.data_ptr(),
            B.data_ptr(), dV.data_ptr(), _cuda.stream(Q),
        )  # fmt: skip
    return dV
