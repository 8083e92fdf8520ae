"""Contracts of the `butterfly` operations: schema, argument check and fake, one place each.

Shapes: x [..., K], M = numel(x) / K rows; R [f, K/b, b, b], the orthogonal blocks of f stages; weight [N, K];
scale [N]. R and scale are float32, or float64 when x is.
"""

import torch

from peftkern.dispatch import Operation
from peftkern.ops import _checks
from peftkern.ops.block_rotation.contract import check_incoming, check_linear, fake_gradients, like

FAMILY = "peftkern.ops.butterfly"


def check_sizes(op, K, b, f):
    """The sizes for which f stages exist: b 2^(f-1) divides K, and b is even as soon as there are two."""
    if f < 1 or b < 1:
        raise ValueError(f"{op}: a butterfly needs at least one stage and blocks of at least 1; got f = {f}, b = {b}")
    if f > 1 and b % 2:
        raise ValueError(f"{op}: the block size must be even for {f} stages, which exchange halves of blocks; got {b}")
    if K % (b << (f - 1)):
        raise ValueError(
            f"{op}: K must be a multiple of b 2^(f-1) = {b << (f - 1)} for {f} stages of blocks of {b}; got K = {K}"
        )


def check_stages(op, R, name="R", dtypes=_checks.WORKING):
    _checks.floating(op, name, R, dtypes)
    if R.dim() != 4 or R.shape[2] != R.shape[3]:
        raise ValueError(f"{op}: {name} must have shape [f, K/b, b, b]; got {_checks.describe(R)}")
    f, n, b, _ = R.shape
    check_sizes(op, n * b, b, f)


def _check_rows(op, x, R, name="x"):
    _checks.floating(op, name, x)
    K = R.shape[1] * R.shape[2]
    if x.dim() < 1 or x.shape[-1] != K:
        raise ValueError(f"{op}: {name} must have K = {K} columns like R; got {_checks.describe(x)}")
    if (x.dtype is torch.float64) != (R.dtype is torch.float64):
        raise TypeError(f"{op}: R must be float64 exactly when {name} is; got {name} {x.dtype} and R {R.dtype}")
    _checks.same_device(op, **{name: x, "R": R})


def check_scale(op, y, scale, bias):
    if scale.dim() != 1 or scale.shape[0] != y.shape[-1] or scale.dtype not in _checks.WORKING:
        raise ValueError(
            f"{op}: scale must be float32 or float64 of shape {[y.shape[-1]]}; got {_checks.describe(scale)}"
        )
    if (y.dtype is torch.float64) != (scale.dtype is torch.float64):
        raise TypeError(f"{op}: scale must be float64 exactly when y is; got {scale.dtype} and {y.dtype}")
    if bias is not None and (bias.shape != scale.shape or bias.dtype is not y.dtype):
        raise ValueError(f"{op}: bias must be {y.dtype} of shape {list(scale.shape)}; got {_checks.describe(bias)}")
    _checks.same_device(op, y=y, scale=scale, **({} if bias is None else {"bias": bias}))


def check_dense_cayley(B):
    check_stages("dense_cayley", B, "B")


def check_dense_cayley_backward(dR, R):
    check_stages("dense_cayley_backward", R)
    if dR.shape != R.shape or dR.dtype is not R.dtype:
        raise ValueError(f"dense_cayley_backward: dR must be like R; got {_checks.describe(dR)}")
    _checks.same_device("dense_cayley_backward", dR=dR, R=R)


def check_butterfly_rotate(x, R, transpose):
    check_stages("butterfly_rotate", R)
    _check_rows("butterfly_rotate", x, R)


def check_butterfly_rotate_backward(dz, x, R, transpose, output_mask):
    op = "butterfly_rotate_backward"
    check_stages(op, R)
    _check_rows(op, x, R)
    if dz.shape != x.shape or dz.dtype is not x.dtype:
        raise ValueError(f"{op}: dz must be like x; got {_checks.describe(dz)} and {_checks.describe(x)}")
    _checks.same_device(op, dz=dz, x=x)


def check_butterfly_rotate_weight(weight, scale, R):
    op = "butterfly_rotate_weight"
    check_stages(op, R)
    _check_rows(op, weight, R, "weight")
    if weight.dim() != 2:
        raise ValueError(f"{op}: weight must be [N, K]; got {_checks.describe(weight)}")
    check_scale(op, weight.mT, scale, None)


def check_scale_outputs(y, scale, bias):
    _checks.floating("scale_outputs", "y", y)
    if y.dim() < 1:
        raise ValueError("scale_outputs: y must have at least one dimension, the features; got a single number")
    check_scale("scale_outputs", y, scale, bias)


def check_scale_outputs_backward(dy, y, scale, bias, output_mask):
    check_scale_outputs(y, scale, bias)
    if dy.shape != y.shape or dy.dtype is not y.dtype:
        raise ValueError(f"scale_outputs_backward: dy must be like y; got {_checks.describe(dy)}")
    _checks.same_device("scale_outputs_backward", dy=dy, y=y)


