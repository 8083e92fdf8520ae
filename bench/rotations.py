"""OFT and BOFT rows: their adapters, PEFT's configurations, plain torch and the float64 truth.

The truth applies dense blocks and explicit index lists; it shares no formula with the package.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# A trained-looking adapter: entries of the skew matrices.
SIZE = {"oft": 0.02, "boft": 0.1}
# PEFT's `num_cayley_neumann_terms`, None for the exact Cayley map: its default, and what is closer to orthogonal.
TERMS = 5
BETTER_TERMS = {"terms6": 6, "cayley": None}


def adapter_shape(case) -> tuple[int, ...]:
    """Shape of u: packed skew matrices of blocks of r, or f stages of blocks of r."""
    blocks = case.width_in // case.r
    if case.layer == "oft":
        return blocks, case.r * (case.r - 1) // 2
    return case.factors, blocks, case.r, case.r


def config(case, terms: int | None = TERMS):
    """PEFT's configuration."""
    import peft

    if case.layer == "oft":
        return peft.OFTConfig(
            oft_block_size=case.r,
            target_modules=["layer"],
            use_cayley_neumann=terms is not None,
            num_cayley_neumann_terms=TERMS if terms is None else terms,
        )
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


def blocks_of_peft(layer) -> Tensor:
    """R as one of PEFT's layers makes it."""
    if hasattr(layer, "oft_R"):
        module = layer.oft_R["default"]
        return module._cayley_batch(
            module.weight, module.block_size, module.use_cayley_neumann, module.num_cayley_neumann_terms
        )
    return layer.cayley_batch(layer.boft_R["default"].flatten(0, 1))


def blocks_of_peftkern(case, u: Tensor, terms: int | None) -> Tensor:
    """R as the package makes it."""
    from peftkern.ops import block_rotation, butterfly

    return block_rotation.rotation_blocks(u, terms) if case.layer == "oft" else butterfly.butterfly_blocks(u)


def upper(u: Tensor, b: int) -> Tensor:
    """The strict upper triangles [K/b, b, b] that u holds packed."""
    rows, columns = torch.triu_indices(b, b, 1, device=u.device)
    blocks = torch.arange(len(u), device=u.device)[:, None]
    return u.new_zeros(len(u), b, b).index_put((blocks, rows, columns), u)


def cayley(A: Tensor) -> Tensor:
    """(I - A)(I + A)^-1, in float32 where A is in half precision, for which torch solves nothing."""
    A = A if A.dtype in (torch.float32, torch.float64) else A.float()
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    return torch.linalg.solve(eye + A, eye - A, left=False)


def blocks(case, u: Tensor, terms: int | None = TERMS) -> Tensor:
    """R of the stages [f, K/b, b, b], in u's dtype or float32; the last is applied first."""
    if case.layer == "boft":
        return cayley((u - u.mT) / 2)
    triangle = upper(u, case.r)
    Q = triangle - triangle.mT
    if terms is None:
        return cayley(Q)[None]
    powers = [Q]
    while len(powers) < terms - 1:
        powers.append(powers[-1] @ Q)
    eye = torch.eye(case.r, dtype=u.dtype, device=u.device)
    return (eye + 2 * sum(powers[:-1]) + powers[-1])[None]


def orthogonality_error(R: Tensor) -> float:
    """The largest |R^T R - I|_2 over blocks R [..., b, b]: 0 for rotations."""
    R = R.detach().double()
    eye = torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)
    return float(torch.linalg.matrix_norm(R.mT @ R - eye, ord=2).max())


def _stage_columns(K: int, b: int, s: int, device) -> Tensor:
    """The columns of the blocks of stage s > 0, block after block: half blocks at a distance of 2^s halves."""
    return torch.arange(K, device=device).view(-1, 2, 1 << s, b // 2).transpose(1, 2).reshape(-1)


def stage(case, x: Tensor, R: Tensor, s: int) -> Tensor:
    """The rows x through stage s, R [K/b, b, b] in x's dtype."""
    columns = _stage_columns(x.shape[-1], case.r, s, x.device) if s else None
    gathered = x if columns is None else x[:, columns]
    z = torch.einsum("tnb,nbc->tnc", gathered.unflatten(-1, (-1, case.r)), R).flatten(1)
    return z if columns is None else z[:, torch.argsort(columns)]


def rotate(case, x: Tensor, u: Tensor, terms: int | None = TERMS) -> Tensor:
    """x R stage by stage in plain torch, in x's dtype."""
    stages = blocks(case, u, terms)
    for s in reversed(range(len(stages))):
        x = stage(case, x, stages[s].to(x.dtype), s)
    return x


def truth(problem, terms: int | None = TERMS) -> tuple[Tensor, Tensor, Tensor]:
    """(y, dx, du) in float64."""
    x, u = (t.detach().double().requires_grad_() for t in (problem.x, problem.u))
    bias = None if problem.bias is None else problem.bias.double()
    y = F.linear(rotate(problem.case, x, u, terms), problem.weight.double(), bias)
    return y.detach(), *torch.autograd.grad(y, (x, u), problem.grad_y.double())
