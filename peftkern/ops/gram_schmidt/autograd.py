"""Differentiable form of the `gram_schmidt` operations."""

import torch

from peftkern.ops import _transforms
from peftkern.ops.gram_schmidt import reference


class ProjectorFactor(torch.autograd.Function):
    """V [K, r] -> T [r, r] float64 with I - V T V^T = I - 2 Q Q^T."""

    @staticmethod
    def forward(ctx, V):
        T = torch.ops.peftkern.projector_factor(V)
        ctx.save_for_backward(V, T)
        return T

    @staticmethod
    def backward(ctx, dT):
        V, T = ctx.saved_tensors
        if _transforms.differentiating_twice():
            return reference.projector_factor_backward(dT, V, reference.projector_factor(V))
        return torch.ops.peftkern.projector_factor_backward(dT.contiguous(), V, T)
