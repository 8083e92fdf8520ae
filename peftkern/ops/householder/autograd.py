"""Differentiable forms of the `householder` operations.

Forward and backward are operations of `torch.ops.peftkern`. When a backward is itself differentiated (create_graph)
it is taken from the reference formulas, which torch can differentiate again; nothing is dropped.
"""

import torch
import torch.nn.functional as F

from peftkern.dispatch import direct as _ops
from peftkern.dispatch import unchecked as _unchecked
from peftkern.ops import _scratch, _transforms
from peftkern.ops.gram_schmidt import reference as gs_reference
from peftkern.ops.householder import contract, reference


class WYFactor(torch.autograd.Function):
    """V [K, r] -> T [r, r] float64."""

    @staticmethod
    def forward(ctx, V):
        T = _ops.wy_factor(V)
        ctx.save_for_backward(V, T)
        return T

    @staticmethod
    def backward(ctx, dT):
        V, T = ctx.saved_tensors
        if _transforms.differentiating_twice():
            return reference.wy_factor_backward(dT, V, reference.wy_factor(V))
        return _unchecked.wy_factor_backward(dT.contiguous(), V, T)


class WYFactors(torch.autograd.Function):
    """Several V [K, r] of one r -> their T, in one launch for every 64 of them on a GPU."""

    @staticmethod
    def forward(ctx, *Vs):
        serving = (name for name, ok, _ in contract.WY_FACTOR.explain(Vs[0]) if ok)
        backend, _ = contract.WY_FACTOR.backend(next(serving, "reference"))
        Ts = backend.factor_many(Vs) if hasattr(backend, "factor_many") else [_ops.wy_factor(V) for V in Vs]
        ctx.save_for_backward(*Vs, *Ts)
        return tuple(Ts)

    @staticmethod
    def backward(ctx, *dTs):
        n = len(dTs)
        Vs, Ts = ctx.saved_tensors[:n], ctx.saved_tensors[n:]
        if _transforms.differentiating_twice():
            formula = reference.wy_factor_backward
            return tuple(formula(dT, V, reference.wy_factor(V)) for dT, V in zip(dTs, Vs, strict=True))
        return tuple(_unchecked.wy_factor_backward(dT.contiguous(), V, T) for dT, V, T in zip(dTs, Vs, Ts, strict=True))


class Rotate(torch.autograd.Function):
    """z = x H^T (x H when reversed); saves x, V, T and the projection x V [M, r]."""

    @staticmethod
    def forward(ctx, x, V, T, reverse):
        z, P = _ops.rotate(x, V, T, reverse)
        ctx.save_for_backward(x, V, T, P)
        ctx.reverse = reverse
        return z

    @staticmethod
    def backward(ctx, dz):
        x, V, T, P = ctx.saved_tensors
        return *_rotate_backward(dz, x, V, T, P, ctx.reverse, ctx.needs_input_grad), None


def _rotate_backward(dz, x, V, T, P, reverse, needs_input_grad):
    mask = (needs_input_grad[0], needs_input_grad[1] or needs_input_grad[2])
    if _transforms.differentiating_twice():
        P = reference.project(x, V)
        dx, dV, dT = reference.rotate_backward(dz, x, P, V, T, reverse, mask)
    else:
        dx, dV, dT = _unchecked.rotate_backward(dz, x, P, V, T, reverse, mask)
    return dx if mask[0] else None, dV if mask[1] else None, dT if mask[1] else None


class _Factor:
    """The factor of V that a node of the graph makes on its way.

    basis, T: of H = I - basis T basis^T, V itself or, with Gram-Schmidt, an orthonormal basis V mix.
    """

    def __init__(self, V, basis, T, mix):
        self.V, self.basis, self.T, self.mix = V, V if basis is None else basis, T, mix

    @classmethod
    def of(cls, V, gram_schmidt):
        return cls(V, *_ops.orthonormal_factor(V)) if gram_schmidt else cls(V, None, _ops.wy_factor(V), None)

    @property
    def saved(self):
        """What a backward needs to have it again: V, basis, T, mix."""
        return self.V, None if self.mix is None else self.basis, self.T, self.mix

    @classmethod
    def again(cls, V, basis, T, mix):
        """From what was saved; as a function of V where the backward is differentiated itself."""
        if not _transforms.differentiating_twice():
            return cls(V, basis, T, mix)
        if mix is None:
            return cls(V, None, reference.wy_factor(V), None)
        return cls(V, *gs_reference.orthonormal_factor(V))

    def gradient(self, dbasis, dT):
        """dV in total: what reached the basis, and what reached V through the factor."""
        if dbasis is None:
            return None
        twice = _transforms.differentiating_twice()
        if self.mix is not None:
            backward = _unchecked.orthonormal_factor_backward
            backward = gs_reference.orthonormal_factor_backward if twice else backward
            return backward(dbasis, dT, self.basis, self.mix)
        if twice:
            return dbasis + reference.wy_factor_backward(dT, self.V, self.T)
        return _unchecked.wy_factor_backward(dT, self.V, self.T).add_(dbasis)


