"""The contenders on a GPU: layers as in bench/arms.py, one more per backend, and single operations."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench import arms
from bench.arms import Arm, NotAvailable
from bench.cases import Problem
from bench.gpu import stand_in
from peftkern import dispatch

Stages = list[Callable[[], object]]
LYCORIS = {"linear": "LyCORIS has no HRA", "gram_schmidt": "LyCORIS has no HRA"}
# torch.compile unrolls PEFT's loop over the reflections, and takes up to a minute for each of these.
COMPILED = [(4096, 32, "bf16+fp32"), (4096, 32, "fp32"), (4096, 8, "bf16+fp32")]


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


def names(kind: str) -> tuple[str, ...]:
    """Contenders of a kind of case, the floor first."""
    ours = [f"{backend}-{precision}" for backend in arms.GPU_BACKENDS for precision in ("fast", "exact")]
    if kind.startswith("op:"):
        return ("frozen", *arms.GPU_BACKENDS)
    return ("frozen", "peft", "compiled", "torch", "lycoris", *ours)


def build(name: str, problem: Problem, device) -> Contender:
    """The contender `name` on the tensors of `problem`. Raises NotAvailable with the reason."""
    if problem.case.kind.startswith("op:") and name != "frozen":
        return _operation(name, problem, device)
    if name == "lycoris":
        raise NotAvailable(LYCORIS[problem.case.kind])
    if name == "compiled":
        return _layer(_compiled(problem, device), problem)
    if name in ("frozen", "peft", "torch"):
        return _layer(arms.build(name, problem), problem)
    backend, precision = name.split("-")
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
    wanted = (problem.x,) if arm.u is None else (problem.x, arm.u)

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
    if not device.simulated and (case.kind != "linear" or (case.width_in, case.r, case.dtype) not in COMPILED):
        shapes = "; ".join(f"{width} wide, r {r}, {dtype}" for width, r, dtype in COMPILED)
        raise NotAvailable(f"compiling takes long, so it is done for {shapes} alone")
    arm = arms.build("peft", problem)
    options = {"backend": "aot_eager"} if device.simulated else {}
    return Arm("compiled", torch.compile(arm.forward, dynamic=False, **options), arm.u, arm.parameters)


def _peftkern(name: str, precision: str, problem: Problem) -> Arm:
    from peftkern.nn import HRALinear

    gram_schmidt = problem.case.kind == "gram_schmidt"
    base = arms.base_layer(problem)
    layer = HRALinear(base, problem.case.r, apply_gs=gram_schmidt, init_weights=False, precision=precision)
    layer.hra_u = nn.Parameter(problem.u.clone())
    return Arm(name, layer, layer.hra_u, [layer.hra_u, *(p for p in (problem.weight, problem.bias) if p is not None)])


# ---- single operations


def arguments(operation: dispatch.Operation, problem: Problem) -> list[object]:
    """What `operation` is called with at the shape of a problem. Raises NotAvailable for an argument without a rule."""
    case, device = problem.case, problem.x.device
    M, K, r = case.tokens, case.width_in, case.r
    V = problem.u.float()

    def triangle():
        return torch.triu(torch.randn(r, r, dtype=torch.float64, device=device)) / K

    known = {
        "x": problem.x.detach,
        "weight": problem.weight.detach,
        "bias": lambda: None,
        "V": lambda: V,
        "Q": lambda: torch.linalg.qr(V).Q.contiguous(),
        "dQ": lambda: torch.randn_like(V),
        "T": triangle,
        "dT": triangle,
        "B": triangle,
        "P": lambda: torch.randn(M, r, device=device),
        "dP": lambda: torch.randn(M, r, device=device),
        "dz": lambda: torch.randn_like(problem.x.detach()),
        "dy": lambda: problem.grad_y,
        "grad": lambda: torch.ones((), device=device),
        "reverse": lambda: False,
        "squared": lambda: True,
        "output_mask": lambda: [True, True],
    }
    schema = getattr(torch.ops.peftkern, operation.name).default._schema
    unknown = [a.name for a in schema.arguments if a.name not in known]
    if unknown:
        raise NotAvailable(f"no rule for the arguments {', '.join(unknown)} of {operation.name}")
    return [known[a.name]() for a in schema.arguments]


def _operation(name: str, problem: Problem, device) -> Contender:
    operation = dispatch.operations()[problem.case.kind.removeprefix("op:")]
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
