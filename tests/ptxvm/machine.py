"""The compiled machine: its library, its handlers, and the layouts and numbers shared with engine/vm.h."""

from __future__ import annotations

import ctypes
from functools import cache

import numpy as np

from . import build

NO_REG = 0xFFFFFFFF

# Same layouts as in engine/vm.h.
OP = np.dtype(
    [("handler", "u4"), ("guard", "u4"), ("guard_negated", "u4"), ("flags", "u4")]
    + [("a", "u4", 16), ("imm", "i8", 2), ("n", "u4"), ("shape", "u4")],
    align=True,
)
GLOBAL, SHARED, LOCAL, PARAM, GENERIC = range(5)
ADDRESS_32 = 8
SHARED_WINDOW, LOCAL_WINDOW, PARAM_WINDOW = 1 << 56, 1 << 57, 1 << 58
_FLAG_NAMES = (
    "FTZ", "SAT", "RZ", "RM", "RP", "RELU", "NAN_WINS", "XORSIGN", "RNA", "SATFINITE", "CC_IN", "CC_OUT",
    "ACQUIRE", "RELEASE", "STRONG", "READ_ONLY", "RNI", "TRANS", "NO_RETURN", "TO_INTEGRAL",
)  # fmt: skip
FLAGS = {name: 1 << bit for bit, name in enumerate(_FLAG_NAMES)}
_SPECIAL_NAMES = (
    "%tid.x", "%tid.y", "%tid.z", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%ntid.x", "%ntid.y", "%ntid.z", "%nctaid.x",
    "%nctaid.y", "%nctaid.z", "%laneid", "%warpid", "%nwarpid", "%lanemask_lt", "%lanemask_le", "%lanemask_eq",
    "%lanemask_ge", "%lanemask_gt", "%dynamic_smem_size", "%total_smem_size",
)  # fmt: skip
SPECIALS = {name: k for k, name in enumerate(_SPECIAL_NAMES)}


@cache
def library() -> ctypes.CDLL:
    """The machine, loaded."""
    lib = ctypes.CDLL(str(build.engine()))
    lib.ptxvm_handlers.restype = ctypes.c_char_p
    return lib


@cache
def handlers() -> dict[str, int]:
    """Index of each handler of the machine, by name."""
    return {name: i for i, name in enumerate(library().ptxvm_handlers().decode().split())}
