"""Contracts of the `block_rotation` operations: schema, argument check and fake, one place each.

Shapes: x [..., K] in blocks of b columns; R [S, b, b] with S = K/b rotations, or S = 1 shared by all blocks;
q [S, b (b - 1) / 2] the packed skew matrices; weight [N, K]. R and q are float32, or float64 when x is.
"""

import math

import torch

from peftkern.dispatch import Operation
from peftkern.ops import _checks

FAMILY = "peftkern.ops.block_rotation"


def block_size(packed):
    """b of b (b - 1) / 2 packed numbers, or None where there is no such b."""
    b = (1 + math.isqrt(1 + 8 * packed)) // 2
    return b if b * (b - 1) // 2 == packed else None


def _check_packed(op, q):
    _checks.floating(op, "q", q, _checks.WORKING)
    if q.dim() != 2 or q.shape[0] < 1 or block_size(q.shape[1]) is None:
        raise ValueError(
            f"{op}: q must have shape [blocks, b (b - 1) / 2], the strict upper triangles of skew matrices; "
            f"got {_checks.describe(q)}"
        )


def _check_coefficients(op, coefficients):
    if len(coefficients) < 1:
        raise ValueError(f"{op}: coefficients must name at least the one of I; got none")


def check_blocks(op, R):
    _checks.floating(op, "R", R, _checks.WORKING)
    if R.dim() != 3 or R.shape[0] < 1 or R.shape[1] < 1 or R.shape[1] != R.shape[2]:
        raise ValueError(f"{op}: R must have shape [blocks, b, b]; got {_checks.describe(R)}")


def _check_rows(op, x, R, name="x"):
    _checks.floating(op, name, x)
    S, b, _ = R.shape
    K = x.shape[-1] if x.dim() else 0
    if x.dim() < 1 or K % b or (S != 1 and S * b != K):
        wanted = f"{S * b} columns, {S} blocks of {b}" if S > 1 else f"a multiple of {b} columns, the block size"
        raise ValueError(f"{op}: {name} must have {wanted}; got {_checks.describe(x)}")
    if (x.dtype is torch.float64) != (R.dtype is torch.float64):
        raise TypeError(f"{op}: R must be float64 exactly when {name} is; got {name} {x.dtype} and R {R.dtype}")


def check_linear(op, x, weight, bias):
    """weight [N, K] and bias [N] for rows x [..., K], which may be wider than the weight: float32 over half."""
    _checks.floating(op, "weight", weight)
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"{op}: weight must be [N, K = {x.shape[-1]}]; got {_checks.describe(weight)}")
    if x.dtype is not weight.dtype and (x.dtype is not torch.float32 or weight.dtype is torch.float64):
        raise TypeError(f"{op}: x must be float32 or in weight's dtype {weight.dtype}; got {x.dtype}")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype is not weight.dtype):
        raise ValueError(
            f"{op}: bias must be {weight.dtype} of shape {[weight.shape[0]]}; got {_checks.describe(bias)}"
        )
    _checks.same_device(op, x=x, weight=weight, **({} if bias is None else {"bias": bias}))


def check_incoming(op, dy, x, weight):
    if dy.shape != (*x.shape[:-1], weight.shape[0]) or dy.dtype is not weight.dtype:
        raise ValueError(f"{op}: dy must be {weight.dtype} like x W^T; got {_checks.describe(dy)}")
    _checks.same_device(op, dy=dy, x=x)


def like(x, shape=None):
    return torch.empty(x.shape if shape is None else shape, dtype=x.dtype, device=x.device)


def check_skew_polynomial(q, coefficients):
    _check_packed("skew_polynomial", q)
    _check_coefficients("skew_polynomial", coefficients)


def check_skew_polynomial_backward(dR, q, coefficients):
    op = "skew_polynomial_backward"
    _check_packed(op, q)
    _check_coefficients(op, coefficients)
    if dR.shape != _blocks_of(q) or dR.dtype is not q.dtype:
        raise ValueError(f"{op}: dR must be {q.dtype} of shape {list(_blocks_of(q))}; got {_checks.describe(dR)}")
    _checks.same_device(op, dR=dR, q=q)


def check_skew_cayley(q):
    _check_packed("skew_cayley", q)


def check_skew_cayley_backward(dR, R):
    check_blocks("skew_cayley_backward", R)
    if dR.shape != R.shape or dR.dtype is not R.dtype:
        raise ValueError(f"skew_cayley_backward: dR must be like R; got {_checks.describe(dR)}")
    _checks.same_device("skew_cayley_backward", dR=dR, R=R)


