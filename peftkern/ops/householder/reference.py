"""Reference backend of the `householder` operations: plain torch, any device, differentiable when called directly.

    A = striu(V^T V) + diag(||v||^2 / 2),  T = A^-1,  H = H_0 ... H_{r-1} = I - V T V^T     (README.md, eq. 1 to 3)

Half-precision rows are computed in V's dtype and rounded once, at the end. Products with the r x r matrix are float64:
its entries cancel where columns are nearly parallel (README.md, error bounds).
"""

import torch
import torch.nn.functional as F

from peftkern.ops._transforms import without_autocast

HALF = (torch.bfloat16, torch.float16)


def _core(T, reverse):
    """The matrix C of z = x - (x V) C V^T."""
    return T if reverse else T.mT


def _times(P, C):
    """P C in P's dtype, through float64, for a C [r, r]."""
    return (P.double() @ C).to(P.dtype)


@without_autocast
def wy_factor(V):
    """V [K, r] -> T [r, r] float64, upper triangular; a zero column gives a zero row and column: the identity."""
    G = V.double().mT @ V.double()
    norms = G.diagonal()
    zero = (norms == 0).to(G.dtype)
    A = torch.triu(G, 1) + torch.diag_embed(norms / 2 + zero)
    T = torch.linalg.solve_triangular(A, torch.eye(len(A), dtype=A.dtype, device=A.device), upper=True)
    return T - torch.diag_embed(zero)


@without_autocast
def wy_factor_backward(dT, V, T):
    """dA = -T^T dT T^T on the upper triangle; dV = V (U + U^T + diag(dA)), U = striu(dA)."""
    dA = torch.triu(-T.mT @ dT @ T.mT)
    dG = dA + torch.triu(dA, 1).mT
    return _times(V, dG)


@without_autocast
def rotate(x, V, T, reverse):
    """z = x - P C V^T with P = x V [M, r] and C = T^T (T when reversed); z like x, P in V's dtype."""
    rows = x.reshape(-1, x.shape[-1]).to(V.dtype)
    P = rows @ V
    z = torch.addmm(rows, _times(P, _core(T, reverse)), V.mT, alpha=-1)
    return z.to(x.dtype).reshape(x.shape), P


@without_autocast
def rotate_backward(dz, x, P, V, T, reverse, output_mask):
    """With S = P C, Q = dz V, R = Q C^T:  dx = dz - R V^T,  dV = -dz^T S - x^T R,  dC = -P^T Q."""
    want_dx, want_dV = output_mask
    dz_rows = dz.reshape(-1, dz.shape[-1]).to(V.dtype)
    C = _core(T, reverse)
    Q = dz_rows @ V
    R = _times(Q, C.mT)
    dx = torch.addmm(dz_rows, R, V.mT, alpha=-1).to(dz.dtype).reshape(dz.shape) if want_dx else dz.new_empty(0)
    if not want_dV:
        return dx, V.new_empty(0), T.new_empty(0)
    x_rows = x.reshape(-1, x.shape[-1]).to(V.dtype)
    dV = -(dz_rows.mT @ _times(P, C)) - x_rows.mT @ R
    dC = -(P.double().mT @ Q.double())
    return dx, dV, dC if reverse else dC.mT


def pairs(V):
    """Vp: the columns of V as [(v0 + v1) / 2, v0 - v1, ...], an odd last one as it is."""
    even = V.shape[1] - V.shape[1] % 2
    v0, v1 = V[:, 0:even:2], V[:, 1:even:2]
    return torch.cat((torch.stack(((v0 + v1) / 2, v0 - v1), dim=2).flatten(1), V[:, even:]), dim=1)


def plain_basis(B):
    """The columns of which B = `pairs` has the means and differences."""
    even = B.shape[1] - B.shape[1] % 2
    mean, half = B[:, 0:even:2], B[:, 1:even:2] / 2
    return torch.cat((torch.stack((mean + half, mean - half), dim=2).flatten(1), B[:, even:]), dim=1)


def pair_basis(V, T, reverse):
    """(Vp, Cp) with V C V^T = Vp Cp Vp^T, columns paired as Vp = [(v0 + v1) / 2, v0 - v1, ...] (README.md, eq. 9).

    HRA starts from equal pairs whose products cancel. In this basis the cancellation happens in float64, inside the
    r x r matrix, and Vp and Cp can be rounded to half precision without losing the update.
    """
    Vp, r = pairs(V), V.shape[1]
    even = r - r % 2
    basis = torch.eye(r, dtype=T.dtype, device=T.device)
    pair = torch.tensor([[1.0, 0.5], [1.0, -0.5]], dtype=T.dtype, device=T.device)
    for i in range(0, even, 2):
        basis[i : i + 2, i : i + 2] = pair.mT
    return Vp, basis @ _core(T, reverse) @ basis.mT


def _balance(Vp, Cp):
    """Powers of two s [r] that bring x Vp Cp / s and W Vp s to one magnitude: float16 has no exponents to spare."""
    right = Vp.detach().double().norm(dim=0)
    left = right @ Cp.detach().abs()
    ratio = torch.where((left > 0) & (right > 0), left / right, torch.ones_like(left))
    return torch.exp2(torch.round(torch.log2(ratio) / 2))


