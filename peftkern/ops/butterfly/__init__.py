"""Butterfly rotations of activations: z = x R, R a product of f sparse orthogonal stages of b x b Cayley blocks.

The rotation of BOFT (Liu et al. 2024, arXiv:2311.06243) with PEFT's parameters, without its permutation matrices.
Derivations: README.md in this folder.
"""

import torch

from peftkern.ops import _checks, _transforms
from peftkern.ops.butterfly import autograd, contract, reference
from peftkern.ops.butterfly.contract import check_sizes
from peftkern.ops.householder import HALF, check_precision


def _dense(boft_R, dtype):
    """Checked, in float32 or float64."""
    if not torch.compiler.is_compiling():
        _checks.plain("butterfly_blocks", boft_R=boft_R)
        contract.check_stages("butterfly_blocks", boft_R, "boft_R", _checks.FLOATS)
    return boft_R.to(_transforms.working_dtype(boft_R) if dtype is None else dtype)


def butterfly_blocks(boft_R, dtype=None):
    """The orthogonal blocks R [f, K/b, b, b] of PEFT's parameter, differentiable.

    Args:
        boft_R: [f, K/b, b, b], any floating dtype; only the skew part A = (B - B^T) / 2 of each block counts.
        dtype: float32 or float64 of R; by default float64 exactly when boft_R is.

    Returns:
        R = (I - A)(I + A)^-1 in `dtype`: orthogonal to the rounding of `dtype`.

    Raises:
        TypeError: not floating. ValueError: not [f, K/b, b, b], or b 2^(f-1) does not divide K, or an odd b with f > 1.

    Source: arXiv:2311.06243, section 4; README.md, eq. 1.
    """
    B = _dense(boft_R, dtype)
    return reference.dense_cayley(B) if _transforms.needs_reference() else autograd.DenseCayley.apply(B)


def drop_blocks(R, p):
    """Multiplicative dropout with PEFT's meaning: in one random stage, int(p K/b) random blocks become the identity.

    Args:
        R: [f, K/b, b, b]; p: the fraction of blocks. Call it in training only.

    Returns:
        R with those blocks replaced; no gradient reaches them. Draws torch.randint(0, f) and torch.randperm(K/b) from
        torch's default CPU generator, in this order, as PEFT does.
    """
    f, n, b, _ = R.shape
    stage = torch.randint(0, f, (1,)).item()
    dropped = (torch.arange(n) < int(p * n))[torch.randperm(n)]
    mask = torch.zeros(f, n, dtype=torch.bool)
    mask[stage] = dropped
    eye = torch.eye(b, dtype=R.dtype, device=R.device)
    return torch.where(mask.to(R.device)[:, :, None, None], eye, R)


def butterfly_rotate(x, R, transpose=False):
    """z = x R through all stages in one pass; z = x R^T, the inverse rotation, when transposed.

    Args:
        x: [..., K], float64, float32, bfloat16 or float16; any strides.
        R: [f, K/b, b, b], any floating dtype, from `butterfly_blocks`; b 2^(f-1) must divide K. Stage f - 1 is applied
            first, as in PEFT's product B_(f-1) ... B_0.
        transpose: the inverse: `butterfly_rotate(W, R, transpose=True)` is the merged weight W R^T of a weight [N, K],
            without transpose it takes that back.

    Returns:
        z, shape and dtype of x; float32 between the stages (float64 for float64), rounded once.

    Raises:
        TypeError: integer or non-plain tensors. ValueError: shapes or devices that do not match.

    Source: arXiv:2311.06243, section 4; README.md, eq. 2 and 3.
    """
    dtype = _transforms.working_dtype(x, R)
    if not torch.compiler.is_compiling():
        _checks.plain("butterfly_rotate", x=x, R=R)
        _checks.floating("butterfly_rotate", "x", x)
        _checks.floating("butterfly_rotate", "R", R)
    rows, R = x.to(dtype) if dtype is torch.float64 else x, R.to(dtype)
    if _transforms.needs_reference():
        contract.check_butterfly_rotate(rows, R, transpose)
        return reference.butterfly_rotate(rows, R, transpose).to(x.dtype)
    return autograd.ButterflyRotate.apply(rows, R, transpose).to(x.dtype)


def _scale(scale, dtype):
    return None if scale is None else scale.reshape(-1).to(dtype)


