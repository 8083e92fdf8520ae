"""What the arms are judged against: the layer in float64, reflection by reflection.

Shares no formula with the package: no WY form, no Gram matrix, no triangular factor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import rotations
from bench.cases import Problem


@dataclass
class Truth:
    """Float64 output and, where the case trains, gradients of x and u. Each has the shape of what it judges."""

    y: Tensor
    dx: Tensor | None
    du: Tensor | None


def _reflect_(rows: Tensor, v: Tensor) -> None:
    """rows <- rows (I - 2 v v^T) in place; v [K] of unit length."""
    rows.addr_(rows @ v, v, alpha=-2)


def rotate(x: Tensor, u: Tensor) -> Tensor:
    """x H^T with H = H_0 H_1 ... H_{r-1}, in float64: the last reflection meets the rows first."""
    z = x.double().clone()
    unit = F.normalize(u.double(), dim=0)
    for j in reversed(range(u.shape[1])):
        _reflect_(z, unit[:, j])
    return z


def rotate_backward(dz: Tensor, z: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and u from those of z = rotate(x, u).

    A reflection is its own inverse, so its input is recovered from its output and nothing is stored per reflection.
    """
    dz, z, u = dz.double().clone(), z.clone(), u.double()
    length = u.norm(dim=0)
    unit = u / length
    du = torch.empty_like(u)
    for j in range(u.shape[1]):
        v = unit[:, j]
        _reflect_(z, v)
        dv = -2 * (z.T @ (dz @ v) + dz.T @ (z @ v))
        du[:, j] = (dv - v * (v @ dv)) / length[j]
        _reflect_(dz, v)
    return dz, du


def _linear(problem: Problem) -> Truth:
    weight, bias = problem.weight.double(), problem.bias
    z = rotate(problem.x.detach(), problem.u)
    y = F.linear(z, weight, None if bias is None else bias.double())
    if not problem.case.trains:
        return Truth(y, None, None)
    dx, du = rotate_backward(problem.grad_y.double() @ weight, z, problem.u)
    return Truth(y, dx, du)


def _gram_schmidt(problem: Problem) -> Truth:
    x = problem.x.detach().double().requires_grad_()
    u = problem.u.double().requires_grad_()
    Q = torch.linalg.qr(u).Q
    z = x - 2 * (x @ Q) @ Q.T
    y = F.linear(z, problem.weight.double(), None if problem.bias is None else problem.bias.double())
    dx, du = torch.autograd.grad(y, (x, u), problem.grad_y.double())
    return Truth(y.detach(), dx, du)


def _conv(problem: Problem) -> Truth:
    x = problem.x.detach().double().requires_grad_()
    u = problem.u.double().requires_grad_()
    weight = problem.weight.double()
    unit = u / u.norm(dim=0)
    rotated = weight.flatten(1)
    for j in range(u.shape[1]):
        v = unit[:, j]
        rotated = rotated - 2 * torch.outer(rotated @ v, v)
    bias = None if problem.bias is None else problem.bias.double()
    y = F.conv2d(x, rotated.view_as(weight), bias, padding=1)
    dx, du = torch.autograd.grad(y, (x, u), problem.grad_y.double())
    return Truth(y.detach(), dx, du)


def truth(problem: Problem) -> Truth:
    """The float64 result for the tensors of `problem`, exactly as rounded to their dtypes."""
    if problem.case.rotates:
        return Truth(*rotations.truth(problem))
    with torch.set_grad_enabled(problem.case.kind in ("gram_schmidt", "conv")):
        return {"linear": _linear, "decode": _linear, "gram_schmidt": _gram_schmidt, "conv": _conv}[problem.case.kind](
            problem
        )


def update(x: Tensor, weight: Tensor, u: Tensor) -> Tensor:
    """D = x (H^T - I) W^T in float64: what the adapter adds to the frozen layer's output."""
    return (rotate(x, u) - x.double()) @ weight.double().T
