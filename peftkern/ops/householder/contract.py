"""Contracts of the `householder` operations: schema, argument check and fake, one place each.

Shapes: x [..., K], M = numel(x) / K rows; V [K, r]; T [r, r] float64; weight [N, K]. V is float32,
or float64 when x is. For half-precision x, B [N, r] = W Vp, the product with V's columns in pairs (README.md, eq. 9);
[0, r] in float32 and float64, and where the gradients of V and T are to come from the rounded dz = dy W.
"""

import torch

from peftkern.dispatch import Operation
from peftkern.ops import _checks

FAMILY = "peftkern.ops.householder"


def _check_factor(op, V, T=None):
    _checks.floating(op, "V", V, _checks.WORKING)
    if V.dim() != 2 or V.shape[1] < 1 or V.shape[0] < 1:
        raise ValueError(f"{op}: V must have shape [K, r] with K >= 1 and r >= 1; got {_checks.describe(V)}")
    if T is not None and (T.dtype is not torch.float64 or T.shape != (V.shape[1], V.shape[1])):
        raise ValueError(f"{op}: T must be float64 of shape {[V.shape[1]] * 2}; got {_checks.describe(T)}")


def _check_rows(op, x, V, name="x"):
    _checks.floating(op, name, x)
    if x.dim() < 1 or x.shape[-1] != V.shape[0]:
        raise ValueError(f"{op}: {name} must have K = {V.shape[0]} columns like V; got {_checks.describe(x)}")
    if (x.dtype is torch.float64) != (V.dtype is torch.float64):
        raise TypeError(f"{op}: V must be float64 exactly when {name} is; got {name} {x.dtype} and V {V.dtype}")


def _rows(x):
    return x.numel() // x.shape[-1] if x.shape[-1] else 0


def _like(x, shape=None):
    return torch.empty(x.shape if shape is None else shape, dtype=x.dtype, device=x.device)


def check_wy_factor(V):
    _check_factor("wy_factor", V)


def check_factor_backward(op, dT, V, T):
    _check_factor(op, V, T)
    if dT.shape != T.shape or dT.dtype is not torch.float64:
        raise ValueError(f"{op}: dT must be like T; got {_checks.describe(dT)}")
    _checks.same_device(op, dT=dT, V=V, T=T)


def check_wy_factor_backward(dT, V, T):
    check_factor_backward("wy_factor_backward", dT, V, T)


def check_rotate(x, V, T, reverse):
    _check_factor("rotate", V, T)
    _check_rows("rotate", x, V)
    _checks.same_device("rotate", x=x, V=V, T=T)


def check_rotate_backward(dz, x, P, V, T, reverse, output_mask):
    _check_factor("rotate_backward", V, T)
    _check_rows("rotate_backward", x, V)
    if dz.shape != x.shape or dz.dtype is not x.dtype:
        raise ValueError(f"rotate_backward: dz must be like x; got {_checks.describe(dz)} and {_checks.describe(x)}")
    if P.shape != (_rows(x), V.shape[1]) or P.dtype is not V.dtype:
        raise ValueError(f"rotate_backward: P must be {V.dtype} of shape [M, r]; got {_checks.describe(P)}")
    _checks.same_device("rotate_backward", dz=dz, x=x, P=P, V=V, T=T)


def check_rotated_linear(x, weight, bias, V, T, keep):
    _check_factor("rotated_linear", V, T)
    _check_rows("rotated_linear", x, V)
    _checks.floating("rotated_linear", "weight", weight, (x.dtype,))
    if weight.dim() != 2 or weight.shape[1] != V.shape[0]:
        raise ValueError(f"rotated_linear: weight must be [N, K = {V.shape[0]}]; got {_checks.describe(weight)}")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype is not x.dtype):
        raise ValueError(
            f"rotated_linear: bias must be {x.dtype} of shape {[weight.shape[0]]}; got {_checks.describe(bias)}"
        )
    _checks.same_device("rotated_linear", x=x, weight=weight, V=V, T=T, **({} if bias is None else {"bias": bias}))


def _paired_rows(x, weight):
    """How many rows B has."""
    return weight.shape[0] if x.dtype.itemsize == 2 else 0


def check_rotated_linear_backward(dy, x, weight, P, B, V, T, output_mask):
    check_rotated_linear(x, weight, None, V, T, True)
    if dy.shape != (*x.shape[:-1], weight.shape[0]) or dy.dtype is not x.dtype:
        raise ValueError(f"rotated_linear_backward: dy must be {x.dtype} like x W^T; got {_checks.describe(dy)}")
    if P.shape != (_rows(x), V.shape[1]) or P.dtype is not V.dtype:
        raise ValueError(f"rotated_linear_backward: P must be {V.dtype} of shape [M, r]; got {_checks.describe(P)}")
    wanted = (_paired_rows(x, weight), V.shape[1])
    if B.shape not in (wanted, (0, V.shape[1])) or B.dtype is not V.dtype:
        raise ValueError(
            f"rotated_linear_backward: B must be {V.dtype} of shape {list(wanted)}; got {_checks.describe(B)}"
        )
    _checks.same_device("rotated_linear_backward", dy=dy, x=x, P=P, B=B)