def scale_outputs(y, scale, bias=None):
    """(y - b) s + b: the output scale of BOFT after a base layer that has added its bias b.

    Args:
        y: [..., N] floating; scale: N numbers of any shape and floating dtype (PEFT's boft_s [N, 1]); bias: [N] in y's
            dtype, or None.

    Returns:
        Like y, from float32 (float64 for float64), rounded once; differentiable in all three.
    """
    s = _scale(scale, _transforms.working_dtype(y))
    if _transforms.needs_reference():
        return reference.scale_outputs(y, s, bias)
    return autograd.ScaleOutputs.apply(y, s, bias)


def apply_linear(x, weight, bias, R, scale=None):
    """y = s (x R) W^T + b with one rounding: x R meets the weight unrounded, s and b act on the accumulator.

    Args:
        x: [..., K] in weight's dtype, or float32 above a half-precision weight (a rotated x of an earlier adapter).
        weight: [N, K]; bias: [N] or None, in weight's dtype. R: [f, K/b, b, b] float32 (float64 for float64 x).
        scale: N numbers, or None.

    Returns:
        y [..., N] in weight's dtype. Differentiable in x, weight, bias, scale and R.
    """
    s = _scale(scale, R.dtype)
    if _transforms.needs_reference():
        return reference.butterfly_rotated_linear(x, weight, bias, s, R)[0]
    return autograd.ButterflyRotatedLinear.apply(x, weight, bias, s, R)


def boft_linear(x, weight, bias, boft_R, boft_s=None, precision="auto"):
    """The BOFT linear map y = s (x R) W^T + b without a module.

    Args:
        x: [..., K]; weight: [N, K]; bias: [N] or None; all in one floating dtype.
        boft_R: [f, K/b, b, b]; boft_s: N numbers ([N, 1] in PEFT) or None; any floating dtype.
        precision: "fast" rounds the rotated x once before the product, or the rotated weight once where it has fewer
            rows than x, the scale then multiplied into it where there is no bias (not in float16); "auto" is the same;
            "exact" hands x R to the product unrounded and applies the scale to the accumulator, so that half precision
            keeps updates far below one ulp, at the price of a second product in the forward.

    Returns:
        y [..., N] in x's dtype. Differentiable in x, weight, bias, boft_R and boft_s.

    Raises:
        TypeError, ValueError: as `butterfly_blocks` and `butterfly_rotate`, or for a precision that does not exist.

    Source: arXiv:2311.06243; README.md, eq. 2 and 6.
    """
    if not torch.compiler.is_compiling():
        check_precision(precision)
        _checks.plain("boft_linear", x=x, weight=weight, boft_R=boft_R)
        _checks.floating("boft_linear", "x", x)
        contract.check_linear("boft_linear", x, weight, bias)
        if boft_s is not None and boft_s.numel() != weight.shape[0]:
            raise ValueError(
                f"boft_linear: boft_s must have {weight.shape[0]} numbers, one per output; "
                f"got {_checks.describe(boft_s)}"
            )
    exact = precision == "exact" and x.dtype in HALF
    if not _transforms.needs_reference() and (x.is_meta or not torch.is_autocast_enabled(x.device.type)):
        return dense_linear(x, weight, bias, boft_R, boft_s, exact)
    R = butterfly_blocks(boft_R, _transforms.working_dtype(x))
    if exact:
        return apply_linear(x, weight, bias, R, boft_s)
    z = butterfly_rotate(x, R)
    y = torch.nn.functional.linear(z, weight, bias)
    return y if boft_s is None else scale_outputs(y, boft_s, bias)


def dense_linear(x, weight, bias, boft_R, boft_s, exact):
    """`boft_linear` of checked arguments as one node of the graph; not under autocast or a functorch transform."""
    working = _transforms.working_dtype(x)
    scale, B = None if boft_s is None else boft_s.to(working), _dense(boft_R, working)
    if not exact and autograd.folds(x, weight, bias, scale):
        return autograd.folded_linear(x, weight, scale, B)
    return autograd.DenseRotatedLinear.apply(x, weight, bias, scale, B, exact)


def fast_linear(x, weight, bias, R, scale=None):
    """`boft_linear` in "fast" precision with R [f, K/b, b, b] at hand, where nothing is differentiated."""
    return autograd.fast_linear(x, weight, bias, _scale(scale, R.dtype), R)


__all__ = [
    "apply_linear",
    "boft_linear",
    "butterfly_blocks",
    "butterfly_rotate",
    "check_sizes",
    "drop_blocks",
    "scale_outputs",
]
