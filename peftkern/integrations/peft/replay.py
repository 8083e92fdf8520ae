"""verify: PEFT's own layers beside the accelerated ones on a user's batch, both judged against float64.

One forward and backward of the model records what every accelerated layer gets and what gradient its output receives;
then each layer is replayed by itself, three ways: PEFT's forward, peftkern's, and an oracle in float64 (oracles.py)
that shares no code with the package. Dropout of butterfly blocks is off in the replay.
"""

import contextlib
import math
import random
import time
import types
from dataclasses import dataclass, field

import numpy
import torch

from peftkern.integrations.peft import counters, oracles
from peftkern.integrations.peft.report import table

_TIMED_RUNS = 3


@dataclass
class Row:
    """One layer. Errors are relative, ||a - a64|| / ||a64||; a gradient's is the largest over the adapters.

    `note` says why a comparison is missing (PEFT fails, the batch does not reach the layer, ...).
    """

    name: str
    shape: tuple = ()
    output_error: float | None = None
    peft_output_error: float | None = None
    grad_error: float | None = None
    peft_grad_error: float | None = None
    seconds: float | None = None
    peft_seconds: float | None = None
    roundoff: float | None = None
    note: str = ""

    @property
    def ok(self):
        """Both errors at most twice PEFT's, or of the size of roundings; None without a comparison."""
        if self.output_error is None:
            return None
        pairs = ((self.output_error, self.peft_output_error), (self.grad_error, self.peft_grad_error))
        if not all(math.isfinite(ours) for ours, _ in pairs):
            return False
        if all(ours <= max(2 * (theirs or 0.0), self.roundoff) for ours, theirs in pairs):
            return True
        return None if self.peft_output_error is None else False


@dataclass
class Verification:
    """The result of `peftkern.verify`: `.rows`, and `.ok` if no layer is further from float64 than it may be."""

    rows: list = field(default_factory=list)

    @property
    def ok(self):
        return all(row.ok is not False for row in self.rows)

    def __str__(self):
        header = ("layer", "input", "output error", "PEFT's", "grad error", "PEFT's", "ms", "PEFT's", "faster", "")
        return table(header, [_cells(row) for row in self.rows])


def _cells(row):
    def number(value, form):
        return "-" if value is None else format(value, form)

    faster = None if row.seconds is None or row.peft_seconds is None else row.peft_seconds / row.seconds
    errors = (row.output_error, row.peft_output_error, row.grad_error, row.peft_grad_error)
    times = [None if seconds is None else 1e3 * seconds for seconds in (row.seconds, row.peft_seconds)]
    verdict = row.note or {True: "ok", False: "FURTHER FROM FLOAT64 THAN PEFT", None: ""}[row.ok]
    return (
        row.name or "(the model itself)",
        "x".join(map(str, row.shape)) or "-",
        *(number(error, ".1e") for error in errors),
        *(number(milliseconds, ".2f") for milliseconds in times),
        "-" if faster is None else f"{faster:.1f}x",
        verdict,
    )


@dataclass
class _Call:
    x: torch.Tensor
    args: tuple
    kwargs: dict
    output: torch.Tensor
    autocast: tuple
    grad: torch.Tensor | None = None


def verify(model, batch, show=True):
    """Run PEFT's own forward and backward beside peftkern's on one batch, layer by layer, against float64.

    Args:
        model: an accelerated model; its mode, parameters, gradients, buffers, random state and counters are left as
            they are.
        batch: what the model is called with: a mapping (keywords), a tuple or list (positions) or one argument. The
            gradient starts from the output's `loss`, else from a fixed random projection of its first float tensor.
        show: print the table.

    Returns:
        `Verification`: one row per accelerated layer with both errors of output and adapter gradients and both times of
        forward and backward.

    Raises:
        ValueError: nothing is accelerated, or an adapter parameter is not finite.
    """
    from peftkern.integrations.peft import methods, swap

    model = getattr(model, "_orig_mod", model)
    layers = methods.accelerated_layers(model)
    if not layers:
        raise ValueError("verify: the model has no accelerated layer; call peftkern.accelerate(model) first")
    swap.check_finite(layers)
    methods.warn(layers)
    with _left_as_it_is(model, layers), torch.inference_mode(False), torch.enable_grad():
        calls = _record(model, batch, layers)
        rows = [_replay(name, layer, calls.pop(name, None)) for name, layer in layers]
    result = Verification(rows)
    if show:
        print(result)
    return result


@contextlib.contextmanager
def _left_as_it_is(model, layers):
    # COFT projects its parameter in every forward, PEFT's and ours.
    adapters = [tensor for _, layer in layers for *_, tensor in layer.adapter_tensors()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in (*model.buffers(), *adapters)]
    counts, python_state, numpy_state = counters.snapshot(), random.getstate(), numpy.random.get_state()
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices)):
        try:
            yield
        finally:
            random.setstate(python_state)
            numpy.random.set_state(numpy_state)
            counters.restore(counts)
            with torch.no_grad():
                for buffer, before in buffers:
                    if not torch.equal(buffer, before):
                        buffer.copy_(before)


