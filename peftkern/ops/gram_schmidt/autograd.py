"""Differentiable form of the `gram_schmidt` operations."""

import torch

from peftkern.dispatch import direct as _ops
from peftkern.dispatch import unchecked as _unchecked
from peftkern.ops import _transforms
from peftkern.ops.gram_schmidt import contract, reference  # noqa: F401  (contract registers the operations)


class OrthonormalFactor(torch.autograd.Function):
    """V [K, r] -> an orthonormal basis Q like V and T [r, r] float64 with I - Q T Q^T = I - 2 Q Q^T.

    B of Q = V B counts as a constant: gradients are those of functions of the span alone.
    """

    @staticmethod
    def forward(ctx, V):
        Q, T, B = _ops.orthonormal_factor(V)
        ctx.save_for_backward(V, Q, B)
        return Q, T

    @staticmethod
    def backward(ctx, dQ, dT):
        V, Q, B = ctx.saved_tensors
        if _transforms.differentiating_twice():
            Q, _, B = reference.orthonormal_factor(V)
            return reference.orthonormal_factor_backward(dQ, dT, Q, B)
        return _unchecked.orthonormal_factor_backward(dQ, dT, Q, B)
