"""Loads the native libraries, each once, at the first call that needs it; never fails at import.

`PEFTKERN_CPU_ISA` = portable, avx2, avx512 or amx, read when the library is loaded, caps the instruction set: for
tests, and for a processor whose wide vectors do not pay.
"""

import functools
import importlib
import os

from peftkern import _versions


@functools.cache
def cpu():
    """`(library, level, reason)`: the module and the level of instruction set to use, or None, None and why not."""
    try:
        library = importlib.import_module("peftkern._native_cpu")
    except ImportError as error:
        info = _versions.build_info().get("cpu", {})
        return None, None, info.get("reason") or f"the CPU library does not load: {error}"
    names = library.level_names()
    wanted = os.environ.get("PEFTKERN_CPU_ISA") or names[library.best_level()]
    if wanted not in names:
        return None, None, f"PEFTKERN_CPU_ISA must be one of {', '.join(names)}; got {wanted!r}"
    return library, min(names.index(wanted), library.best_level()), None


@functools.cache
def cuda():
    """`(library, reason)`: the module, or None and why not. It loads without a GPU as well; a launch then fails."""
    try:
        return importlib.import_module("peftkern._native_cuda"), None
    except ImportError as error:
        info = _versions.build_info().get("cuda", {})
        return None, info.get("reason") or f"the CUDA library does not load: {error}"


def cpu_isa():
    """Name of the instruction set in use, or None without a library."""
    library, level, _ = cpu()
    return None if library is None else library.level_names()[level]