def check_project(x, V):
    _check_factor("project", V)
    _check_rows("project", x, V)
    _checks.same_device("project", x=x, V=V)


def check_project_backward(dP, x, V, output_mask):
    _check_factor("project_backward", V)
    _check_rows("project_backward", x, V)
    if dP.shape != (_rows(x), V.shape[1]) or dP.dtype is not V.dtype:
        raise ValueError(f"project_backward: dP must be {V.dtype} of shape [M, r]; got {_checks.describe(dP)}")
    _checks.same_device("project_backward", dP=dP, x=x, V=V)


def check_penalty(V, squared):
    _check_factor("orthogonality_penalty", V)


def check_penalty_backward(grad, V, squared):
    _check_factor("orthogonality_penalty_backward", V)
    if grad.dim() != 0 or not grad.is_floating_point():
        raise ValueError(f"orthogonality_penalty_backward: grad must be one number; got {_checks.describe(grad)}")
    _checks.same_device("orthogonality_penalty_backward", grad=grad, V=V)


def _fake_wy_factor(V):
    return V.new_empty((V.shape[1], V.shape[1]), dtype=torch.float64)


def _fake_rotate(x, V, T, reverse):
    return _like(x), _like(V, (_rows(x), V.shape[1]))


def _fake_rotate_backward(dz, x, P, V, T, reverse, output_mask):
    want_dx, want_dV = output_mask
    dx = _like(dz) if want_dx else _like(dz, (0,))
    return dx, *((_like(V), _like(T)) if want_dV else (_like(V, (0,)), _like(T, (0,))))


def _fake_rotated_linear(x, weight, bias, V, T, keep):
    y, r = _like(x, (*x.shape[:-1], weight.shape[0])), V.shape[1]
    return y, _like(V, (_rows(x), r)), _like(V, (_paired_rows(x, weight) * keep, r))


def _fake_project(x, V):
    return _like(V, (_rows(x), V.shape[1]))


def _fake_project_backward(dP, x, V, output_mask):
    want_dx, want_dV = output_mask
    return _like(x) if want_dx else _like(x, (0,)), _like(V) if want_dV else _like(V, (0,))


def _fake_penalty(V, squared):
    return V.new_empty(())


def _key_factor(V, *_):
    return V.dtype, V.shape[1] > 128


def _key_rows(x, V, *_):
    return x.dtype, V.shape[1] > 128


WY_FACTOR = Operation("wy_factor(Tensor V) -> Tensor", FAMILY, check_wy_factor, _fake_wy_factor, _key_factor)
WY_FACTOR_BACKWARD = Operation(
    "wy_factor_backward(Tensor dT, Tensor V, Tensor T) -> Tensor",
    FAMILY,
    check_wy_factor_backward,
    lambda dT, V, T: _like(V),
    lambda dT, V, T: _key_factor(V),
)
ROTATE = Operation(
    "rotate(Tensor x, Tensor V, Tensor T, bool reverse) -> (Tensor, Tensor)",
    FAMILY,
    check_rotate,
    _fake_rotate,
    _key_rows,
)
ROTATE_BACKWARD = Operation(
    "rotate_backward(Tensor dz, Tensor x, Tensor P, Tensor V, Tensor T, bool reverse, bool[2] output_mask)"
    " -> (Tensor, Tensor, Tensor)",
    FAMILY,
    check_rotate_backward,
    _fake_rotate_backward,
    lambda dz, x, P, V, *_: _key_rows(x, V),
)
ROTATED_LINEAR = Operation(
    "rotated_linear(Tensor x, Tensor weight, Tensor? bias, Tensor V, Tensor T, bool keep) -> (Tensor, Tensor, Tensor)",
    FAMILY,
    check_rotated_linear,
    _fake_rotated_linear,
    lambda x, weight, bias, V, *_: _key_rows(x, V),
)
ROTATED_LINEAR_BACKWARD = Operation(
    "rotated_linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor P, Tensor B, Tensor V, Tensor T,"
    " bool[2] output_mask) -> (Tensor, Tensor, Tensor)",
    FAMILY,
    check_rotated_linear_backward,
    lambda dy, x, weight, P, B, V, T, output_mask: _fake_rotate_backward(x, x, P, V, T, False, output_mask),
    lambda dy, x, weight, P, B, V, *_: _key_rows(x, V),
)
PROJECT = Operation("project(Tensor x, Tensor V) -> Tensor", FAMILY, check_project, _fake_project, _key_rows)
PROJECT_BACKWARD = Operation(
    "project_backward(Tensor dP, Tensor x, Tensor V, bool[2] output_mask) -> (Tensor, Tensor)",
    FAMILY,
    check_project_backward,
    _fake_project_backward,
    lambda dP, x, V, output_mask: _key_rows(x, V),
)
PENALTY = Operation(
    "orthogonality_penalty(Tensor V, bool squared) -> Tensor", FAMILY, check_penalty, _fake_penalty, _key_factor
)
PENALTY_BACKWARD = Operation(
    "orthogonality_penalty_backward(Tensor grad, Tensor V, bool squared) -> Tensor",
    FAMILY,
    check_penalty_backward,
    lambda grad, V, squared: _like(V),
    lambda grad, V, squared: _key_factor(V),
)
