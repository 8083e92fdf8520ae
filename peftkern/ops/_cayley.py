"""Cayley maps of small skew blocks in plain torch, shared by the references of `block_rotation` and `butterfly`.

exact       R = (I - A)(I + A)^-1                   A [..., b, b] skew
polynomial  R = c_0 I + c_1 A + ... + c_d A^d       (block_rotation/README.md, eq. 2 and 3)
"""

import torch


def identity_like(blocks):
    return torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)


def cayley(A):
    """(I - A)(I + A)^-1 through float64: I + A has a positive definite symmetric part, so it is never singular."""
    wide = A.double()
    eye = identity_like(wide)
    return torch.linalg.solve(eye + wide, eye - wide, left=False).to(A.dtype)


def cayley_backward(dR, R):
    """dA = -(I + R)^T dR (I + R)^T / 2, because (I + A)^-1 = (I + R) / 2: the backward solves nothing."""
    S = (R + identity_like(R)).mT
    return S @ dR @ S / -2


def polynomial(A, coefficients):
    """sum_k c_k A^k by Horner's rule."""
    eye = identity_like(A)
    X = (coefficients[-1] * eye).expand(A.shape)
    for c in reversed(coefficients[:-1]):
        X = c * eye + A @ X
    return X


def polynomial_backward(dR, A, coefficients):
    """dA of `polynomial`; Horner's partial results are computed again, not kept."""
    eye = identity_like(A)
    partial = [(coefficients[-1] * eye).expand(A.shape)]
    for c in reversed(coefficients[1:-1]):
        partial.append(c * eye + A @ partial[-1])
    dA, dX = torch.zeros_like(A), dR
    for X in reversed(partial[: len(coefficients) - 1]):
        dA = dA + dX @ X.mT
        dX = A.mT @ dX
    return dA


def skew_part(A):
    return (A - A.mT) / 2
