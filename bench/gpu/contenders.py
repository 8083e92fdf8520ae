"""The contenders on a GPU: layers as in bench/arms.py, one more per backend, and single operations."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from bench import arms, rotations
from bench.arm import Arm, NotAvailable
from bench.cases import Case, Problem
from bench.gpu import stand_in
from peftkern import dispatch

Stages = list[Callable[[], object]]
# torch.compile unrolls PEFT's loop over the reflections, and takes up to a minute for each of these.
COMPILED = {
    "linear": [(4096, 32, "bf16+fp32"), (4096, 32, "fp32"), (4096, 8, "bf16+fp32")],
    "oft": [(4096, 32, dtype) for dtype in ("bf16+fp32", "bf16", "fp32")],
    "boft": [(4096, 8, dtype) for dtype in ("bf16+fp32", "bf16", "fp32")],
}


class Serving:
    """An order of backends, with its own choices kept: a contender switches to it and back without choosing anew."""

    def __init__(self, first: str, device_type: str):
        self.first, self.device_type = first, device_type
        rest = dispatch.PREFERENCE["cuda"]
        self.order = (first, *rest[rest.index(first) + 1 :])
        self._kept: dict[str, dict] = {}

    @contextmanager
    def __call__(self):
        operations = dispatch.operations()
        before = {name: operation._serving for name, operation in operations.items()}
        order = dispatch.PREFERENCE.get(self.device_type)
        dispatch.PREFERENCE[self.device_type] = self.order
        for name, operation in operations.items():
            operation._serving = self._kept.setdefault(name, {})
        try:
            yield
        finally:
            dispatch.PREFERENCE[self.device_type] = order
            for name, operation in operations.items():
                operation._serving = before[name]

    def failed(self) -> list[str]:
        """Operations that the first backend began to serve and left to the next one, each with what went wrong."""
        return [
            f"{name}: {operation._broken[self.first]}"
            for name, operation in dispatch.operations().items()
            if self.first in operation._broken and self._kept.get(name)
        ]

    def served(self) -> dict[str, str]:
        """Which backend served each operation so far."""
        names = {}
        for operation, kept in self._kept.items():
            for function in kept.values():
                module = function.__module__.rpartition(".")[2]
                names[operation] = module.removesuffix("_backend") if module.endswith("_backend") else "reference"
        return names


@dataclass
class Contender:
    """stages: what is timed, one device time each (forward, backward; or the one call of an operation); outputs: runs
    it once and returns y, dx, du as far as it has them (None: nothing to compare)."""

    name: str
    stages: Stages
    outputs: Callable[[], tuple[Tensor, ...]] | None = None
    arm: Arm | None = None
    serving: Serving | None = None


def names(case: Case) -> tuple[str, ...]:
    """Contenders of a case, the floor first."""
    if case.operation is not None:
        return ("frozen", *arms.GPU_BACKENDS)
    ours = [f"{backend}-{precision}" for backend in arms.GPU_BACKENDS for precision in ("fast", "exact")]
    return ("frozen", "peft", "compiled", "torch", *arms.LYCORIS, *ours)


def build(name: str, problem: Problem, device) -> Contender:
    """The contender `name` on the tensors of `problem`. Raises NotAvailable with the reason."""
    if problem.case.operation is not None and name != "frozen":
        return _operation(name, problem, device)
    if name == "compiled":
        return _layer(_compiled(problem, device), problem)
    backend, _, precision = name.partition("-")
    if backend not in arms.GPU_BACKENDS:
        return _layer(arms.build(name, problem), problem)
    _check_backend(backend, device)
    if precision == "exact" and not problem.case.half:
        raise NotAvailable("in fp32 exact is fast")
    contender = _layer(_peftkern(name, precision, problem), problem)
    contender.serving = Serving(backend, device.kind)
    return contender


def _check_backend(backend: str, device):
    """Raise where a backend serves nothing here: its figures would be those of the next one."""
    if backend == "reference":
        return
    if device.simulated and backend in stand_in.missing():
        raise NotAvailable(f"backend {backend}: {stand_in.missing()[backend]}")
    known = [o.backend(backend) for o in dispatch.operations().values()]
    modules = {module for module, _ in known if module is not None}
    if not modules:
        raise NotAvailable(f"backend {backend} writes no operation")
    answers = [module.available() for module in modules]
    if not any(ok for ok, _ in answers):
        raise NotAvailable(f"backend {backend}: {answers[0][1]}")


def _layer(arm: Arm, problem: Problem) -> Contender:
    state: dict[str, Tensor] = {}
    wanted = (problem.x,) if arm.u is None else (problem.x, arm.u, *arm.others)

    def forward():
        state["y"] = arm.forward(problem.x)

    def backward():
        return torch.autograd.grad(state.pop("y"), wanted, problem.grad_y)

    def outputs():
        forward()
        y = state["y"].detach()
        return y, *backward()

    return Contender(arm.name, [forward, backward], outputs, arm)


def _compiled(problem: Problem, device) -> Arm:
    case = problem.case
    compiled = COMPILED.get(case.kind, [])
    if not device.simulated and (case.width_in, case.r, case.dtype) not in compiled:
        size = "b" if case.rotates else "r"
        shapes = "; ".join(f"{width} wide, {size} {r}, {dtype}" for width, r, dtype in compiled)
        done = f"done for {shapes} alone" if shapes else "not done for layers of this kind"
        raise NotAvailable(f"compiling takes long, so it is {done}")
    arm = arms.build("peft", problem)
    options = {"backend": "aot_eager"} if device.simulated else {}
    return replace(arm, name="compiled", forward=torch.compile(arm.forward, dynamic=False, **options))


# A layer, its adapter, and what else it trains.
Trained = tuple[nn.Module, nn.Parameter, list[nn.Parameter]]


def _hra(base: nn.Module, problem: Problem, precision: str) -> Trained:
    from peftkern.nn import HRALinear

    gram_schmidt = problem.case.kind == "gram_schmidt"
    layer = HRALinear(base, problem.case.r, apply_gs=gram_schmidt, init_weights=False, precision=precision)
    layer.hra_u = nn.Parameter(problem.u.clone())
    return layer, layer.hra_u, []


def _oft(base: nn.Module, problem: Problem, precision: str) -> Trained:
    from peftkern.nn import OFTLinear

    layer = OFTLinear(base, problem.case.r, terms=rotations.TERMS, precision=precision)
    layer.oft_R.weight = nn.Parameter(problem.u.clone())
    return layer, layer.oft_R.weight, []


def _boft(base: nn.Module, problem: Problem, precision: str) -> Trained:
    from peftkern.nn import BOFTLinear

    layer = BOFTLinear(base, problem.case.r, problem.case.factors, precision=precision)
    layer.boft_R = nn.Parameter(problem.u.clone())
    layer.boft_s = nn.Parameter(layer.boft_s.detach().to(problem.u))
    return layer, layer.boft_R, [layer.boft_s]


OURS = {"linear": _hra, "gram_schmidt": _hra, "oft": _oft, "boft": _boft}


def _peftkern(name: str, precision: str, problem: Problem) -> Arm:
    case = problem.case
    layer, u, others = OURS[case.kind](arms.base_layer(problem), problem, precision)
    frozen = [p for p in (problem.weight, problem.bias) if p is not None]
    blocks = (lambda: rotations.blocks_of_peftkern(case, u, rotations.TERMS)) if case.rotates else None
    return Arm(name, layer, u, [u, *others, *frozen], others, blocks=blocks)


# ---- single operations


def _of_columns(problem: Problem) -> dict[str, Callable[[], object]]:
    """Rules for the arguments that only operations on columns V [K, r] have."""
    case, device = problem.case, problem.x.device
    V = problem.u.float()

    def triangle():
        return torch.triu(torch.randn(case.r, case.r, dtype=torch.float64, device=device)) / case.width_in

    def rows():
        return torch.randn(case.tokens, case.r, device=device)

    known = {"V": lambda: V, "Q": lambda: torch.linalg.qr(V).Q.contiguous(), "dQ": lambda: torch.randn_like(V)}
    known |= {"T": triangle, "dT": triangle, "B": triangle, "P": rows, "dP": rows}
    return known | {"reverse": lambda: False, "squared": lambda: True, "keep": lambda: True}


def _of_blocks(problem: Problem) -> dict[str, Callable[[], object]]:
    """Rules for the arguments that only operations on blocks R have."""
    from peftkern.ops import block_rotation

    case, parameter = problem.case, problem.u.float()

    def R():
        return rotations.blocks_of_peftkern(case, parameter, rotations.TERMS)

    return {
        "q": lambda: parameter,
        "B": lambda: parameter,
        "R": R,
        "dR": lambda: torch.randn_like(R()),
        "coefficients": lambda: list(block_rotation.coefficients(rotations.TERMS)),
        "transpose": lambda: False,
        "scale": lambda: parameter.new_ones(case.width_out),
        "y": lambda: torch.randn_like(problem.grad_y),
        "p": lambda: torch.randn_like(problem.grad_y),
    }


def arguments(operation: dispatch.Operation, problem: Problem) -> list[object]:
    """What `operation` is called with at the shape of a problem. Raises NotAvailable for an argument without a rule."""
    case = problem.case
    known = {
        "x": problem.x.detach,
        "weight": problem.weight.detach,
        "bias": lambda: None,
        "dz": lambda: torch.randn_like(problem.x.detach()),
        "dy": lambda: problem.grad_y,
        "grad": lambda: torch.ones((), device=problem.x.device),
    }
    known |= _of_blocks(problem) if case.rotates else _of_columns(problem)
    schema = getattr(torch.ops.peftkern, operation.name).default._schema
    known |= {a.name: lambda size=a.N: [True] * size for a in schema.arguments if a.name == "output_mask"}
    if operation.name == "rotated_linear_backward":
        # The weight's product with the columns, kept in half precision.
        N = case.width_out if case.half else 0
        known["B"] = lambda: torch.randn(N, case.r, device=problem.x.device)
    unknown = [a.name for a in schema.arguments if a.name not in known]
    if unknown:
        raise NotAvailable(f"no rule for the arguments {', '.join(unknown)} of {operation.name}")
    return [known[a.name]() for a in schema.arguments]


def _operation(name: str, problem: Problem, device) -> Contender:
    operation = dispatch.operations()[problem.case.operation]
    module, reason = operation.backend(name)
    if module is None:
        raise NotAvailable(f"backend {name}: {reason}")
    args = arguments(operation, problem)
    if name != "reference":
        ok, reason = module.supports(operation.name, *args)
        if not ok:
            raise NotAvailable(f"backend {name}: {reason}")
    function = getattr(torch.ops.peftkern, operation.name)

    def call():
        with torch.no_grad():
            return function(*args)

    return Contender(name, [call], serving=Serving(name, device.kind))
