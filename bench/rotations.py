"""OFT and BOFT rows: their adapters, PEFT's configurations, plain torch and the float64 truth.

The truth applies dense blocks and explicit index lists; it shares no formula with the package.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# A trained-looking adapter: entries of the skew matrices.
SIZE = {"oft": 0.02, "boft": 0.1}
TERMS = 5


def adapter_shape(case) -> tuple[int, ...]:
    """Shape of u: packed skew matrices of blocks of r, or f stages of blocks of r."""
    blocks = case.width_in // case.r
    if case.kind == "oft":
        return blocks, case.r * (case.r - 1) // 2
    return case.factors, blocks, case.r, case.r


def config(case):
    """PEFT's configuration."""
    import peft

    if case.kind == "oft":
        return peft.OFTConfig(oft_block_size=case.r, target_modules=["layer"], num_cayley_neumann_terms=TERMS)
    from peft.tuners.boft import layer

    # PEFT would try to compile its CUDA extension for every layer, and go on with one factor.
    layer._FBD_CUDA = False
    return peft.BOFTConfig(
        boft_block_size=case.r, boft_n_butterfly_factor=case.factors, target_modules=["layer"], inference_mode=False
    )


def parameters(layer) -> tuple[Tensor, list[Tensor]]:
    """(u, other trained tensors) of one of PEFT's layers."""
    if hasattr(layer, "oft_R"):
        return layer.oft_R["default"].weight, []
    return layer.boft_R["default"], [layer.boft_s["default"]]


def _skew(u: Tensor, b: int) -> Tensor:
    rows, columns = torch.triu_indices(b, b, 1)
    upper = u.new_zeros(len(u), b, b).index_put((torch.arange(len(u))[:, None], rows, columns), u)
    return upper - upper.mT


def _blocks(case, u: Tensor) -> list[Tensor]:
    """R of each stage [K/b, b, b], in u's dtype; the last is applied first."""
    eye = torch.eye(case.r, dtype=u.dtype)
    if case.kind == "oft":
        Q = _skew(u, case.r)
        Q2 = Q @ Q
        return [eye + 2 * Q + 2 * Q2 + 2 * Q2 @ Q + Q2 @ Q2]
    A = (u - u.mT) / 2
    return list(torch.linalg.solve(eye + A, eye - A, left=False))


def _stage_columns(case, s: int) -> Tensor:
    """The columns of the blocks of stage s > 0, block after block: half blocks at a distance of 2^s halves."""
    K, b = case.width_in, case.r
    return torch.arange(K).view(-1, 2, 1 << s, b // 2).transpose(1, 2).reshape(-1)


def rotate(case, x: Tensor, u: Tensor) -> Tensor:
    """x R stage by stage in plain torch, in x's dtype."""
    stages = _blocks(case, u)
    for s in reversed(range(len(stages))):
        columns = _stage_columns(case, s) if s else None
        gathered = x if columns is None else x[:, columns]
        R = stages[s].to(x.dtype)
        z = torch.einsum("tnb,nbc->tnc", gathered.unflatten(-1, (-1, case.r)), R).flatten(1)
        x = z if columns is None else z[:, torch.argsort(columns)]
    return x


def truth(problem) -> tuple[Tensor, Tensor, Tensor]:
    """(y, dx, du) in float64."""
    x, u = (t.detach().double().requires_grad_() for t in (problem.x, problem.u))
    bias = None if problem.bias is None else problem.bias.double()
    y = F.linear(rotate(problem.case, x, u), problem.weight.double(), bias)
    return y.detach(), *torch.autograd.grad(y, (x, u), problem.grad_y.double())
