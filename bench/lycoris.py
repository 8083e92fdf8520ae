"""LyCORIS's OFT and BOFT with the rotations of a case.

LyCORIS rotates what a layer puts out, W' = R W, where PEFT rotates what it takes in, W' = W R^T. A square layer takes
the same blocks either way, so the arms are given those of the case and judged by the layer that they make:

    y = s (x W^T) R_0 R_1 ... R_(f-1) + b

with the exact Cayley map also where OFT's default is a polynomial, and with the stages in the opposite order. As it
comes LyCORIS rebuilds the weight in every forward and adds the product of x and its change to the frozen layer's
output; in its bypass mode it rotates that output instead.
"""

from __future__ import annotations

import importlib
import logging

import torch
from torch import Tensor, nn

from bench import rotations
from bench.arm import Arm, NotAvailable, base_layer
from bench.cases import Case, Problem
from bench.oracle import Truth

MODULES = {"oft": ("diag_oft", "DiagOFTModule"), "boft": ("boft", "ButterflyOFTModule")}
DIFFERS = {
    "oft": "rotates the outputs, by the exact Cayley map of the same matrices",
    "boft": "rotates the outputs, by the same stages in the opposite order; LyCORIS itself always takes all stages",
}
WEIGHT, OUTPUT = "it rebuilds the weight in every forward", "its output is in float32 whatever its input's dtype"


def _interleaved(b: int) -> Tensor:
    """For each place in a block of LyCORIS, where the halves of a block alternate, the place in a block of PEFT."""
    return torch.arange(b).view(2, b // 2).T.reshape(-1)


def _blocks_of(case: Case, u: Tensor) -> Tensor:
    """LyCORIS's parameter B, of which B - B^T is skew, with the rotations that u has in PEFT's layout."""
    if case.kind == "oft":
        return rotations.upper(u, case.r)
    order = _interleaved(case.r)
    return u[..., order, :][..., order] / 2


def _module(problem: Problem, bypass: bool) -> nn.Module:
    case = problem.case
    if case.kind not in MODULES:
        raise NotAvailable("LyCORIS has no HRA")
    if bypass and problem.bias is not None:
        raise NotAvailable(
            "in its bypass mode LyCORIS rotates the bias too, which is another layer than its merged one"
        )
    if case.width_in != case.width_out:
        raise NotAvailable("LyCORIS rotates the outputs, of which there are not as many as inputs")
    file, name = MODULES[case.kind]
    try:
        made_by = getattr(importlib.import_module(f"lycoris.modules.{file}"), name)
    except (ImportError, AttributeError) as error:
        raise NotAvailable(f"LyCORIS cannot be imported ({error}); pip install lycoris-lora") from None
    # It would say on stdout how it factorises each width.
    logging.getLogger("LyCORIS").setLevel(logging.WARNING)
    scaled = case.kind == "boft"
    module = made_by("bench", base_layer(problem), 1.0, lora_dim=case.r, rescaled=scaled, bypass_mode=bypass or None)
    if module.block_size != case.r:
        raise NotAvailable(
            f"LyCORIS makes blocks of {module.block_size} of {case.width_out} outputs where {case.r} are asked for"
        )
    module.oft_blocks = nn.Parameter(_blocks_of(case, problem.u))
    if scaled:
        module.rescale = nn.Parameter(module.rescale.detach().to(problem.u))
    return module.to(problem.x.device)


def truth(problem: Problem) -> Truth:
    """The layer of LyCORIS in float64; du is the gradient of its own parameter."""
    case = problem.case
    x = problem.x.detach().double().requires_grad_()
    B = _blocks_of(case, problem.u.double()).requires_grad_()
    if case.kind == "oft":
        # r = (I + Q)(I - Q)^-1, and the weight is multiplied by r^T.
        stages = [rotations.cayley(B.mT - B)]
    else:
        order = torch.argsort(_interleaved(case.r))
        stages = rotations.cayley((B - B.mT)[..., order, :][..., order])
    y = x @ problem.weight.double().T
    for s, R in enumerate(stages):
        y = rotations.stage(case, y, R, s)
    if problem.bias is not None:
        y = y + problem.bias.double()
    return Truth(y.detach(), *torch.autograd.grad(y, (x, B), problem.grad_y.double()))


def arm(problem: Problem, bypass: bool) -> Arm:
    """Raises NotAvailable."""
    module = _module(problem, bypass)
    others = [module.rescale] if problem.case.kind == "boft" else []
    half = OUTPUT if problem.case.half else None
    notes = [DIFFERS[problem.case.kind], half if bypass else WEIGHT]
    return Arm(
        "lycoris-bypass" if bypass else "lycoris",
        module,
        module.oft_blocks,
        [module.oft_blocks, *others],
        others,
        blocks=module.get_r,
        differs="; ".join(note for note in notes if note),
        truth=lambda: truth(problem),
    )
