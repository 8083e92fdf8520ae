"""Executes compiled PTX, from Triton and from nvcc, on CPU tensors: see README.md."""

from .counts import Counts
from .cuda import CudaLibrary
from .errors import (
    AsyncHazard,
    Deadlock,
    Divergence,
    Limit,
    Misaligned,
    OutOfBounds,
    PtxError,
    Race,
    Refused,
    Trap,
    Uninitialised,
)
from .host import HostLibrary
from .launch import Launch, Options, same_in_any_order
from .triton_cpu import TritonMachine, triton_on_cpu

__all__ = [
    "AsyncHazard", "Counts", "CudaLibrary", "Deadlock", "Divergence", "HostLibrary", "Launch", "Limit", "Misaligned",
    "Options", "OutOfBounds", "PtxError", "Race", "Refused", "Trap", "TritonMachine", "Uninitialised",
    "same_in_any_order", "triton_on_cpu",
]  # fmt: skip
