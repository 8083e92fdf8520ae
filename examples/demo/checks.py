"""What the two runs must agree on, as plain numbers; finetune.py exits with 1 where a check fails."""

import math
from dataclasses import dataclass

# The window in which the curves must agree, and how closely (relative to PEFT's loss). Rounding differs between two
# implementations of one formula, and training amplifies the difference from step to step. Below fp32 PEFT rounds
# where peftkern does not: those curves are shown, not judged.
WINDOW = 50
TOLERANCE = {"float32": 1e-4, "float64": 1e-9}


@dataclass
class Score:
    """On held-out text: `correct` of `total` sentences, or the summed `loss` over `total` tokens."""

    total: int
    correct: int | None = None
    loss: float | None = None

    @property
    def value(self):
        """Accuracy, or perplexity."""
        return self.correct / self.total if self.loss is None else math.exp(self.loss / self.total)

    def __str__(self):
        return f"{self.value:.1%}" if self.loss is None else f"{self.value:.3f}"


@dataclass
class Check:
    passed: bool | None  # None: shown, not judged
    text: str


def gaps(losses, others):
    """Relative differences of two loss curves, step by step."""
    return [abs(a - b) / max(abs(a), 1e-30) for a, b in zip(losses, others, strict=True)]


def curves_agree(losses, others, dtype):
    """Check that two loss curves agree within TOLERANCE over the first WINDOW steps; the later gap is only told."""
    differences = gaps(losses, others)
    first, later = differences[:WINDOW], differences[WINDOW:]
    tolerance = TOLERANCE.get(dtype)
    text = f"loss curves agree to {max(first):.1e} over {len(first)} steps"
    text += f" (allowed {tolerance:.0e})" if tolerance else f" (not judged in {dtype})"
    if later:
        text += f", to {max(later):.1e} later"
    # Not `max(first) > tolerance`: a NaN must fail.
    return Check(all(d <= tolerance for d in first) if tolerance else None, text)


def reload_agrees(trained, reloaded, dtype):
    """Check that plain PEFT, with the saved adapter loaded, scores what the accelerated model scored."""
    if trained.loss is None:
        text = f"saved adapter in plain PEFT: {reloaded.correct} of {reloaded.total} right"
        text += f", accelerated {trained.correct}"
        passed = trained.correct == reloaded.correct
    else:
        difference = abs(trained.value - reloaded.value) / trained.value
        text = f"saved adapter in plain PEFT: perplexity {reloaded}, accelerated {trained}"
        passed = difference <= TOLERANCE.get("float32")
    return Check(passed if dtype in TOLERANCE else None, text)
