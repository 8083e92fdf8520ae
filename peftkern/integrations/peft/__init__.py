"""Hugging Face PEFT models served by peftkern: see README.md in this folder for what stays PEFT's and what differs."""

try:
    import peft  # noqa: F401
except ImportError as error:
    raise ImportError("accelerating PEFT models needs PEFT: pip install 'peftkern[peft]'") from error

from peftkern.integrations.peft.counters import stats
from peftkern.integrations.peft.replay import verify
from peftkern.integrations.peft.swap import accelerate, patch_peft, restore, unpatch_peft

__all__ = ["accelerate", "patch_peft", "restore", "stats", "unpatch_peft", "verify"]
