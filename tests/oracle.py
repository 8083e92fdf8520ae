"""Ground truth in float64, sharing no code with the package: explicit products of reflections, Gram-Schmidt, autograd.

`peft_*` are the formulas of PEFT's HRA layer in the dtypes it is given: the plain torch that errors are compared with.
"""

import torch


def unit(columns):
    """The columns at unit length; zero columns stay zero."""
    return torch.stack([v / v.norm() if bool(v.norm() > 0) else v for v in columns.unbind(1)], 1)


def chain(u, reverse=False):
    """H = H_0 H_1 ... H_{r-1} (its inverse when reversed), one reflection after the other; [K, K] float64."""
    H = torch.eye(u.shape[0], dtype=torch.float64)
    for v in unit(u.double()).unbind(1):
        H = H - 2 * torch.outer(v, v @ H) if reverse else H - 2 * torch.outer(H @ v, v)
    return H


def orthonormal_basis(u, dependent=1e-6):
    """Modified Gram-Schmidt from left to right, each column met twice; a column whose rest is small is left out."""
    basis = []
    for v in u.double().unbind(1):
        length = v.norm()
        rest = v
        for _ in range(2):
            for q in basis:
                rest = rest - (q @ rest) * q
        if bool(rest.norm() > dependent * length):
            basis.append(rest / rest.norm())
    return torch.stack(basis, 1) if basis else u.double()[:, :0]


def gram_schmidt_chain(u):
    """I - 2 Q Q^T with Q an orthonormal basis of the columns of u; [K, K] float64."""
    Q = orthonormal_basis(u)
    return torch.eye(u.shape[0], dtype=torch.float64) - 2 * Q @ Q.T


def rotate(x, u, reverse=False):
    """x H^T (x H when reversed), float64."""
    H = chain(u, reverse)
    return (x.double().reshape(-1, x.shape[-1]) @ H.T).reshape(x.shape)


def linear(x, weight, bias, u):
    """x (W H)^T + b, float64."""
    y = x.double() @ (weight.double() @ chain(u)).T
    return y if bias is None else y + bias.double()


def penalty(u, squared=True):
    """||I - U^T U||_F^2 (its root unless squared) over the non-zero columns at unit length, float64."""
    U = unit(u.double()[:, (u.detach() != 0).any(0)])
    total = (torch.eye(U.shape[1], dtype=torch.float64) - U.T @ U).fill_diagonal_(0).square().sum()
    return total if squared else total.sqrt()


def peft_chain(u):
    """PEFT's get_delta_weight, in u's dtype."""
    u = u / u.norm(dim=0)
    H = torch.eye(u.shape[0], dtype=u.dtype)
    for i in range(u.shape[1]):
        column = u[:, i].view(-1, 1)
        H = H - 2 * H @ column @ column.t()
    return H


def peft_rotate(x, u):
    """The rotation as PEFT would write it: in the parameter's dtype, cast back."""
    return (x.to(u.dtype) @ peft_chain(u).T).to(x.dtype)


def peft_linear(x, weight, bias, u):
    """PEFT's HRALinear.forward: everything in the parameter's dtype, cast back at the end."""
    weight = weight.to(u.dtype) @ peft_chain(u)
    y = torch.nn.functional.linear(x.to(u.dtype), weight, None if bias is None else bias.to(u.dtype))
    return y.to(x.dtype)


def black_box_linear(x, weight, bias, u):
    """PEFT's rotation before a base layer that keeps its own dtype: the plain form of `precision="fast"`."""
    return torch.nn.functional.linear(peft_rotate(x, u), weight, bias)


def value_and_gradients(function, tensors, incoming):
    """`function(*tensors)` and the gradients of <output, incoming> in every tensor, on fresh leaves."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    value = function(*leaves)
    return value.detach(), *torch.autograd.grad(value, leaves, incoming.to(value.dtype))


def error(seen, truth):
    """Relative Frobenius distance; absolute where the truth is zero."""
    norm = truth.double().norm()
    return ((seen.double() - truth.double()).norm() / (norm if norm > 0 else 1)).item()


def orthogonality_error(H):
    """||H^T H - I||_2."""
    H = H.double()
    return torch.linalg.eigvalsh(H.T @ H - torch.eye(len(H), dtype=torch.float64)).abs().max().item()


def assert_as_good_as(names, seen, plain, truth, length, factor=2):
    """Each error is at most `factor` times that of plain torch in the same dtype, both against float64.

    The absolute part, 1/4 ulp of the arithmetic times the root of the reduction's length, is for plain results that are
    exact by luck.
    """
    for name, ours, theirs, exact in zip(names, seen, plain, truth, strict=True):
        arithmetic = torch.float64 if ours.dtype is torch.float64 else torch.float32
        floor = torch.finfo(arithmetic).eps / 4 * length**0.5
        bound = factor * error(theirs, exact) + floor
        assert error(ours, exact) <= bound, f"{name}: error {error(ours, exact):.2e}, allowed {bound:.2e}"
