"""What a contender is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bench.cases import Problem
from bench.oracle import Truth


class NotAvailable(Exception):
    """This arm cannot run here; the message says why."""


@dataclass
class Arm:
    """forward maps x to y; u is the trainable adapter (None for the frozen layer), which `set_u` writes in place.

    others: what is trained beside u (BOFT's output scale)."""

    name: str
    forward: Callable[[Tensor], Tensor]
    u: Tensor | None = None
    parameters: list[Tensor] = field(default_factory=list)
    others: list[Tensor] = field(default_factory=list)
    # Calls that left the accelerated path, and why; None where the arm has no such thing.
    detours: Callable[[], dict[str, int]] | None = None
    # The blocks R [..., b, b] that it rotates with, as it makes them from u.
    blocks: Callable[[], Tensor] | None = None
    # An arm whose convention makes another layer of the same rotations: what differs, and what it is judged by.
    differs: str | None = None
    truth: Callable[[], Truth] | None = None

    def set_u(self, u: Tensor) -> None:
        with torch.no_grad():
            self.u.copy_(u)


def base_layer(problem: Problem) -> nn.Module:
    """The frozen layer around the weight that all arms share."""
    case = problem.case
    with torch.device("meta"):
        if case.kind == "conv":
            layer = nn.Conv2d(case.width_in, case.width_out, 3, padding=1, bias=case.bias)
        else:
            layer = nn.Linear(case.width_in, case.width_out, bias=case.bias)
    layer.weight, layer.bias = problem.weight, problem.bias
    return layer
