"""Reference backend of the `gram_schmidt` operations: plain torch, any device.

    Q an orthonormal basis of span(V):  H = I - 2 Q Q^T = I - V T V^T,  T = 2 (V^T V)^-1     (README.md, eq. 1)

Gram-Schmidt meets the columns from left to right; one that depends on those before it (relative squared residual
below 8 K eps of float64) is dropped: its row and column of T are zero, and so is its gradient.
"""

import torch


def _threshold(V):
    return 8 * V.shape[0] * torch.finfo(torch.float64).eps


def _independent(C, threshold):
    """Which columns Gram-Schmidt keeps, from the cosine matrix C [r, r]: a boolean [r]."""
    r = len(C)
    rest = C.clone()
    keep = torch.zeros(r, dtype=torch.bool, device=C.device)
    for j in range(r):
        pivot = rest[j, j]
        keep[j] = pivot > threshold
        row = torch.where(keep[j], rest[j] / pivot, torch.zeros_like(rest[j]))
        rest = rest - rest[:, j, None] * row
    return keep


def projector_factor(V):
    """V [K, r] -> T [r, r] float64, symmetric, zero in the rows and columns of dropped columns."""
    G = V.double().mT @ V.double()
    norms = G.diagonal()
    scale = torch.where(norms > 0, norms.clamp_min(torch.finfo(G.dtype).tiny).rsqrt(), torch.zeros_like(norms))
    C = G * scale * scale[:, None]
    keep = _independent(C.detach(), _threshold(V)).to(G.dtype)
    masked = C * keep * keep[:, None] + torch.diag_embed(1 - keep)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(masked)) - torch.diag_embed(1 - keep)
    return 2 * inverse * scale * scale[:, None]


def projector_factor_backward(dT, V, T):
    """dG = -T dT T / 2 made symmetric; dV = V (dG + dG^T)."""
    dG = -T @ dT @ T / 2
    return V @ (dG + dG.mT).to(V.dtype)
