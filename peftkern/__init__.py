"""Fast, exact kernels for parameter-efficient fine-tuning.

`peftkern.accelerate(model)` speeds up a Hugging Face PEFT model in place; `peftkern.nn` has the layers without PEFT;
`peftkern.rotate` and its neighbours are the functions underneath. Importing the package compiles nothing and touches
no device. `python -m peftkern` prints what is built and which backend would serve.
"""

import importlib

from peftkern._versions import __version__
from peftkern.dispatch import explain, operations, use_backend
from peftkern.ops.block_rotation import oft_linear
from peftkern.ops.butterfly import boft_linear
from peftkern.ops.householder import hra_linear, low_rank_form, orthogonality_penalty, rotate

__all__ = [
    "__version__",
    "accelerate",
    "boft_linear",
    "explain",
    "hra_linear",
    "low_rank_form",
    "nn",
    "oft_linear",
    "operations",
    "orthogonality_penalty",
    "patch_peft",
    "restore",
    "rotate",
    "stats",
    "unpatch_peft",
    "use_backend",
    "verify",
]

# PEFT is imported at the first use of one of these, never before.
_PEFT_FUNCTIONS = ("accelerate", "patch_peft", "restore", "stats", "unpatch_peft", "verify")


def __getattr__(name):
    if name in _PEFT_FUNCTIONS:
        return getattr(importlib.import_module("peftkern.integrations.peft"), name)
    if name == "nn":
        return importlib.import_module("peftkern.nn")
    raise AttributeError(f"module 'peftkern' has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__})
