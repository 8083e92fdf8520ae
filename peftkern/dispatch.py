"""Which backend serves an operation, and why.

An `Operation` is one entry of `torch.ops.peftkern`: schema, fake and argument check in one place, and one function per
backend that implements it. Each backend answers `(ok, reason)` once per kind of call (device, dtypes, limits); the
answer is kept, so the hot path is one dictionary look-up and reads no environment, file or lock.

`PEFTKERN_BACKEND` (read at import) or `with use_backend("cpu")` names the backend; a named backend that cannot serve
raises with its reason, an automatic choice takes the next one. `PEFTKERN_DISABLE=1` leaves only the reference backend.
"""

import contextlib
import importlib
import importlib.util
import os
import types
import warnings

import torch

LIBRARY = torch.library.Library("peftkern", "DEF")

# In the order of preference. A device type that is not listed gets the reference backend.
PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference"), "xpu": ("triton", "reference")}
BACKENDS = ("reference", "cpu", "triton", "cuda")

DISABLED = os.environ.get("PEFTKERN_DISABLE", "0") not in ("", "0")

_operations = {}
_chosen_name = None

# Every operation by its name, to be called past torch's dispatcher; unchecked: `Operation.unchecked`.
direct, unchecked = types.SimpleNamespace(), types.SimpleNamespace()

_TENSORS = {torch.Tensor, torch.nn.Parameter}
_VALUES = {type(None), bool, int, float, list, tuple}
_has_storage = torch._C._has_storage  # vmap's tensors have none


def _valid_backend(name):
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {name!r}")
    return name


def _contiguous(function):
    """The formulas of the reference backend return views of any stride; an operation promises what its fake does."""

    def run(*args):
        result = function(*args)
        return tuple(t.contiguous() for t in result) if isinstance(result, tuple) else result.contiguous()

    return run


class Operation:
    """One operation of `torch.ops.peftkern`.

    Args:
        schema: torch schema without the namespace, e.g. `"wy_factor(Tensor V) -> Tensor"`.
        family: package that holds the backends, e.g. `"peftkern.ops.householder"`: `reference.py`, `cpu_backend.py`,
            `triton_backend.py`, `cuda_backend.py`, each with a function named like the operation. A native backend
            also has `supports(name, *args) -> (ok, reason)`.
        check: called with the arguments, fake or real; raises ValueError or TypeError with one sentence.
        fake: returns empty outputs of the right shapes, dtypes and devices.
        key: what the choice of a backend may depend on, beyond the device; a hashable made of the arguments.
    """

    def __init__(self, schema, family, check, fake, key):
        self.name = schema.split("(", 1)[0]
        self.schema, self.family, self.check, self.fake, self.key = schema, family, check, fake, key
        self._serving = {}
        self._broken = {}
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(self.name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"peftkern::{self.name}", self._run_fake, lib=LIBRARY)
        self._registered = getattr(torch.ops.peftkern, self.name).default
        _operations[self.name] = self
        setattr(direct, self.name, self)
        setattr(unchecked, self.name, self.unchecked)

    def __repr__(self):
        return f"<peftkern operation {self.schema}>"

    def __call__(self, *args):
        """`torch.ops.peftkern.<name>(*args)`, past torch's dispatcher where nobody has to see the call."""
        if _dispatcher_matters(args):
            return self._registered(*args)
        return self._run(*args)

    def unchecked(self, *args):
        """The same for arguments whose shapes and dtypes another operation or autograd has seen to."""
        if _dispatcher_matters(args):
            return self._registered(*args)
        return self._serve(args)

    def _run_fake(self, *args):
        self.check(*args)
        return self.fake(*args)

    def _run(self, *args):
        self.check(*args)
        return self._serve(args)

    def _serve(self, args):
        device_type = args[0].device.type
        serve = self._serving.get((device_type, self.key(*args))) or self._first_run
        if torch.is_autocast_enabled(device_type):
            with torch._C._DisableAutocast():
                return serve(*args)
        return serve(*args)

    def serving(self, kind):
        """The function that serves a kind of call, (device type, key), or None before the first of its kind."""
        return self._serving.get(kind)

    def _first_run(self, *args):
        """Choose a backend for this kind of call; one that fails at its first use is left, once, aloud."""
        while True:
            name, function = self._choose(args)
            try:
                result = function(*args)
            except (ValueError, TypeError):
                raise
            except Exception as error:
                if name == "reference" or name == _chosen_name:
                    raise
                self._broken[name] = f"failed at its first use ({type(error).__name__}: {error})"
                warnings.warn(f"peftkern: backend {name} of {self.name} {self._broken[name]}; using the next one")
                continue
            self._serving[(args[0].device.type, self.key(*args))] = function
            return result

    def _choose(self, args):
        reasons = []
        for name, ok, reason in self.explain(*args):
            if ok:
                function = getattr(self.backend(name)[0], self.name)
                return name, _contiguous(function) if name == "reference" else function
            reasons.append(f"{name}: {reason}")
        raise RuntimeError(f"no backend serves {self.name} here ({'; '.join(reasons)})")

    def backend(self, name):
        """The module of a backend and None, or None and the reason why there is none."""
        if name in self._broken:
            return None, self._broken[name]
        module = f"{self.family}.{'reference' if name == 'reference' else name + '_backend'}"
        if importlib.util.find_spec(module) is None:
            return None, "not written for this operation"
        module = importlib.import_module(module)
        return (module, None) if hasattr(module, self.name) else (None, "not written for this operation")

    def candidates(self, device_type):
        if _chosen_name is not None:
            return (_chosen_name,)
        return ("reference",) if DISABLED else PREFERENCE.get(device_type, ("reference",))

    def explain(self, *args):
        """`[(backend, ok, reason)]` for this call, in the order of preference; the first that is ok serves."""
        rows = []
        for name in self.candidates(args[0].device.type):
            module, reason = self.backend(name)
            ok = module is not None
            if ok and name != "reference":
                ok, reason = module.supports(self.name, *args)
            rows.append((name, ok, reason or "serves"))
        return rows

    def explain_static(self, device_type):
        """Like `explain`, without arguments: what can be said of a device type before there is a tensor."""
        rows = []
        for name in self.candidates(device_type):
            module, reason = self.backend(name)
            ok = module is not None
            if ok and name != "reference":
                ok, reason = module.available()
            rows.append((name, ok, reason or "serves"))
        return rows