def check_butterfly_rotated_linear(x, weight, bias, scale, R):
    op = "butterfly_rotated_linear"
    check_stages(op, R)
    _check_rows(op, x, R)
    check_linear(op, x, weight, bias)
    if scale is not None:
        check_scale(op, weight.mT, scale, bias)


def check_butterfly_rotated_linear_backward(dy, x, weight, scale, p, R, output_mask):
    op = "butterfly_rotated_linear_backward"
    check_butterfly_rotated_linear(x, weight, None, scale, R)
    check_incoming(op, dy, x, weight)
    if scale is not None and output_mask[1] and (p.shape != dy.shape or p.dtype is not dy.dtype):
        raise ValueError(f"{op}: p must be like dy; got {_checks.describe(p)}")


def _fake_scale_outputs_backward(dy, y, scale, bias, output_mask):
    want_dy, want_scale = output_mask
    return like(y) if want_dy else like(y, (0,)), like(scale) if want_scale else like(scale, (0,))


def _fake_rotated_linear(x, weight, bias, scale, R):
    shape = (*x.shape[:-1], weight.shape[0])
    return like(weight, shape), like(weight, (0,) if scale is None else shape)


def _fake_rotated_linear_backward(dy, x, weight, scale, p, R, output_mask):
    want_dx, want_scale, want_dR = output_mask
    dx, dR = fake_gradients(x, R, (want_dx, want_dR))
    return dx, R.new_empty(weight.shape[0] if scale is not None and want_scale else 0), dR


def _key_rows(x, R, *_):
    return x.dtype, R.shape[0], R.shape[-1]


DENSE_CAYLEY = Operation(
    "dense_cayley(Tensor B) -> Tensor",
    FAMILY,
    check_dense_cayley,
    lambda B: like(B),
    lambda B: (B.dtype, B.shape[-1]),
)
DENSE_CAYLEY_BACKWARD = Operation(
    "dense_cayley_backward(Tensor dR, Tensor R) -> Tensor",
    FAMILY,
    check_dense_cayley_backward,
    lambda dR, R: like(R),
    lambda dR, R: (R.dtype, R.shape[-1]),
)
BUTTERFLY_ROTATE = Operation(
    "butterfly_rotate(Tensor x, Tensor R, bool transpose) -> Tensor",
    FAMILY,
    check_butterfly_rotate,
    lambda x, R, transpose: like(x),
    _key_rows,
)
BUTTERFLY_ROTATE_BACKWARD = Operation(
    "butterfly_rotate_backward(Tensor dz, Tensor x, Tensor R, bool transpose, bool[2] output_mask) -> (Tensor, Tensor)",
    FAMILY,
    check_butterfly_rotate_backward,
    lambda dz, x, R, transpose, output_mask: fake_gradients(x, R, output_mask),
    lambda dz, x, R, *_: _key_rows(x, R),
)
BUTTERFLY_ROTATE_WEIGHT = Operation(
    "butterfly_rotate_weight(Tensor weight, Tensor scale, Tensor R) -> Tensor",
    FAMILY,
    check_butterfly_rotate_weight,
    lambda weight, scale, R: like(weight),
    lambda weight, scale, R: _key_rows(weight, R),
)
SCALE_OUTPUTS = Operation(
    "scale_outputs(Tensor y, Tensor scale, Tensor? bias) -> Tensor",
    FAMILY,
    check_scale_outputs,
    lambda y, scale, bias: like(y),
    lambda y, scale, bias: y.dtype,
)
SCALE_OUTPUTS_BACKWARD = Operation(
    "scale_outputs_backward(Tensor dy, Tensor y, Tensor scale, Tensor? bias, bool[2] output_mask) -> (Tensor, Tensor)",
    FAMILY,
    check_scale_outputs_backward,
    _fake_scale_outputs_backward,
    lambda dy, y, *_: y.dtype,
)
BUTTERFLY_ROTATED_LINEAR = Operation(
    "butterfly_rotated_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? scale, Tensor R) -> (Tensor, Tensor)",
    FAMILY,
    check_butterfly_rotated_linear,
    _fake_rotated_linear,
    lambda x, weight, bias, scale, R: (weight.dtype, *_key_rows(x, R)),
)
BUTTERFLY_ROTATED_LINEAR_BACKWARD = Operation(
    "butterfly_rotated_linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor? scale, Tensor p, Tensor R,"
    " bool[3] output_mask) -> (Tensor, Tensor, Tensor)",
    FAMILY,
    check_butterfly_rotated_linear_backward,
    _fake_rotated_linear_backward,
    lambda dy, x, weight, scale, p, R, output_mask: (weight.dtype, *_key_rows(x, R)),
)
