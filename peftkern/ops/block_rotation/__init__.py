"""Block-diagonal rotations of activations, z_i = x_i R_i, with R from packed skew matrices by a Cayley map.

The rotation of OFT (Qiu et al. 2023, arXiv:2306.07280; its input side and the Cayley-Neumann polynomial: Qiu et al.
2025, arXiv:2506.19847), with PEFT's parameters, coefficients and signs. Derivations: README.md in this folder.
"""

import torch

from peftkern.ops import _checks, _transforms
from peftkern.ops.block_rotation import autograd, contract, reference
from peftkern.ops.householder import HALF, check_precision


def coefficients(terms=5, legacy=False):
    """The coefficients c_0, c_1, ... of PEFT's Cayley-Neumann polynomial R = sum_k c_k Q^k.

    Args:
        terms: PEFT's `num_cayley_neumann_terms`, any whole number. Its loop has these values: 1 and less give I alone,
            2 gives I + 2 Q, 3 and 4 the same I + 2 Q + 2 Q^2 + Q^3, and n >= 5 gives 2 for Q ... Q^(n-2), 1 for the
            last power Q^(n-1).
        legacy: the polynomial of PEFT 0.16 and 0.17, which had 2 for every power (checkpoints whose config records no
            version or one below 0.18).

    Returns:
        A tuple of floats.
    """
    if terms < 2:
        return (1.0,)
    powers = terms - 1
    if legacy:
        return (1.0, *(2.0,) * powers)
    return (1.0, 2.0) if powers == 1 else (1.0, *(2.0,) * (max(powers, 3) - 1), 1.0)


def _packed(q, dtype):
    """Checked, in float32 or float64."""
    if not torch.compiler.is_compiling():
        _checks.plain("rotation_blocks", q=q)
        _checks.floating("rotation_blocks", "q", q)
        if q.dim() != 2 or q.shape[0] < 1 or contract.block_size(q.shape[1]) is None:
            raise ValueError(
                f"rotation_blocks: q must have shape [blocks, b (b - 1) / 2], the packed skew matrices of whole "
                f"blocks; got {_checks.describe(q)}"
            )
    return q.to(_transforms.working_dtype(q) if dtype is None else dtype)


def rotation_blocks(q, terms=5, legacy=False, dtype=None):
    """R [S, b, b] from packed skew matrices, differentiable in q.

    Args:
        q: [S, b (b - 1) / 2], any floating dtype: the strict upper triangles, row by row (PEFT's `oft_R.weight`); one
            row where one rotation is shared by all blocks (`block_share`).
        terms: the Cayley-Neumann polynomial with PEFT's `num_cayley_neumann_terms`, or None for the exact Cayley map
            (PEFT's `use_cayley_neumann=False`), which is the transpose of what the polynomial approximates. An even
            number of terms from 6 on, and the exact map, are better rotations than the default of 5 (README.md,
            eq. 4: an odd number of factors never shrinks).
        legacy: see `coefficients`.
        dtype: float32 or float64 of R; by default float64 exactly when q is.

    Returns:
        R in `dtype`. The polynomial is computed again in backward; only q is kept.

    Raises:
        TypeError: q is not floating. ValueError: q has not the shape of packed matrices.

    Source: arXiv:2506.19847, section 3; README.md, eq. 2 and 3.
    """
    q = _packed(q, dtype)
    by_formula = _transforms.needs_reference()
    if terms is None:
        return reference.skew_cayley(q) if by_formula else autograd.SkewCayley.apply(q)
    c = coefficients(terms, legacy)
    return reference.skew_polynomial(q, c) if by_formula else autograd.SkewPolynomial.apply(q, c)


def pack_skew(Q):
    """The packed form [S, b (b - 1) / 2] of skew matrices Q [S, b, b]; raises ValueError where Q is not skew."""
    if Q.dim() != 3 or Q.shape[1] != Q.shape[2]:
        raise ValueError(f"pack_skew: Q must have shape [blocks, b, b]; got {_checks.describe(Q)}")
    if not torch.equal(Q, -Q.mT):
        off = (Q + Q.mT).abs().max().item()
        raise ValueError(f"pack_skew: Q must be skew, Q^T = -Q; the largest entry of Q + Q^T is {off:.3g}")
    row, column = torch.triu_indices(*Q.shape[1:], 1, device=Q.device)
    return Q[:, row, column]


@torch.no_grad()
def constrain_(q, eps):
    """COFT: shorten the blocks of the parameter q in place to |Q|_F <= eps / sqrt(S), as PEFT does in every forward.

    Args:
        q: [S, b (b - 1) / 2] floating, written in place; S counts the stored blocks, 1 where one is shared.
        eps: the radius.

    Returns:
        q. The gradient does not see the projection (straight through). A caller that differentiates goes on with
        `q.clone()`, so that the projection of a later forward does not invalidate what backward keeps.

    Source: PEFT, `OFTRotationModule._project_batch`.
    """
    radius = eps / q.shape[0] ** 0.5
    # |Q|_F counts each packed number twice.
    norm = q.norm(dim=1, keepdim=True) * 2**0.5
    return q.copy_(torch.where(norm <= radius, q, radius * (q / norm)))