def _dispatcher_matters(args):
    """Whether a compiler, a mode, a transform, a profiler or a kind of tensor works through torch's dispatcher."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return True
    if torch._C._are_functorch_transforms_active() or torch.autograd._profiler_enabled():
        return True
    for a in args:
        kind = type(a)
        if kind in _TENSORS:
            if a.is_neg() or a.is_meta or not _has_storage(a):
                return True
        elif kind not in _VALUES:
            return True
    return False


def operations():
    """Name to `Operation`, for every operation of the package."""
    importlib.import_module("peftkern.ops")
    return dict(_operations)


def explain(name, *args):
    """Say in words which backend serves `torch.ops.peftkern.<name>(*args)` and why the others do not.

    Without arguments the answer covers what is known before a call: installed libraries and devices.
    """
    known = operations()
    if name not in known:
        raise ValueError(f"name must be one of {', '.join(sorted(known))}; got {name!r}")
    rows = known[name].explain(*args) if args else known[name].explain_static("cpu")
    serving = next((backend for backend, ok, _ in rows if ok), None)
    lines = [f"{name}: {serving} serves" if serving else f"{name}: nothing serves"]
    lines += [f"  {backend}: {reason}" for backend, ok, reason in rows if not ok]
    return "\n".join(lines)


def _set_backend(name):
    global _chosen_name
    _chosen_name = name
    for operation in _operations.values():
        operation._serving.clear()


@contextlib.contextmanager
def use_backend(name):
    """Serve every operation by the named backend inside the block: one of reference, cpu, triton, cuda.

    Process-wide, like a torch backend flag. Raises ValueError for an unknown name; an operation that the backend
    cannot serve raises RuntimeError with the reason when it is called.
    """
    previous = _chosen_name
    _set_backend(_valid_backend(name))
    try:
        yield
    finally:
        _set_backend(previous)


if os.environ.get("PEFTKERN_BACKEND"):
    _chosen_name = _valid_backend(os.environ["PEFTKERN_BACKEND"])
