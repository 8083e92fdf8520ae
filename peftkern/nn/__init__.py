"""Thin layers over `peftkern.ops`, one file per method, with PEFT's parameter names."""

from peftkern.nn.boft import BOFTConv2d, BOFTLinear
from peftkern.nn.checkpoint import load_adapters, save_adapters
from peftkern.nn.hra import HRAConv2d, HRALinear
from peftkern.nn.oft import OFTConv2d, OFTEmbedding, OFTLinear
from peftkern.nn.wrap import wrap

__all__ = [
    "BOFTConv2d",
    "BOFTLinear",
    "HRAConv2d",
    "HRALinear",
    "OFTConv2d",
    "OFTEmbedding",
    "OFTLinear",
    "load_adapters",
    "save_adapters",
    "wrap",
]
