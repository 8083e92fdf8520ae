"""The launches of a layer, from what each operation of the package and torch's library move and compute."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from bench.cases import Case
from peftkern import dispatch
from peftkern.ops._costs import Launch
from peftkern.ops.block_rotation.autograd import rotates_weight

LIBRARY = "library: "
PRECISIONS = ("fast", "exact")
PRODUCTS = ("x W^T", "dy W")
_OPS = "peftkern.ops."


class NoCosts(Exception):
    """A backend whose costs are not stated; the message says which."""


def product_kind(dtype: torch.dtype) -> str:
    """Unit that multiplies matrices of a dtype in torch's library by default (float32 without TF32)."""
    return {torch.bfloat16: "tensor_bf16", torch.float16: "tensor_fp16", torch.float32: "fp32"}[dtype]


def product(M: int, N: int, K: int, dtype: torch.dtype, name: str = "product") -> Launch:
    """[M, K] x [K, N] by the vendor's library. How it tiles is its own affair: each operand counts once."""
    read, written = (M * K + K * N) * dtype.itemsize, M * N * dtype.itemsize
    return Launch(LIBRARY + name, read, written, read + written, {product_kind(dtype): 2 * M * N * K})


def elementwise(name: str, read: int, written: int) -> Launch:
    return Launch(LIBRARY + name, read, written, read + written)


def frozen(case: Case) -> list[Launch]:
    """The floor: y = x W^T and dx = dy W."""
    M, N, K = case.tokens, case.width_out, case.width_in
    return [product(M, N, K, case.base_dtype, PRODUCTS[0]), product(M, K, N, case.base_dtype, PRODUCTS[1])]


# ---- what the package states of an operation


@functools.cache
def _costs(family: str):
    name = f"{family}.costs"
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


def _columns(case: Case) -> dict[str, int]:
    return {"r": case.r}


def _blocks(case: Case) -> dict[str, int]:
    return {"b": case.r, "f": case.factors}


# How the costs of a family name the sizes of an adapter.
SIZES: dict[str, Callable[[Case], dict[str, int]]] = {
    _OPS + "householder": _columns,
    _OPS + "gram_schmidt": _columns,
    _OPS + "block_rotation": _blocks,
    _OPS + "butterfly": _blocks,
}


def launches_of(op: str, backend: str, case: Case, family: str) -> list[Launch]:
    """The launches of an operation at the shape of a case. Raises NoCosts."""
    operation = dispatch.operations().get(op)
    if operation is None:
        raise NoCosts(f"there is no operation {op}")
    costs = _costs(operation.family)
    if costs is None:
        raise NoCosts(f"{operation.family} states no costs")
    shape = {"M": case.tokens, "K": case.width_in, "N": case.width_out, **SIZES[operation.family](case)}
    try:
        return costs.launches(op, backend, **shape, dtype=case.base_dtype, family=family)
    except NotImplementedError as reason:
        raise NoCosts(str(reason) or f"{backend} does not write {op}") from None


# ---- what a layer consists of


@dataclass(frozen=True)
class Kind:
    """A kind of layer.

    factor: operations that make what rotates the rows from the parameters, and their gradients. rows: by precision, the
    operations on rows, and the frozen layer's products where no operation contains them. parameters: what is trained,
    by name, in numbers. shared: numbers of what two operations of the forward take, whose gradients are added. scales:
    the output is multiplied by a trained scale. by_weight: `rows` of "fast" where it rotates the weight, no bias behind
    it; the first of them meets the rows of the weight.
    """

    factor: tuple[str, str]
    rows: dict[str, tuple[str, ...]]
    parameters: Callable[[Case], dict[str, int]]
    shared: Callable[[Case], dict[str, int]] = lambda case: {}
    scales: bool = False
    by_weight: tuple[str, ...] = ()


def _u(case: Case) -> dict[str, int]:
    return {"u": case.width_in * case.r}


def _V(case: Case) -> dict[str, int]:
    return {"V": case.width_in * case.r}