def check_block_rotate(x, R, transpose):
    check_blocks("block_rotate", R)
    _check_rows("block_rotate", x, R)
    _checks.same_device("block_rotate", x=x, R=R)


def check_block_rotate_backward(dz, x, R, transpose, output_mask):
    op = "block_rotate_backward"
    check_blocks(op, R)
    _check_rows(op, x, R)
    if dz.shape != x.shape or dz.dtype is not x.dtype:
        raise ValueError(f"{op}: dz must be like x; got {_checks.describe(dz)} and {_checks.describe(x)}")
    _checks.same_device(op, dz=dz, x=x, R=R)


def check_block_rotated_linear(x, weight, bias, R):
    check_blocks("block_rotated_linear", R)
    _check_rows("block_rotated_linear", x, R)
    check_linear("block_rotated_linear", x, weight, bias)
    _checks.same_device("block_rotated_linear", x=x, R=R)


def check_block_rotated_linear_backward(dy, x, weight, R, output_mask):
    op = "block_rotated_linear_backward"
    check_blocks(op, R)
    _check_rows(op, x, R)
    check_linear(op, x, weight, None)
    check_incoming(op, dy, x, weight)
    _checks.same_device(op, x=x, R=R)


def _blocks_of(q):
    b = block_size(q.shape[1])
    return q.shape[0], b, b


def _fake_skew_cayley_backward(dR, R):
    S, b, _ = R.shape
    return like(R, (S, b * (b - 1) // 2))


def fake_gradients(x, R, output_mask):
    """dx like x and dR like R, each empty where it is not wanted."""
    want_dx, want_dR = output_mask
    return like(x) if want_dx else like(x, (0,)), like(R) if want_dR else like(R, (0,))


def _key_packed(q):
    return q.dtype, q.shape[1]


def _key_rows(x, R, *_):
    return x.dtype, R.shape[-1]


SKEW_POLYNOMIAL = Operation(
    "skew_polynomial(Tensor q, float[] coefficients) -> Tensor",
    FAMILY,
    check_skew_polynomial,
    lambda q, coefficients: like(q, _blocks_of(q)),
    lambda q, coefficients: _key_packed(q),
)
SKEW_POLYNOMIAL_BACKWARD = Operation(
    "skew_polynomial_backward(Tensor dR, Tensor q, float[] coefficients) -> Tensor",
    FAMILY,
    check_skew_polynomial_backward,
    lambda dR, q, coefficients: like(q),
    lambda dR, q, coefficients: _key_packed(q),
)
SKEW_CAYLEY = Operation(
    "skew_cayley(Tensor q) -> Tensor",
    FAMILY,
    check_skew_cayley,
    lambda q: like(q, _blocks_of(q)),
    _key_packed,
)
SKEW_CAYLEY_BACKWARD = Operation(
    "skew_cayley_backward(Tensor dR, Tensor R) -> Tensor",
    FAMILY,
    check_skew_cayley_backward,
    _fake_skew_cayley_backward,
    lambda dR, R: (R.dtype, R.shape[-1]),
)
BLOCK_ROTATE = Operation(
    "block_rotate(Tensor x, Tensor R, bool transpose) -> Tensor",
    FAMILY,
    check_block_rotate,
    lambda x, R, transpose: like(x),
    _key_rows,
)
BLOCK_ROTATE_BACKWARD = Operation(
    "block_rotate_backward(Tensor dz, Tensor x, Tensor R, bool transpose, bool[2] output_mask) -> (Tensor, Tensor)",
    FAMILY,
    check_block_rotate_backward,
    lambda dz, x, R, transpose, output_mask: fake_gradients(x, R, output_mask),
    lambda dz, x, R, *_: _key_rows(x, R),
)
BLOCK_ROTATED_LINEAR = Operation(
    "block_rotated_linear(Tensor x, Tensor weight, Tensor? bias, Tensor R) -> Tensor",
    FAMILY,
    check_block_rotated_linear,
    lambda x, weight, bias, R: like(weight, (*x.shape[:-1], weight.shape[0])),
    lambda x, weight, bias, R: (weight.dtype, *_key_rows(x, R)),
)
BLOCK_ROTATED_LINEAR_BACKWARD = Operation(
    "block_rotated_linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor R, bool[2] output_mask)"
    " -> (Tensor, Tensor)",
    FAMILY,
    check_block_rotated_linear_backward,
    lambda dy, x, weight, R, output_mask: fake_gradients(x, R, output_mask),
    lambda dy, x, weight, R, output_mask: (weight.dtype, *_key_rows(x, R)),
)