def rotate_blocks(x, R, transpose=False):
    """z_i = x_i R_i for the blocks x_i of the last dimension; z_i = x_i R_i^T when transposed.

    Args:
        x: [..., K], float64, float32, bfloat16 or float16; any strides.
        R: [K / b, b, b], or [1, b, b] for one rotation shared by all blocks; any floating dtype (float32 blocks under
            half-precision x are the usual case; the native backends make no float32 copy of x).
        transpose: multiply by R_i^T. It undoes exact rotations (`rotate_blocks(W, R, transpose=True)` is the merged
            weight W R^T of a weight [N, K]); for the inverse of a polynomial see `inverse_blocks`.

    Returns:
        z, shape and dtype of x, from float32 accumulators (float64 for float64), rounded once.

    Raises:
        TypeError: integer or non-plain tensors. ValueError: shapes or devices that do not match.

    Source: arXiv:2506.19847, section 3; README.md, eq. 1.
    """
    dtype = _transforms.working_dtype(x, R)
    if not torch.compiler.is_compiling():
        _checks.plain("rotate_blocks", x=x, R=R)
        _checks.floating("rotate_blocks", "x", x)
        _checks.floating("rotate_blocks", "R", R)
    rows, R = x.to(dtype) if dtype is torch.float64 else x, R.to(dtype)
    if _transforms.needs_reference():
        contract.check_block_rotate(rows, R, transpose)
        return reference.block_rotate(rows, R, transpose).to(x.dtype)
    return autograd.BlockRotate.apply(rows, R, transpose).to(x.dtype)


def inverse_blocks(R):
    """The inverses of the blocks R [S, b, b], in float64 and rounded to R's dtype: what takes a merged weight back.

    Nothing of size K x K is made. For an exact rotation it equals R^T up to rounding.
    """
    return torch.linalg.inv(R.double()).to(R.dtype)


def orthogonality_error(R):
    """max_i |R_i^T R_i - I|_2 over the blocks, a 0-dimensional float64 tensor: 0 for a rotation."""
    R = R.detach().double()
    return (torch.linalg.svdvals(R).square() - 1).abs().max()


def skew_norm(q):
    """max_i |Q_i|_2 over the packed skew blocks q, 0-dimensional float64; the polynomial diverges from 1 on."""
    return torch.linalg.matrix_norm(reference.unpack(q.detach().double()), ord=2).max()


def apply_linear(x, weight, bias, R):
    """y = (x R) W^T + b with one rounding: x R meets the weight unrounded.

    Args:
        x: [..., K] in weight's dtype, or float32 above a half-precision weight (a rotated x of an earlier adapter).
        weight: [N, K]; bias: [N] or None, in weight's dtype. R: [K / b, b, b] or [1, b, b], float32 (float64 for
            float64 x).

    Returns:
        y [..., N] in weight's dtype. Differentiable in x, weight, bias and R.
    """
    if _transforms.needs_reference():
        return reference.block_rotated_linear(x, weight, bias, R)
    return autograd.BlockRotatedLinear.apply(x, weight, bias, R)


def oft_linear(x, weight, bias, q, terms=5, legacy=False, precision="auto"):
    """The OFT linear map y = (x R) W^T + b without a module.

    Args:
        x: [..., K]; weight: [N, K]; bias: [N] or None; all in one floating dtype.
        q, terms, legacy: see `rotation_blocks`.
        precision: "fast" rounds the rotated x once before the product, as PEFT does, or the rotated weight once where
            it has fewer rows than x; "auto" is the same; "exact" hands x R to the product unrounded, so that half
            precision keeps updates far below one ulp of x, at the price of a second product in the forward.

    Returns:
        y [..., N] in x's dtype. Differentiable in x, weight, bias and q.

    Raises:
        TypeError, ValueError: as `rotate_blocks`, or for a precision that does not exist.

    Source: arXiv:2506.19847; README.md, eq. 1 and 5.
    """
    if not torch.compiler.is_compiling():
        check_precision(precision)
        _checks.plain("oft_linear", x=x, weight=weight, q=q)
        _checks.floating("oft_linear", "x", x)
        contract.check_linear("oft_linear", x, weight, bias)
    exact, working = precision == "exact" and x.dtype in HALF, _transforms.working_dtype(x)
    if _transforms.needs_reference() or (not x.is_meta and torch.is_autocast_enabled(x.device.type)):
        R = rotation_blocks(q, terms, legacy, working)
        if exact:
            return apply_linear(x, weight, bias, R)
        return torch.nn.functional.linear(rotate_blocks(x, R), weight, bias)
    return packed_linear(x, weight, bias, q, terms, legacy, exact)


def fast_linear(x, weight, bias, R):
    """`oft_linear` in "fast" precision with R [K / b or 1, b, b] at hand, where nothing is differentiated."""
    return autograd.fast_linear(contract.BLOCK_ROTATE, x, weight, bias, R)


def packed_linear(x, weight, bias, q, terms, legacy, exact):
    """`oft_linear` of checked arguments as one node of the graph; not under autocast or a functorch transform."""
    c = None if terms is None else coefficients(terms, legacy)
    q = _packed(q, _transforms.working_dtype(x))
    return autograd.PackedRotatedLinear.apply(x, weight, bias, q, c, exact)
