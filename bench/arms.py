"""The contenders. Every arm computes the same layer from the same tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import lycoris, rotations
from bench.arm import Arm, NotAvailable, base_layer
from bench.cases import Case, Problem
from bench.oracle import Truth

LABELS = {
    "frozen": "frozen layer",
    "peft": "PEFT",
    "torch": "plain torch",
    "lycoris": "LyCORIS",
    "lycoris-bypass": "LyCORIS, bypass mode",
    "fast": "peftkern, fast",
    "auto": "peftkern, auto",
    "auto-terms6": "peftkern, auto, 6 terms",
    "auto-cayley": "peftkern, auto, exact map",
    "exact": "peftkern, exact",
}
OURS = ("fast", "auto", "exact")
HRA = ("frozen", "peft", "torch", "fast", "auto")
LYCORIS = ("lycoris", "lycoris-bypass")
# Arms on a GPU are `<backend>-<precision>`: the package's layer, this backend first.
GPU_BACKENDS = ("reference", "triton", "cuda")
LABELS_GPU = {
    "compiled": "PEFT, torch.compile",
    **{f"{b}-{p}": f"peftkern, {b}, {p}" for b in GPU_BACKENDS for p in ("fast", "exact")},
}


def label(name: str) -> str:
    return LABELS.get(name) or LABELS_GPU.get(name, name)


def is_ours(name: str) -> bool:
    return name.partition("-")[0] in OURS + GPU_BACKENDS


def names(case: Case) -> tuple[str, ...]:
    """Arms of a case. In fp32 `exact` has nothing to gain and is `fast`; of OFT and BOFT `auto` is `fast`."""
    exact = ("exact",) if case.half else ()
    if not case.rotates:
        return HRA + exact
    better = tuple(f"auto-{name}" for name in rotations.BETTER_TERMS) if case.kind == "oft" else ()
    return ("frozen", "peft", "torch", *LYCORIS, "auto", *better, *exact)


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
    others = [u.new_ones(case.width_out).requires_grad_()] if case.kind == "boft" else []

    def linear(x: Tensor) -> Tensor:
        z = rotations.rotate(case, x, u)
        if not others:
            return F.linear(z, weight, bias)
        y = F.linear(z, weight) * others[0].to(x.dtype)
        return y if bias is None else y + bias

    return Arm("torch", linear, u, [u, *others], others, blocks=lambda: rotations.blocks(case, u))


def _peft_model(problem: Problem, terms: int | None = rotations.TERMS) -> nn.Module:
    try:
        import peft
    except ImportError as error:
        raise NotAvailable(f"peft cannot be imported ({error})") from None
    case = problem.case
    gram_schmidt = case.kind == "gram_schmidt"
    if case.rotates:
        config = rotations.config(case, terms)
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
    blocks = (lambda: rotations.blocks_of_peft(layer)) if problem.case.rotates else None
    return Arm("peft", layer, u, [u, *others], others, blocks=blocks)


def _peftkern(problem: Problem, name: str) -> Arm:
    """PEFT's layer after `peftkern.accelerate`, called as a user's model calls it."""
    precision, _, variant = name.partition("-")
    terms = rotations.BETTER_TERMS[variant] if variant else rotations.TERMS
    try:
        import peftkern

        accelerate = peftkern.accelerate
    except (ImportError, AttributeError) as error:
        raise NotAvailable(f"peftkern.accelerate cannot be imported ({error})") from None
    if problem.case.factors > 1:
        peftkern.patch_peft(precision)
    try:
        model = _peft_model(problem, terms)
    finally:
        peftkern.unpatch_peft()
    report = accelerate(model, precision=precision)
    if not report.replaced:
        raise NotAvailable("; ".join(reason for _, reason in report.skipped) or "accelerate() replaced nothing")
    layer = model.base_model.model.layer
    u, others = _parameters(layer)

    def detours() -> dict[str, int]:
        return {method: counts["to_peft"] for method, counts in peftkern.stats().items() if counts.get("to_peft")}

    arm = Arm(name, layer, u, [u, *others], others, detours)
    if problem.case.rotates:
        arm.blocks = lambda: rotations.blocks_of_peftkern(problem.case, u, terms)
    if variant:
        arm.truth = lambda: Truth(*rotations.truth(problem, terms))
    return arm


def build(name: str, problem: Problem) -> Arm:
    """The arm `name` on the tensors of `problem`. Raises NotAvailable with the reason."""
    if is_ours(name):
        arm = _peftkern(problem, name)
    elif name in LYCORIS:
        arm = lycoris.arm(problem, bypass=name == "lycoris-bypass")
    else:
        arm = {"frozen": _frozen, "torch": _plain_torch, "peft": _peft}[name](problem)
    arm.parameters += [p for p in (problem.weight, problem.bias) if p is not None]
    return arm
