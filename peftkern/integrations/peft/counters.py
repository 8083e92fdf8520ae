"""How often the accelerated layers served a call themselves, and how often and why they left it to PEFT."""

from collections import Counter

import torch

METHODS = ("hra", "oft", "boft")


def _empty():
    return {method: {"accelerated": 0, "to_peft": 0, "reasons": Counter()} for method in METHODS}


_counts = _empty()


@torch.compiler.assume_constant_result
def count(method, reason=None):
    """Count one call of a layer: served here, or left to PEFT for the reason given (a string).

    The compiler calls it while it traces and puts the result into the graph as a constant: no break in the graph, and
    no guard on the counter, which would recompile every call.
    """
    entry = _counts[method]
    if reason is None:
        entry["accelerated"] += 1
    else:
        entry["to_peft"] += 1
        entry["reasons"][reason] += 1


def stats(reset=False):
    """Calls of accelerated layers in this process since the start or the last reset.

    Args:
        reset: set the counts to zero after reading them.

    Returns:
        {"hra": {"accelerated": int, "to_peft": int, "reasons": Counter of str}, "oft": ..., "boft": ...}. A compiled
        layer counts once per trace, not once per call.
    """
    result = snapshot()
    if reset:
        restore(_empty())
    return result


def snapshot():
    return {method: {**entry, "reasons": Counter(entry["reasons"])} for method, entry in _counts.items()}


def restore(counts):
    _counts.update(counts)
