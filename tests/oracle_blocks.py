"""Ground truth in float64 for block rotations and butterflies, sharing no code with the package.

Skew matrices are filled number by number, powers are multiplied out, stages are explicit permutation matrices around
dense block-diagonal matrices. `peft_*` are PEFT's formulas in the dtypes they are given: the plain torch that errors
are compared with.
"""

import torch

# Terms of PEFT's Cayley-Neumann series, written out from its loops (peft/tuners/oft/layer.py, _cayley_batch).
SERIES = {
    1: (1,),
    2: (1, 2),
    3: (1, 2, 2, 1),
    4: (1, 2, 2, 1),
    5: (1, 2, 2, 2, 1),
    6: (1, 2, 2, 2, 2, 1),
    7: (1, 2, 2, 2, 2, 2, 1),
    9: (1, 2, 2, 2, 2, 2, 2, 2, 1),
}
OLD_SERIES = {1: (1,), 2: (1, 2), 3: (1, 2, 2), 5: (1, 2, 2, 2, 2), 6: (1, 2, 2, 2, 2, 2)}


def skew(q, b):
    """Packed rows [S, b (b - 1) / 2] as skew matrices, the strict upper triangle row by row."""
    matrices = []
    for row in q.unbind(0):
        numbers = iter(row.unbind(0))
        Q = [[row.new_zeros(()) for _ in range(b)] for _ in range(b)]
        for i in range(b):
            for j in range(i + 1, b):
                Q[i][j] = next(numbers)
                Q[j][i] = -Q[i][j]
        matrices.append(torch.stack([torch.stack(line) for line in Q]))
    return torch.stack(matrices)


def skew_by_index(q, b):
    """The same by fancy indexing, for sizes where number by number is slow."""
    row, column = torch.triu_indices(b, b, 1)
    Q = q.new_zeros(len(q), b, b)
    Q[:, row, column] = q
    return Q - Q.transpose(1, 2)


def cayley(A):
    """(I - A)(I + A)^-1."""
    eye = torch.eye(A.shape[-1], dtype=A.dtype)
    return (eye - A) @ torch.linalg.inv(eye + A)


def series(Q, numbers):
    """sum_k c_k Q^k, every power multiplied out."""
    return sum(c * torch.linalg.matrix_power(Q, k) for k, c in enumerate(numbers))


def blocks(q, b, terms):
    """R [S, b, b] float64; terms None is the exact map."""
    Q = skew_by_index(q.double(), b)
    return cayley(Q) if terms is None else series(Q, SERIES[terms])


def dense(R, K):
    """The block-diagonal matrix [K, K] of R [K/b, b, b], or of one block for all."""
    n = K // R.shape[-1]
    return torch.block_diag(*(R if len(R) == n else R.expand(n, -1, -1)))


def rotate(x, R, transpose=False):
    """x blockdiag(R), float64."""
    D = dense(R.double(), x.shape[-1])
    return x.double() @ (D.T if transpose else D)


def permutation(K, blocks, half):
    """P with row i = unit vector of the column that comes to place i: within each of the equal chunks, of which there
    are `blocks`, first the even units of `half` columns, then the odd ones."""
    chunk = K // blocks
    order = []
    for start in range(0, K, chunk):
        units = [list(range(u, u + half)) for u in range(start, start + chunk, half)]
        order += [column for unit in units[0::2] + units[1::2] for column in unit]
    return torch.eye(K, dtype=torch.float64)[order]


def butterfly(R):
    """B_(f-1) ... B_1 B_0 with B_s = P_s blockdiag(R_s) P_s^T, [K, K] float64, as PEFT multiplies it."""
    f, n, b, _ = R.shape
    K = n * b
    product = None
    for s in range(f):
        P = permutation(K, n // 2**s, b // 2) if f > 1 else torch.eye(K, dtype=torch.float64)
        B = P @ torch.block_diag(*R[s].double()) @ P.T
        product = B if product is None else B @ product
    return product


def skew_part(B):
    return (B - B.transpose(-1, -2)) / 2


def boft(x, weight, bias, B, scale):
    """s (x R) W^T + b, float64."""
    y = x.double() @ butterfly(cayley(skew_part(B.double()))) @ weight.double().T
    y = y if scale is None else y * scale.double().reshape(-1)
    return y if bias is None else y + bias.double()


def oft(x, weight, bias, q, b, terms=5):
    """(x R) W^T + b, float64."""
    y = rotate(x, blocks(q, b, terms)) @ weight.double().T
    return y if bias is None else y + bias.double()


def peft_blocks(q, b, terms):
    """PEFT's _cayley_batch in q's dtype (its solve knows no half precision)."""
    Q = skew_by_index(q, b)
    eye = torch.eye(b, dtype=q.dtype)
    if terms is None:
        return torch.linalg.solve(eye + Q, eye - Q, left=False)
    R = eye.repeat(len(q), 1, 1)
    power = eye.expand_as(Q)
    for c in SERIES[terms][1:]:
        power = torch.bmm(power, Q)
        R = R + c * power
    return R


def peft_rotate(x, R, transpose=False):
    """PEFT's rotation: x in R's dtype, an einsum over blocks, cast back."""
    b = R.shape[-1]
    R = R.expand(x.shape[-1] // b, b, b)
    rows = x.to(R.dtype).reshape(*x.shape[:-1], -1, b)
    z = torch.einsum("...rk,rck->...rc" if transpose else "...rk,rkc->...rc", rows, R)
    return z.reshape(x.shape).to(x.dtype)


def peft_oft(x, weight, bias, q, b, terms=5):
    return torch.nn.functional.linear(peft_rotate(x, peft_blocks(q, b, terms)), weight, bias)


def peft_cayley(B):
    """PEFT's cayley_batch over all stages, in B's dtype."""
    A = 0.5 * (B - B.transpose(-1, -2))
    eye = torch.eye(B.shape[-1], dtype=B.dtype)
    return torch.linalg.solve(eye + A, eye - A, left=False)


def peft_butterfly(x, R, transpose=False):
    """x times the dense product of the stages in R's dtype, cast back (PEFT rounds R to x's dtype; this does not)."""
    f, n, b, _ = R.shape
    K = n * b
    product = torch.eye(K, dtype=R.dtype)
    for s in range(f):
        P = (permutation(K, n // 2**s, b // 2) if f > 1 else torch.eye(K, dtype=torch.float64)).to(R.dtype)
        product = P @ torch.block_diag(*R[s]) @ P.T @ product
    return (x.to(R.dtype) @ (product.T if transpose else product)).to(x.dtype)


def peft_scale(y, scale, bias):
    """PEFT's output scale around a bias that the base layer has added, in y's dtype."""
    result = y if bias is None else y - bias
    result = result * scale.reshape(-1)
    return (result if bias is None else result + bias).to(y.dtype)


def peft_boft(x, weight, bias, B, scale):
    y = torch.nn.functional.linear(peft_butterfly(x, peft_cayley(B)), weight, bias)
    return peft_scale(y, scale, bias)