class Reflect(torch.autograd.Function):
    """`Rotate` by the factor of V, made on the way: one node of the graph instead of two."""

    @staticmethod
    def forward(ctx, x, V, reverse, gram_schmidt):
        factor = _Factor.of(V, gram_schmidt)
        z, P = _ops.rotate(x, factor.basis, factor.T, reverse)
        ctx.save_for_backward(x, P, *factor.saved)
        ctx.reverse = reverse
        return z

    @staticmethod
    def backward(ctx, dz):
        x, P, *saved = ctx.saved_tensors
        need_x, need_V = ctx.needs_input_grad[:2]
        factor = _Factor.again(*saved)
        needs = need_x, need_V, need_V
        dx, dV, dT = _rotate_backward(dz, x, factor.basis, factor.T, P, ctx.reverse, needs)
        return dx, factor.gradient(dV, dT), None, None


def _linear_backward(dy, x, weight, V, T, P, B, needs_input_grad):
    """dx, dW, db, dV and dT of y = x H^T W^T + b, None where not needed."""
    need_x, need_weight, need_bias, need_factor = needs_input_grad
    dx = dV = dT = dweight = dbias = None
    if need_x or need_factor:
        mask = need_x, need_factor
        if _transforms.differentiating_twice():
            P = reference.project(x, V)
            B = reference.project(weight, reference.pairs(V)) if B.shape[0] else B
            dx, dV, dT = reference.rotated_linear_backward(dy, x, weight, P, B, V, T, mask)
        else:
            dx, dV, dT = _unchecked.rotated_linear_backward(dy, x, weight, P, B, V, T, mask)
        dx, dV, dT = dx if need_x else None, dV if need_factor else None, dT if need_factor else None
    if need_weight:
        rotate = reference.rotate if _transforms.differentiating_twice() else _ops.rotate
        z = rotate(x, V, T, False)[0]
        with _transforms.no_autocast(dy.device.type):
            dweight = dy.reshape(-1, dy.shape[-1]).mT @ z.reshape(-1, z.shape[-1])
    if need_bias:
        dbias = dy.reshape(-1, dy.shape[-1]).sum(0)
    return dx, dweight, dbias, dV, dT


def _linear(ctx, x, weight, bias, V, T, exact):
    """y, P and B, in one accumulator or through a z that is rounded as a base layer takes it."""
    if exact:
        return _ops.rotated_linear(x, weight, bias, V, T, any(ctx.needs_input_grad))
    z, P = _ops.rotate(x, V, T, False)
    with _transforms.no_autocast(x.device.type):
        y = F.linear(z, weight, bias)
    _scratch.give(z)
    return y, P, V.new_empty(0, V.shape[1])


class RotatedLinear(torch.autograd.Function):
    """y = x H^T W^T + b, in one accumulator where `exact`; saves x, W, V, T, x V and, for that, W Vp: nothing of W's
    size beside W itself."""

    @staticmethod
    def forward(ctx, x, weight, bias, V, T, exact):
        y, P, B = _linear(ctx, x, weight, bias, V, T, exact)
        ctx.save_for_backward(x, weight, V, T, P, B)
        return y

    @staticmethod
    def backward(ctx, dy):
        need_x, need_weight, need_bias, need_V, need_T, _ = ctx.needs_input_grad
        return *_linear_backward(dy, *ctx.saved_tensors, (need_x, need_weight, need_bias, need_V or need_T)), None


class ReflectedLinear(torch.autograd.Function):
    """`RotatedLinear` by the factor of V, made on the way."""

    @staticmethod
    def forward(ctx, x, weight, bias, V, exact, gram_schmidt):
        factor = _Factor.of(V, gram_schmidt)
        y, P, B = _linear(ctx, x, weight, bias, factor.basis, factor.T, exact)
        ctx.save_for_backward(x, weight, P, B, *factor.saved)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, P, B, *saved = ctx.saved_tensors
        factor = _Factor.again(*saved)
        needs = ctx.needs_input_grad[:4]
        *gradients, dV, dT = _linear_backward(dy, x, weight, factor.basis, factor.T, P, B, needs)
        return *gradients, factor.gradient(dV, dT), None, None


class Project(torch.autograd.Function):
    """P = x V [M, r]."""

    @staticmethod
    def forward(ctx, x, V):
        ctx.save_for_backward(x, V)
        return _ops.project(x, V)

    @staticmethod
    def backward(ctx, dP):
        x, V = ctx.saved_tensors
        mask = ctx.needs_input_grad
        backward = reference.project_backward if _transforms.differentiating_twice() else _unchecked.project_backward
        dx, dV = backward(dP, x, V, mask)
        return dx if mask[0] else None, dV if mask[1] else None


class Penalty(torch.autograd.Function):
    """||I - U^T U||_F^2 (or its root) over the unit columns of V."""

    @staticmethod
    def forward(ctx, V, squared):
        ctx.save_for_backward(V)
        ctx.squared = squared
        return _ops.orthogonality_penalty(V, squared)

    @staticmethod
    def backward(ctx, grad):
        (V,) = ctx.saved_tensors
        if _transforms.differentiating_twice():
            return reference.orthogonality_penalty_backward(grad, V, ctx.squared), None
        return _unchecked.orthogonality_penalty_backward(grad, V, ctx.squared), None
