"""What the child processes of finetune.py do: one training run each, then the comparison of the two."""

import warnings
from dataclasses import asdict

import torch
import transformers
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from . import data, models, report, train


def prepared(options):
    """(task, device) for the command line's options, libraries told to leave the terminal alone."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="peft|transformers")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with report.busy("loading data and model"):
        return models.TASKS[options.model](options.cache), device


def build(task, options, device, arm):
    """(model, line to print): the arm's model with fresh adapters. The two arms differ in this one call."""
    model = models.adapted(task, options.method, options.rank, getattr(torch, options.dtype), options.seed, device)
    layers = sum(isinstance(module, BaseTunerLayer) for module in model.modules())
    if arm == "peft":
        return model, f"{layers} layers as PEFT has them"

    import peftkern

    accelerated = peftkern.accelerate(model)
    if not accelerated.replaced:
        raise data.DemoError(f"peftkern.accelerate took none of the layers: {accelerated}")
    reasons = sorted({reason for _, reason in accelerated.skipped})
    return model, f"{len(accelerated.replaced)} of {layers} layers accelerated" + "".join(f"; {r}" for r in reasons)


def run_arm(arm, options):
    """Train, measure, score and save one arm; returns a dict for JSON."""
    task, device = prepared(options)
    steps = options.steps or task.steps
    model, line = build(task, options, device, arm)
    trainable, total = model.get_nb_trainable_parameters()
    if arm in ("peft", options.arms):
        report.opening(task, options, steps, device, trainable, total)
    report.heading(arm, line)
    held_out = task.held_out_batches()
    before = None if task.measure == "held-out accuracy" else train.score(task, model, held_out)

    batches = task.batches(steps, options.seed)
    with report.progress(arm, steps) as on_step:
        curve = train.train(task, model, batches, on_step)
    peak = train.peak_memory(device)
    with report.busy("scoring held-out text"):
        score = train.score(task, model, held_out)
    model.save_pretrained(options.out / f"adapter-{arm}")
    return {
        "title": task.title,
        "measure": task.measure,
        "losses": curve.losses,
        "seconds": curve.seconds,
        "step_seconds": curve.step_time(),
        "train_seconds": sum(curve.seconds),
        "peak_bytes": peak,
        "saved_bytes": train.saved_bytes(task, model, batches[0]),
        "trainable": trainable,
        "score_before": before and asdict(before),
        "score": asdict(score),
    }


def compare(options):
    """Score the accelerated arm's adapter in plain PEFT; where both arms ran, time them step by step in turns."""
    task, device = prepared(options)
    with report.busy("reloading the saved adapter in plain PEFT"):
        plain = PeftModel.from_pretrained(
            task.load(getattr(torch, options.dtype)).to(device), options.out / "adapter-peftkern"
        )
        found = {"reloaded": asdict(train.score(task, plain, task.held_out_batches()))}
    del plain
    if options.arms == "both":
        with report.busy(f"timing {task.turns} steps of each, taking turns"):
            arms = [build(task, options, device, arm)[0] for arm in ("peft", "peftkern")]
            batches = task.batches(task.turns, options.seed + 1)
            found["alternating"] = dict(zip(("peft", "peftkern"), train.alternate(task, arms, batches), strict=True))
    return found
