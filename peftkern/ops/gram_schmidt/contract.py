"""Contracts of the `gram_schmidt` operations. V, Q [K, r] float32 or float64; T, B [r, r] float64."""

import torch

from peftkern.dispatch import Operation
from peftkern.ops import _checks
from peftkern.ops.householder import contract as householder

FAMILY = "peftkern.ops.gram_schmidt"


def check_orthonormal_factor(V):
    householder._check_factor("orthonormal_factor", V)


def _fake_orthonormal_factor(V):
    square = V.shape[1], V.shape[1]
    T, B = (torch.empty(square, dtype=torch.float64, device=V.device) for _ in range(2))
    return torch.empty(V.shape, dtype=V.dtype, device=V.device), T, B


def check_orthonormal_factor_backward(dQ, dT, Q, B):
    op = "orthonormal_factor_backward"
    householder._check_factor(op, Q)
    if dQ.shape != Q.shape or dQ.dtype is not Q.dtype:
        raise ValueError(f"{op}: dQ must be like Q; got {_checks.describe(dQ)} and {_checks.describe(Q)}")
    for name, square in (("dT", dT), ("B", B)):
        if square.shape != (Q.shape[1], Q.shape[1]) or square.dtype is not torch.float64:
            raise ValueError(f"{op}: {name} must be float64 of shape [r, r]; got {_checks.describe(square)}")
    _checks.same_device(op, dQ=dQ, dT=dT, Q=Q, B=B)


ORTHONORMAL_FACTOR = Operation(
    "orthonormal_factor(Tensor V) -> (Tensor, Tensor, Tensor)",
    FAMILY,
    check_orthonormal_factor,
    _fake_orthonormal_factor,
    householder._key_factor,
)
ORTHONORMAL_FACTOR_BACKWARD = Operation(
    "orthonormal_factor_backward(Tensor dQ, Tensor dT, Tensor Q, Tensor B) -> Tensor",
    FAMILY,
    check_orthonormal_factor_backward,
    lambda dQ, dT, Q, B: torch.empty(Q.shape, dtype=Q.dtype, device=Q.device),
    lambda dQ, dT, Q, B: householder._key_factor(Q),
)