def _record(model, batch, layers):
    """name -> _Call of the first call of each layer that adapters serve, with the gradient of its output."""
    calls, handles = {}, []

    def hook_for(name):
        def hook(layer, args, kwargs, output):
            if name not in calls and layer._left_to_peft() is None and args:
                kind = args[0].device.type
                autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
                calls[name] = _Call(args[0].detach(), args[1:], kwargs, output, autocast)

        return hook

    try:
        for name, layer in layers:
            handles.append(layer.register_forward_hook(hook_for(name), with_kwargs=True))
        loss = _loss(_call(model, batch))
    finally:
        for handle in handles:
            handle.remove()
    reached = [call for call in calls.values() if call.output.requires_grad]
    grads = _gradients(loss, [call.output for call in reached])
    for call, grad in zip(reached, grads, strict=True):
        call.grad = grad
    for call in calls.values():
        call.output = call.output.detach()
        if call.grad is None or not bool(call.grad.any()):
            call.grad = _noise(call.output)
    return calls


def _call(model, batch):
    if hasattr(batch, "keys"):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def _loss(output):
    loss = output.get("loss") if hasattr(output, "get") else getattr(output, "loss", None)
    if loss is not None:
        return loss.mean()
    tensor = _first_float(output)
    if tensor is None:
        raise ValueError("verify: the model's output holds no float tensor to take a gradient from")
    return (tensor.float() * _noise(tensor.float())).mean()


def _first_float(output):
    if isinstance(output, torch.Tensor):
        return output if output.is_floating_point() else None
    values = output.values() if hasattr(output, "values") else output if isinstance(output, (tuple, list)) else ()
    return next((found for found in map(_first_float, values) if found is not None), None)


def _noise(like):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(like.shape, generator=generator).to(like.device, like.dtype)


def _gradients(loss, outputs):
    """Gradients of the recorded outputs; None where the model hides them (reentrant checkpointing)."""
    if not outputs or not loss.requires_grad:
        return [None] * len(outputs)
    try:
        return torch.autograd.grad(loss, outputs, allow_unused=True)
    except RuntimeError as error:
        if "heckpoint" not in str(error):
            raise
        return [None] * len(outputs)


def _replay(name, layer, call):
    if call is None:
        return Row(name, note=layer._left_to_peft() or "not reached by this batch")
    names = [name for name in layer.active_adapters if name in layer._adapters]
    if not names:
        return Row(name, note="no active adapter")
    parameters = [tensor for adapter, _, _, tensor in layer.adapter_tensors() if adapter in names]
    trainable = [u.requires_grad for u in parameters]
    training = layer.training
    try:
        for u in parameters:
            u.requires_grad_(True)
        layer.eval()
        y64, grads64 = oracles.run(layer, call, names, parameters)
        row = Row(name, tuple(call.x.shape), roundoff=_floor(call.output.dtype))
        ours, theirs = _arm(layer.forward, call, parameters), _arm(_peft_forward(layer), call, parameters)
        row.output_error, row.grad_error, row.seconds = _judge(ours, y64, grads64)
        try:
            row.peft_output_error, row.peft_grad_error, row.peft_seconds = _judge(theirs, y64, grads64)
        except Exception as error:
            row.note = f"PEFT fails: {type(error).__name__}: {str(error).splitlines()[0][:60]}"
            return row
        if row.seconds < 1.0 and row.peft_seconds < 1.0:
            for _ in range(_TIMED_RUNS):
                row.seconds = min(row.seconds, ours()[2])
                row.peft_seconds = min(row.peft_seconds, theirs()[2])
        return row
    finally:
        for u, flag in zip(parameters, trainable, strict=True):
            u.requires_grad_(flag)
        layer.train(training)


def _floor(dtype):
    """An error that no arm is blamed for: one rounding of the output, a few of the sums behind it.

    The oracle's own sums are no more exact than those of a float64 model.
    """
    return 1e-12 if dtype is torch.float64 else max(torch.finfo(dtype).eps / 2, 4 * torch.finfo(torch.float32).eps)


def _judge(arm, y64, grads64):
    y, grads, seconds = arm()
    return _error(y, y64), max(_error(g, g64) for g, g64 in zip(grads, grads64, strict=True)), seconds


def _arm(forward, call, parameters):
    """A function that runs forward and backward once: (output, adapter gradients, seconds)."""
    device = call.x.device

    def run():
        x = call.x.detach().requires_grad_(call.x.is_floating_point())
        _synchronise(device)
        start = time.perf_counter()
        with torch.autocast(call.autocast[0], dtype=call.autocast[1], enabled=call.autocast[2]):
            y = forward(x, *call.args, **call.kwargs)
        wanted = [x, *parameters] if x.requires_grad else parameters
        grads = torch.autograd.grad(y, wanted, call.grad.to(y.dtype))
        _synchronise(device)
        return y.detach(), grads[-len(parameters) :], time.perf_counter() - start

    return run


def _synchronise(device):
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _peft_forward(layer):
    """PEFT's forward, with PEFT's matrix of the rotation, on an accelerated layer."""

    def forward(*args, **kwargs):
        layer.get_delta_weight = types.MethodType(layer._peft_class.get_delta_weight, layer)
        try:
            return layer._peft_class.forward(layer, *args, **kwargs)
        finally:
            del layer.get_delta_weight

    return forward


def _error(value, exact):
    difference, norm = torch.linalg.vector_norm(value.double() - exact), torch.linalg.vector_norm(exact)
    return float(difference / norm if norm > 0 else difference)
