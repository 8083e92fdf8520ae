"""Thin layers over `peftkern.ops`, one file per method, with PEFT's parameter names."""

from peftkern.nn.checkpoint import load_adapters, save_adapters
from peftkern.nn.hra import HRAConv2d, HRALinear
from peftkern.nn.wrap import wrap

__all__ = ["HRAConv2d", "HRALinear", "load_adapters", "save_adapters", "wrap"]
