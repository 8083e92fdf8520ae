"""Contracts of the `gram_schmidt` operations. V [K, r] float32 or float64; T [r, r] float64."""

import torch

from peftkern.dispatch import Operation
from peftkern.ops.householder import contract as householder

FAMILY = "peftkern.ops.gram_schmidt"


def _check(V):
    householder._check_factor("projector_factor", V)


def _check_orthonormaliser(V):
    householder._check_factor("orthonormaliser", V)


def _fake_square(V):
    return V.new_empty((V.shape[1], V.shape[1]), dtype=torch.float64)


def _check_backward(dT, V, T):
    householder.check_factor_backward("projector_factor_backward", dT, V, T)


PROJECTOR_FACTOR = Operation(
    "projector_factor(Tensor V) -> Tensor",
    FAMILY,
    _check,
    _fake_square,
    householder._key_factor,
)
ORTHONORMALISER = Operation(
    "orthonormaliser(Tensor V) -> Tensor", FAMILY, _check_orthonormaliser, _fake_square, householder._key_factor
)
PROJECTOR_FACTOR_BACKWARD = Operation(
    "projector_factor_backward(Tensor dT, Tensor V, Tensor T) -> Tensor",
    FAMILY,
    _check_backward,
    lambda dT, V, T: torch.empty(V.shape, dtype=V.dtype, device=V.device),
    lambda dT, V, T: householder._key_factor(V),
)
