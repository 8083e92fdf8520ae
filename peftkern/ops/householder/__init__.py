"""Chains of Householder reflections in compact WY form: H = H_0 H_1 ... H_{r-1} = I - V T V^T.

The columns of u [K, r] are the reflection vectors, of any length; a zero column is the identity. Source: Schreiber and
Van Loan 1989 (compact WY), Yuan et al. 2024, arXiv:2405.17484 (HRA). Derivations: README.md in this folder.
"""

import torch

from peftkern.ops import _checks, _transforms
from peftkern.ops.gram_schmidt import reference as gs_reference
from peftkern.ops.gram_schmidt.autograd import OrthonormalFactor
from peftkern.ops.householder import autograd, contract, reference  # noqa: F401  (contract registers the operations)

PRECISIONS = ("auto", "fast", "exact")
HALF = (torch.bfloat16, torch.float16)


def check_precision(precision):
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}")
    return precision


def _check(op, u, **rows):
    """u [K, r] and each of rows [..., K]: floating, plain, on one device, of matching width."""
    _checks.plain(op, u=u, **rows)
    _checks.floating(op, "u", u)
    if u.dim() != 2 or u.shape[0] < 1 or u.shape[1] < 1:
        raise ValueError(f"{op}: u must have shape [K, r] with K >= 1 and r >= 1; got {_checks.describe(u)}")
    for name, tensor in rows.items():
        _checks.floating(op, name, tensor)
        if tensor.dim() < 1 or tensor.shape[-1] != u.shape[0]:
            raise ValueError(
                f"{op}: the last dimension of {name} must be {u.shape[0]}, the number of rows of u; "
                f"got {_checks.describe(tensor)}"
            )
    _checks.same_device(op, u=u, **rows)


def factor(u, dtype=torch.float32, gram_schmidt=False):
    """The pair (V, T) of H = I - V T V^T, differentiable in u.

    Args:
        u: [K, r], floating.
        dtype: float32, or float64 for float64 activations: the dtype of V.
        gram_schmidt: orthonormalise the columns first, H = I - 2 Q Q^T (the apply_GS of PEFT's HRA).

    Returns:
        V [K, r] in `dtype`, the columns of u (with gram_schmidt an orthonormal basis of them), and T [r, r] float64.
    """
    V = u.to(dtype)
    by_formula = _transforms.needs_reference()
    if gram_schmidt:
        # Q stands for V: H depends on the span alone (gram_schmidt/README.md, eq. 2).
        return gs_reference.orthonormal_factor(V)[:2] if by_formula else OrthonormalFactor.apply(V)
    return V, reference.wy_factor(V) if by_formula else autograd.WYFactor.apply(V)


def factor_many(us, dtype=torch.float32):
    """`factor` of several u at once, differentiable in each: on GPUs all that share r, up to 64, take one launch.

    Args:
        us: list of [K, r], floating, on one device; K and r as they come.
        dtype: as in `factor`.

    Returns:
        A list of pairs (V, T), in the order of us, each with the bits that `factor` returns.
    """
    if torch.compiler.is_compiling() or _transforms.needs_reference():
        return [factor(u, dtype) for u in us]
    Vs, Ts = [u.to(dtype) for u in us], {}
    for r in {V.shape[1] for V in Vs}:
        alike = [i for i, V in enumerate(Vs) if V.shape[1] == r]
        Ts |= zip(alike, autograd.WYFactors.apply(*(Vs[i] for i in alike)), strict=True)
    return [(V, Ts[i]) for i, V in enumerate(Vs)]


def compose(factors):
    """One (V, T) for the product H_1 H_2 ... of several: T = [[T1, -T1 V1^T V2 T2], [0, T2]] (README.md, eq. 7)."""
    V, T = factors[0]
    for V2, T2 in factors[1:]:
        corner = -T @ (V.double().mT @ V2.double()) @ T2
        top, bottom = torch.cat((T, corner), 1), torch.cat((torch.zeros_like(corner.mT), T2), 1)
        V, T = torch.cat((V, V2), 1), torch.cat((top, bottom), 0)
    return V, T


def _by_formula(V, T, gram_schmidt):
    return (V, T) if T is not None else factor(V, V.dtype, gram_schmidt)


def apply_factor(x, V, T=None, reverse=False, gram_schmidt=False):
    """z = x H^T (x H when reversed) for a factor (V, T), without T for `factor` of V with or without `gram_schmidt`.

    x [..., K] is float64 exactly when V is. Returns z like x.
    """
    if _transforms.needs_reference():
        return reference.rotate(x, *_by_formula(V, T, gram_schmidt), reverse)[0]
    if T is None:
        return autograd.Reflect.apply(x, V, reverse, gram_schmidt)
    return autograd.Rotate.apply(x, V, T, reverse)


def apply_factor_linear(x, weight, bias, V, T=None, exact=True, gram_schmidt=False):
    """y = x H^T W^T + b as `apply_factor`, in one accumulator where `exact`; x and weight share one dtype.

    Returns y [..., N].
    """
    if _transforms.needs_reference():
        V, T = _by_formula(V, T, gram_schmidt)
        if exact:
            return reference.rotated_linear(x, weight, bias, V, T, False)[0]
        return torch.nn.functional.linear(reference.rotate(x, V, T, False)[0], weight, bias)
    if T is None:
        return autograd.ReflectedLinear.apply(x, weight, bias, V, exact, gram_schmidt)
    return autograd.RotatedLinear.apply(x, weight, bias, V, T, exact)


