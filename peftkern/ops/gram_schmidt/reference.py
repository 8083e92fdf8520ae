"""Reference backend of the `gram_schmidt` operations: plain torch, any device.

    Q an orthonormal basis of span(V):  H = I - 2 Q Q^T = I - Q T Q^T,  T = 2 (Q^T Q)^-1     (README.md, eq. 1 to 3)

Gram-Schmidt meets the columns from left to right; one that depends on those before it (relative squared residual
below 8 K eps of float64) is dropped: its column of Q and its row and column of T are zero, and so is its gradient.
"""

import torch

from peftkern.ops._transforms import without_autocast


def _threshold(V):
    return 8 * V.shape[0] * torch.finfo(torch.float64).eps


def _independent(C, threshold):
    """Which columns Gram-Schmidt keeps, from the cosine matrix C [r, r]: a boolean [r]."""
    rest, keep = C, []
    for j in range(len(C)):
        pivot = rest[j, j]
        keep.append(pivot > threshold)
        row = torch.where(keep[j], rest[j] / pivot, torch.zeros_like(rest[j]))
        rest = rest - rest[:, j, None] * row
    return torch.stack(keep)


def _gram(V):
    """What both factors start from: the Cholesky factor L of the kept columns' cosines (identity in the dropped rows
    and columns), 1 / ||v_j||, and which columns are kept (1 or 0); all float64."""
    G = V.double().mT @ V.double()
    squares = G.diagonal()
    scale = torch.where(squares == 0, torch.inf, squares).rsqrt()
    C = G * scale * scale[:, None]
    keep = _independent(C.detach(), _threshold(V)).to(G.dtype)
    masked = C * keep * keep[:, None] + torch.diag_embed(1 - keep)
    return torch.linalg.cholesky_ex(masked)[0], scale, keep


@without_autocast
def projector_factor(V):
    """T = 2 (V^T V)^-1 [r, r] float64 with I - V T V^T = I - 2 Q Q^T; dropped columns have zero rows and columns."""
    L, scale, keep = _gram(V)
    inverse = torch.cholesky_inverse(L) - torch.diag_embed(1 - keep)
    return 2 * inverse * scale * scale[:, None]


@without_autocast
def orthonormaliser(V):
    """V [K, r] -> B [r, r] float64 upper triangular with V B orthonormal, zero columns for the dropped ones."""
    L, scale, keep = _gram(V)
    eye = torch.eye(len(L), dtype=L.dtype, device=L.device)
    return scale[:, None] * torch.linalg.solve_triangular(L.mT, eye, upper=True) * keep


@without_autocast
def orthonormal_factor(V):
    """V [K, r] -> Q = V B like V, T = 2 (Q^T Q)^-1 and B, float64; differentiable, with B as a constant.

    Other backends orthonormalise a second time where B is inaccurate, and take 2 I for T, which then differs from it by
    rounding; but the derivatives of H, of any order, are those of this T.
    """
    B = orthonormaliser(V.detach())
    Q = (V.double() @ B).to(V.dtype)
    return Q, projector_factor(Q), B


@without_autocast
def orthonormal_factor_backward(dQ, dT, Q, B):
    """dG = -T dT T / 2 for T = 2 G^-1, G = Q^T Q;  dV = (dQ + Q (dG + dG^T)) B^T."""
    T = projector_factor(Q)
    dG = -T @ dT @ T / 2
    return ((dQ.double() + Q.double() @ (dG + dG.mT)) @ B.mT).to(Q.dtype)