def _split(t, dtype):
    """t as a sum of two tensors of a dtype: rounded once, the small factors would cost more than rounding y does."""
    high = t.to(dtype)
    return high, (t - high).to(dtype)


@without_autocast
def rotated_linear(x, weight, bias, V, T, keep):
    """y = x H^T W^T + b with one accumulator and one rounding: [x, x Vp Cp / s] [W, -W Vp s]^T (README.md, eq. 10).

    Also P = x V [M, r] and, to keep for the backward in half precision, B = W Vp [N, r] (else [0, r]), in V's dtype.
    """
    if x.dtype not in HALF:
        z, P = rotate(x, V, T, False)
        return F.linear(z, weight, bias), P, V.new_empty(0, V.shape[1])
    rows = x.reshape(-1, x.shape[-1])
    Vp, Cp = pair_basis(V, T, reverse=False)
    scale = _balance(Vp, Cp)
    S, S_low = _split(_times(rows.to(V.dtype) @ Vp, Cp / scale), x.dtype)
    B = weight.to(V.dtype) @ Vp
    WV, WV_low = _split(B * -scale.to(V.dtype), x.dtype)
    pad = -3 * V.shape[1] % 32
    left = F.pad(torch.cat((rows, S, S_low, S), 1), (0, pad))
    right = F.pad(torch.cat((weight, WV, WV, WV_low), 1), (0, pad))
    y = F.linear(left, right, bias)
    return y.reshape(*x.shape[:-1], weight.shape[0]), rows.to(V.dtype) @ V, B if keep else B[:0]


@without_autocast
def rotated_linear_backward(dy, x, weight, P, B, V, T, output_mask):
    """rotate_backward of dz = dy W, whose rounding to half precision reaches dx alone (README.md, eq. 11); everything,
    as where a base layer gives it, where the forward has left no B.

    With Q = dy W V, R = Q T, S = P T^T:  dx = dz - R V^T,  dV = -W^T (dy^T S) - x^T R,  dT = -Q^T P. W V comes from the
    B = W Vp that the forward has left.
    """
    want_dx, want_dV = output_mask
    if B.shape[0] == 0:
        return rotate_backward(dy.matmul(weight), x, P, V, T, False, output_mask)
    dy_rows, W = dy.reshape(-1, dy.shape[-1]).to(V.dtype), weight.to(V.dtype)
    Q = dy_rows @ plain_basis(B)
    R = _times(Q, T)
    dx = x.new_empty(0)
    if want_dx:
        dz = dy.matmul(weight).reshape(-1, x.shape[-1]).to(V.dtype)
        dx = torch.addmm(dz, R, V.mT, alpha=-1).to(x.dtype).reshape(x.shape)
    if not want_dV:
        return dx, V.new_empty(0), T.new_empty(0)
    S = _times(P, T.mT)
    dV = -(W.mT @ (dy_rows.mT @ S)) - x.reshape(-1, x.shape[-1]).to(V.dtype).mT @ R
    return dx, dV, -(Q.double().mT @ P.double())


@without_autocast
def project(x, V):
    """P = x V [M, r] in V's dtype."""
    return x.reshape(-1, x.shape[-1]).to(V.dtype) @ V


@without_autocast
def project_backward(dP, x, V, output_mask):
    """dx = dP V^T in x's dtype, dV = x^T dP in V's dtype."""
    want_dx, want_dV = output_mask
    dx = (dP @ V.mT).to(x.dtype).reshape(x.shape) if want_dx else x.new_empty(0)
    return dx, x.reshape(-1, x.shape[-1]).to(V.dtype).mT @ dP if want_dV else V.new_empty(0)


def _cosines(V):
    """1 / ||v_j|| (0 for a zero column) and the off-diagonal cosines, float64."""
    G = V.double().mT @ V.double()
    squares = G.diagonal()
    scale = torch.where(squares > 0, squares, torch.inf).rsqrt()
    C = G * scale * scale[:, None]
    return scale, C - torch.diag_embed(C.diagonal())


def _root(total):
    """The square root, with derivative 0 at 0."""
    return torch.where(total > 0, total, torch.ones_like(total)).sqrt() * (total > 0)


@without_autocast
def orthogonality_penalty(V, squared):
    """||I - U^T U||_F^2 over the unit columns U of V (its root unless squared); zero columns count nothing."""
    total = _cosines(V)[1].square().sum()
    return (total if squared else _root(total)).to(V.dtype)


@without_autocast
def orthogonality_penalty_backward(grad, V, squared):
    """dV = 4 g V D (C - diag(sum_i C_ij^2)) D with D = 1 / ||v||, C off-diagonal; the root divides by 2 sqrt."""
    scale, C = _cosines(V)
    squares = C.square().sum(0)
    factor = 4 * grad.double()
    if not squared:
        total = squares.sum()
        factor = torch.where(total > 0, factor / (2 * _root(total) + (total == 0)), torch.zeros_like(factor))
    M = factor * (C - torch.diag_embed(squares)) * scale * scale[:, None]
    return _times(V, M)
