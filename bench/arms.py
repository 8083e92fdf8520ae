"""The contenders. Every arm computes the same layer from the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import rotations
from bench.cases import Case, Problem


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

    def set_u(self, u: Tensor) -> None:
        with torch.no_grad():
            self.u.copy_(u)


LABELS = {
    "frozen": "frozen layer",
    "peft": "PEFT",
    "torch": "plain torch, compact WY",
    "fast": "peftkern, fast",
    "auto": "peftkern, auto",
    "exact": "peftkern, exact",
}
OURS = ("fast", "auto", "exact")
# Arms on a GPU are `<backend>-<precision>`: the package's layer, this backend first.
GPU_BACKENDS = ("reference", "triton", "cuda")
LABELS_GPU = {
    "compiled": "torch.compile(PEFT)",
    "lycoris": "LyCORIS",
    **{f"{b}-{p}": f"peftkern, {b}, {p}" for b in GPU_BACKENDS for p in ("fast", "exact")},
}


def label(name: str) -> str:
    return LABELS.get(name) or LABELS_GPU.get(name, name)


def is_ours(name: str) -> bool:
    return name in OURS or name.partition("-")[0] in GPU_BACKENDS


def names(case: Case) -> tuple[str, ...]:
    """Arms of a case. In fp32 `exact` has nothing to gain and is `fast`; of OFT and BOFT `auto` is `fast`."""
    if case.rotates:
        return ("frozen", "peft", "torch", "auto", *(("exact",) if case.half else ()))
    return tuple(LABELS) if case.half else ("frozen", "peft", "torch", "fast", "auto")


def base_layer(problem: Problem) -> nn.Module:
    case = problem.case
    with torch.device("meta"):
        if case.kind == "conv":
            layer = nn.Conv2d(case.width_in, case.width_out, 3, padding=1, bias=case.bias)
        else:
            layer = nn.Linear(case.width_in, case.width_out, bias=case.bias)
    layer.weight, layer.bias = problem.weight, problem.bias
    return layer


def _frozen(problem: Problem) -> Arm:
    return Arm("frozen", base_layer(problem))


def _triangular_factor(V: Tensor) -> Tensor:
    """T of H = I - V T V^T in float64; V [K, r] in float64."""
    G = V.T @ V
    A = G.triu(1) + torch.diag(G.diagonal() / 2)
    return torch.linalg.solve_triangular(A, torch.eye(len(A), dtype=A.dtype, device=A.device), upper=True)


def _plain_torch(problem: Problem) -> Arm:
    """Compact WY in plain torch calls under autograd: z = x - (x V)(V T)^T in two skinny products and one pass for z.

    A half-precision x meets V cast to its dtype; T comes from the cast V, so that H stays orthogonal.
    """
    weight, bias, kind, r = problem.weight, problem.bias, problem.case.kind, problem.case.r
    u = problem.u.clone().requires_grad_(problem.case.trains)
    if problem.case.rotates:
        return _plain_rotation(problem, u)

    def factors(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        V = u.to(dtype)
        V64 = V.double()
        if kind == "gram_schmidt":
            T = 2 * torch.cholesky_inverse(torch.linalg.cholesky(V64.T @ V64))
        else:
            T = _triangular_factor(V64)
        return V, (V64 @ T).to(dtype)

    def linear(x: Tensor) -> Tensor:
        V, VT = factors(x.dtype)
        return F.linear(torch.addmm(x, x @ V, VT.T, alpha=-1), weight, bias)

    def conv(x: Tensor) -> Tensor:
        V, VT = factors(x.dtype)
        P = F.conv2d(x, V.T.reshape(r, *weight.shape[1:]), padding=1)
        return F.conv2d(x, weight, bias, padding=1) - F.conv2d(P, (weight.flatten(1) @ VT)[:, :, None, None])

    return Arm("torch", conv if kind == "conv" else linear, u, [u])


def _plain_rotation(problem: Problem, u: Tensor) -> Arm:
    """The rotation on activations in plain torch calls under autograd: einsum over blocks, index lists for stages."""
    case, weight, bias = problem.case, problem.weight, problem.bias
    others = [torch.ones(case.width_out, dtype=u.dtype).requires_grad_()] if case.kind == "boft" else []

    def linear(x: Tensor) -> Tensor:
        z = rotations.rotate(case, x, u)
        if not others:
            return F.linear(z, weight, bias)
        y = F.linear(z, weight) * others[0].to(x.dtype)
        return y if bias is None else y + bias

    return Arm("torch", linear, u, [u, *others], others)


def _peft_model(problem: Problem) -> nn.Module:
    try:
        import peft
    except ImportError as error:
        raise NotAvailable(f"peft cannot be imported ({error})") from None
    case = problem.case
    gram_schmidt = case.kind == "gram_schmidt"
    if case.rotates:
        config = rotations.config(case)
    else:
        config = peft.HRAConfig(
            r=case.r,
            target_modules=["layer"],
            apply_GS=gram_schmidt,
            init_weights=not gram_schmidt,
            inference_mode=False,
        )
    model = nn.Module()
    model.layer = base_layer(problem)
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=case.adapter_dtype != case.base_dtype)
    layer = model.base_model.model.layer
    u, _ = _parameters(layer)
    if u.dtype != case.adapter_dtype:
        raise NotAvailable(f"PEFT holds the adapter in {u.dtype}, wanted {case.adapter_dtype}")
    if u.shape != problem.u.shape:
        raise NotAvailable(f"PEFT has one butterfly factor without its CUDA extension, wanted {case.factors}")
    with torch.no_grad():
        u.copy_(problem.u)
    if not case.trains:
        model.eval().requires_grad_(False)
    return model


def _parameters(layer: nn.Module) -> tuple[Tensor, list[Tensor]]:
    """(u, other trained tensors) of one of PEFT's layers."""
    return (layer.hra_u["default"], []) if hasattr(layer, "hra_u") else rotations.parameters(layer)


def _peft(problem: Problem) -> Arm:
    layer = _peft_model(problem).base_model.model.layer
    u, others = _parameters(layer)
    return Arm("peft", layer, u, [u, *others], others)


def _peftkern(problem: Problem, precision: str) -> Arm:
    """PEFT's layer after `peftkern.accelerate`, called as a user's model calls it."""
    try:
        import peftkern

        accelerate = peftkern.accelerate
    except (ImportError, AttributeError) as error:
        raise NotAvailable(f"peftkern.accelerate cannot be imported ({error})") from None
    if problem.case.factors > 1:
        peftkern.patch_peft(precision)
    try:
        model = _peft_model(problem)
    finally:
        peftkern.unpatch_peft()
    report = accelerate(model, precision=precision)
    if not report.replaced:
        raise NotAvailable("; ".join(reason for _, reason in report.skipped) or "accelerate() replaced nothing")
    layer = model.base_model.model.layer
    u, others = _parameters(layer)

    def detours() -> dict[str, int]:
        return {method: counts["to_peft"] for method, counts in peftkern.stats().items() if counts.get("to_peft")}

    return Arm(precision, layer, u, [u, *others], others, detours)


def build(name: str, problem: Problem) -> Arm:
    """The arm `name` on the tensors of `problem`. Raises NotAvailable with the reason."""
    if name in OURS:
        arm = _peftkern(problem, name)
    else:
        arm = {"frozen": _frozen, "torch": _plain_torch, "peft": _peft}[name](problem)
    arm.parameters += [p for p in (problem.weight, problem.bias) if p is not None]
    return arm