def rotate(x, u, reverse=False):
    """Rotate every row of x by the chain of reflections: z = x H^T, so that z W^T = x (W H)^T.

    Args:
        x: [..., K], float64, float32, bfloat16 or float16; any strides.
        u: [K, r], r >= 1, any floating dtype (float32 parameters under half-precision x are the usual case; no
            float32 copy of x is made by the native backends).
        reverse: rotate by the inverse, z = x H.

    Returns:
        z, shape and dtype of x, from float32 accumulators (float64 for float64), rounded once.

    Raises:
        TypeError: integer or non-plain tensors. ValueError: shapes or devices that do not match.

    Source: arXiv:2405.17484, section 3.1; compact WY: Schreiber and Van Loan 1989; README.md, eq. 1 to 6.
    """
    if not torch.compiler.is_compiling():
        _check("rotate", u, x=x)
    dtype = _transforms.working_dtype(x, u)
    rows = x.to(dtype) if dtype is torch.float64 else x
    return apply_factor(rows, u.to(dtype), reverse=reverse).to(x.dtype)


def hra_linear(x, weight, bias, u, precision="auto"):
    """The HRA linear map y = x (W H)^T + b without a module.

    Args:
        x: [..., K]; weight: [N, K]; bias: [N] or None; all in one floating dtype.
        u: [K, r], any floating dtype.
        precision: "fast" rounds the rotated x once before the product; "exact" brings the update into the product's
            accumulator, so that half precision keeps updates far below one ulp of x; "auto" is exact in half precision.

    Returns:
        y [..., N] in x's dtype. Differentiable in x, weight, bias and u.

    Raises:
        TypeError, ValueError: as `rotate`, or for a precision that does not exist.

    Source: arXiv:2405.17484, section 3.1; README.md, eq. 4 and 10.
    """
    if not torch.compiler.is_compiling():
        check_precision(precision)
        _check("hra_linear", u, x=x, weight=weight)
        if weight.dim() != 2 or weight.dtype is not x.dtype:
            raise ValueError(
                f"hra_linear: weight must be [N, {u.shape[0]}] in x's dtype {x.dtype}; got {_checks.describe(weight)}"
            )
        if bias is not None:
            _checks.same_device("hra_linear", x=x, bias=bias)
            if bias.shape != weight.shape[:1] or bias.dtype is not x.dtype:
                raise ValueError(
                    f"hra_linear: bias must be {x.dtype} of shape {[weight.shape[0]]}; got {_checks.describe(bias)}"
                )
    V = u.to(_transforms.working_dtype(x))
    return apply_factor_linear(x, weight, bias, V, exact=precision != "fast")


def low_rank_form(weight, u, gram_schmidt=False):
    """The exact low-rank form of an HRA layer: W H = W + B A with rank r, in the pair basis.

    Args:
        weight: [N, K], any floating dtype; u: [K, r], floating.
        gram_schmidt: orthonormalise the columns first (apply_GS).

    Returns:
        A [r, K] and B [N, r], float32 (float64 if weight or u is): y = x W^T + (x A^T) B^T. Neighbouring columns enter
        A as their mean and difference, so A and B keep a small update when they are rounded to half precision.

    Raises:
        TypeError, ValueError: as `rotate`.

    Source: README.md, eq. 8 and 9.
    """
    if not torch.compiler.is_compiling():
        _check("low_rank_form", u, weight=weight)
        if weight.dim() != 2:
            raise ValueError(f"low_rank_form: weight must be [N, K = {u.shape[0]}]; got {_checks.describe(weight)}")
    dtype = _transforms.working_dtype(weight, u)
    if gram_schmidt:
        # A is the basis itself here, so the triangular factor does not count as a constant.
        u = u.double() @ gs_reference.orthonormaliser(u.to(dtype))
    V, T = factor(u, dtype, gram_schmidt)
    Vp, Cp = reference.pair_basis(V, T, reverse=True)
    rows = weight.to(dtype) if dtype is torch.float64 else weight
    project = reference.project if _transforms.needs_reference() else autograd.Project.apply
    return Vp.mT, -(project(rows, Vp).double() @ Cp).to(dtype)


def orthogonality_penalty(u, weight=1.0, squared=True):
    """weight * ||I - U^T U||_F^2 over the unit columns U of u: pulls the reflections towards orthogonality.

    Args:
        u: [K, r], floating; zero columns count nothing.
        weight: lambda, a float.
        squared: the squared norm (default) has a smooth gradient at the optimum, where the paper's unsquared norm has
            0/0; with `squared=False` the gradient there is taken as 0.

    Returns:
        A 0-dimensional tensor, float32 (float64 for float64 u), differentiable in u.

    Source: arXiv:2405.17484, section 3 (the regulariser of HRA); README.md, eq. 12 and 13.
    """
    if not torch.compiler.is_compiling():
        _check("orthogonality_penalty", u)
    V = u.to(_transforms.working_dtype(u))
    if _transforms.needs_reference():
        return weight * reference.orthogonality_penalty(V, squared)
    return weight * autograd.Penalty.apply(V, squared)
