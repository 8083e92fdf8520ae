"""Where a backend runs in these tests: the processor, a device, or one of the stand-ins for a device.

On a machine without a GPU `cuda` and `triton` execute their compiled PTX on CPU tensors (level 4); in a process started
with TRITON_INTERPRET=1 `triton` runs in Triton's interpreter instead (level 2). Where torch sees a GPU both run on it
(level 5).
"""

import importlib.util
import os
from contextlib import ExitStack, contextmanager

import pytest
import torch
from ptxvm import build

from peftkern import dispatch

ON_DEVICE = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def level(backend):
    """The level of proof that a backend's tests have in this process (CONTRIBUTING.md, "Proof without a GPU")."""
    if backend in ("reference", "cpu"):
        return ("reference", "cpu").index(backend)
    if INTERPRETED and backend == "triton":
        return 2
    return 5 if ON_DEVICE else 4


def simulated(backend):
    """Whether a stand-in runs the backend: right in every bit it shows, and a thousand times slower."""
    return level(backend) in (2, 4)


def missing(backend):
    """Why no test can run a backend in this process; None if some can."""
    if backend == "reference":
        return None
    if not any(_written(operation, backend) for operation in dispatch.operations().values()):
        return "writes no operation"
    if not simulated(backend):
        return _unavailable(backend)
    if backend == "cuda":
        import cuda_on_cpu

        return cuda_on_cpu.missing()
    return triton_missing() or (None if INTERPRETED or build.compiler() else "no C++ compiler (g++ or $CXX)")


def triton_missing():
    """Why no kernel of Triton can be compiled or interpreted; None if one can."""
    return None if importlib.util.find_spec("triton") else "Triton is not installed"


def _written(operation, backend):
    return operation.backend(backend)[0] is not None


def _unavailable(backend):
    """What the backend's own modules say, the first reason of any of them."""
    modules = {m for o in dispatch.operations().values() if (m := o.backend(backend)[0])}
    answers = [module.available() for module in modules]
    return None if any(ok for ok, _ in answers) else answers[0][1]


@contextmanager
def _triton_simulated():
    from peftkern.ops import _triton

    if INTERPRETED:
        from interpreted import interpreted

        machine = interpreted()
    else:
        import ptxvm

        machine = ptxvm.triton_on_cpu(arch=80)
    before = _triton.SIMULATED
    with machine:
        _triton.SIMULATED = True
        try:
            yield
        finally:
            _triton.SIMULATED = before


@contextmanager
def running(backend):
    """Serve every operation by one backend, wherever it runs here.

    An operation that the backend does not write, or a call that it says it does not serve, goes to the reference,
    as it would for a user. Nothing falls back after a failure.
    """
    with ExitStack() as stack:
        stack.enter_context(dispatch.use_backend(backend))
        if backend in ("triton", "cuda"):
            stack.enter_context(_falling_back(backend))
            stack.enter_context(_place(backend))
        yield


def _place(backend):
    if not simulated(backend):
        return torch.device("cuda")
    if backend == "triton":
        return _triton_simulated()
    import cuda_on_cpu

    return cuda_on_cpu.cuda_on_cpu()


@contextmanager
def _falling_back(backend):
    def candidates(operation, device_type):
        chosen = dispatch._chosen_name
        return (backend, "reference") if chosen == backend else original(operation, device_type)

    original = dispatch.Operation.candidates
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch.Operation, "candidates", candidates)
        yield


class Served:
    """Which backend served which operation, and why others did not, since `clear`."""

    def __init__(self):
        self.operations = set()
        self.reasons = {}

    def clear(self):
        self.operations.clear()
        self.reasons.clear()

    @contextmanager
    def recording(self):
        def choose(operation, args):
            name, function = original(operation, args)
            self.operations.add((operation.name, name))
            if name != dispatch._chosen_name is not None:
                self.reasons[operation.name] = operation.explain(*args)[0][2]
            return name, function

        original = dispatch.Operation._choose
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dispatch.Operation, "_choose", choose)
            yield self


def on_default_device(value):
    """Tensors of a tuple moved to the device that tests run on; everything else as it is."""
    device = torch.get_default_device()
    return tuple(v.to(device) if isinstance(v, torch.Tensor) else v for v in value)
