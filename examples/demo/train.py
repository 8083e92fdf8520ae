"""The training loop that both arms share, and what is measured of it."""

import resource
import statistics
import sys
import time
from dataclasses import dataclass, field

import torch

UNTIMED = 3


@dataclass
class Curve:
    """One entry per step: the loss before it, and the seconds that forward, backward and optimizer took."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def step_time(self):
        """Median seconds of a step, without the first few."""
        return statistics.median(self.seconds[UNTIMED:] or self.seconds)


def optimizer_of(task, model):
    return torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=task.lr, eps=task.eps, weight_decay=0.0
    )


def schedule(step, steps):
    """Factor of the learning rate: up over the first tenth, then down to zero in a straight line."""
    warmup = max(1, steps // 10)
    return min((step + 1) / warmup, (steps - step) / (steps - warmup + 1))


def to_device(batch, device):
    return {name: tensor.to(device) for name, tensor in batch.items()}


def timed_step(task, model, optimizer, batch):
    """(loss, seconds) of one training step."""
    device = next(model.parameters()).device
    batch = to_device(batch, device)
    synchronize(device)
    start = time.perf_counter()
    loss = task.loss(model, batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    synchronize(device)
    return loss.item(), time.perf_counter() - start


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def train(task, model, batches, on_step=lambda step, loss, seconds: None):
    """Train one step per batch and return the Curve; `on_step(step, loss, seconds)` is called after each."""
    optimizer = optimizer_of(task, model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, len(batches)))
    curve = Curve()
    model.train()
    for step, batch in enumerate(batches):
        loss, seconds = timed_step(task, model, optimizer, batch)
        scheduler.step()
        curve.losses.append(loss)
        curve.seconds.append(seconds)
        on_step(step, loss, seconds)
    return curve


@torch.no_grad()
def score(task, model, batches):
    """The task's Score of the model on held-out batches."""
    device = next(model.parameters()).device
    model.eval()
    return task.score(model, [to_device(batch, device) for batch in batches])


def saved_bytes(task, model, batch):
    """Bytes that autograd keeps for the backward pass of one batch: every storage once, parameters not counted."""
    batch = to_device(batch, next(model.parameters()).device)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # The graph stays alive until the loss is dropped, so that no address is handed out twice.
        loss = task.loss(model, batch)
    del loss
    return sum(storages.values())


def alternate(task, models, batches):
    """Median seconds of a training step of each model, the models taking turns on every batch.

    Neighbouring steps see the same machine, so the ratio of these is fair where the machine is not quiet.
    """
    optimizers = [optimizer_of(task, model.train()) for model in models]
    times = [[] for _ in models]
    for batch in batches:
        for model, optimizer, seconds in zip(models, optimizers, times, strict=True):
            seconds.append(timed_step(task, model, optimizer, batch)[1])
    return [statistics.median(seconds[1:] or seconds) for seconds in times]


def peak_memory(device):
    """Most bytes this process has held at once: resident memory on a CPU, torch's allocations on a GPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