def _q(case: Case) -> dict[str, int]:
    return {"q": case.width_in * (case.r - 1) // 2}


def _butterfly(case: Case) -> dict[str, int]:
    return {"boft_R": case.factors * case.width_in * case.r, "boft_s": case.width_out}


_HRA_ROWS = {
    "fast": ("rotate", *PRODUCTS, "rotate_backward"),
    "exact": ("rotated_linear", "rotated_linear_backward"),
}
KINDS = {
    # V has two consumers, the rows and the factor.
    "linear": Kind(("wy_factor", "wy_factor_backward"), _HRA_ROWS, _u, _V),
    "gram_schmidt": Kind(("orthonormal_factor", "orthonormal_factor_backward"), _HRA_ROWS, _u, _V),
    "oft": Kind(
        ("skew_polynomial", "skew_polynomial_backward"),
        {
            "fast": ("block_rotate", PRODUCTS[0], "block_rotated_linear_backward"),
            "exact": ("block_rotated_linear", "block_rotated_linear_backward"),
        },
        _q,
        by_weight=("block_rotate", PRODUCTS[0], "block_rotated_linear_backward"),
    ),
    "boft": Kind(
        ("dense_cayley", "dense_cayley_backward"),
        {
            "fast": ("butterfly_rotate", PRODUCTS[0], "scale_outputs", "butterfly_rotated_linear_backward"),
            "exact": ("butterfly_rotated_linear", "butterfly_rotated_linear_backward"),
        },
        _butterfly,
        scales=True,
        by_weight=("butterfly_rotate_weight", PRODUCTS[0], "butterfly_rotated_linear_backward"),
    ),
}


def by_weight(case: Case, precision: str) -> bool:
    """Whether a layer rotates the rows of its weight, as the package chooses."""
    return precision == "fast" and bool(KINDS[case.kind].by_weight) and rotates_weight(case.tokens, case.width_out)


def _autograd(case: Case, kind: Kind, folded: bool) -> list[Launch]:
    """What autograd and the layer add: sums of gradients, parameters in half precision cast both ways, and a scale that
    is folded into the weight kept away from 0, which its gradient is divided by."""
    glue = [elementwise(f"d{name} + d{name}", 8 * size, 4 * size) for name, size in kind.shared(case).items()]
    if case.adapter_dtype is not torch.float32:
        for name, size in kind.parameters(case).items():
            glue.append(elementwise(f"{name} to float32", 2 * size, 4 * size))
            glue.append(elementwise(f"d{name} to {name}'s dtype", 4 * size, 2 * size))
    if folded:
        size = 4 * case.width_out
        glue += [elementwise(f"scale: {step}", size, size) for step in ("abs", "clamp", "copysign")]
        glue.append(elementwise("dscale / scale", 2 * size, size))
    return glue


def layer(case: Case, backend: str, precision: str, family: str) -> dict[str, list[Launch]]:
    """Launches of one layer's forward and backward, by operation. Raises NoCosts."""
    if precision == "exact" and not case.half:
        raise NoCosts("in fp32 exact is fast")
    kind, of_weight = KINDS[case.kind], by_weight(case, precision)
    products = {name: [launch] for name, launch in zip(PRODUCTS, frozen(case), strict=True)}
    rows = kind.by_weight if of_weight else kind.rows[precision]
    parts = {}
    for name in (kind.factor[0], *rows, kind.factor[1]):
        met = replace(case, tokens=case.width_out) if of_weight and name == rows[0] else case
        parts[name] = products[name] if name in products else launches_of(name, backend, met, family)
    parts["autograd"] = _autograd(case, kind, of_weight and kind.scales)
    return parts


def fewest_passes(case: Case, reads_weight: bool = False) -> list[Launch]:
    """The least of any form that calls the frozen layer as it is: x read and z written, then dz and x read and dx
    written, each once; and the same of y, dy and y where the output is scaled after it. A form that reads the weight
    has in the forward one pass over that instead."""

    def passes(name: str, rows: int, forward: int) -> list[Launch]:
        backward = Launch(f"{name}, backward", 2 * rows, rows, 3 * rows)
        return [Launch(name, forward, forward, 2 * forward), backward] if forward else [backward]

    size, columns = case.base_dtype.itemsize, case.width_in
    rows = size * case.tokens
    rotation = passes("rotation", rows * columns, columns * (size * case.width_out if reads_weight else rows))
    scaled = rows * case.width_out if KINDS[case.kind].scales else 0
    scale = passes("scale", scaled, 0 if reads_weight else scaled) if scaled else []
    return [*rotation, *scale, *frozen(case)]
