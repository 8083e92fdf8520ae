"""CUDA C++ backend of the `householder` operations: csrc/cuda/householder_*.cu, for compute capability 8.0 and newer.

Half-precision rows are read in place and rounded once; P, S, dV have float32 accuracy (two or three tf32 products per
product), everything with T is float64. Reductions over rows have a fixed order: two runs give the same bits.
"""

import torch
import torch.nn.functional as F

from peftkern.ops import _cuda
from peftkern.ops.householder import reference

MAX_RANK = 128
_MAX_LAYERS = 64

_CODES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
_HALF = (torch.bfloat16, torch.float16)
_FACTOR, _PENALTY, _PENALTY_CORE = range(3)


def available():
    return _cuda.available()


def supports(name, *args):
    """`(ok, reason)` for one kind of call; r is bounded by the tiles of shared memory."""
    ok, reason = _cuda.serves(*args)
    if not ok:
        return ok, reason
    r = args[_V_AT[name]].shape[1]
    if r > MAX_RANK:
        return False, f"serves up to {MAX_RANK} reflections; this call has {r}"
    return True, None


_V_AT = {
    "wy_factor": 0,
    "wy_factor_backward": 1,
    "rotate": 1,
    "rotate_backward": 3,
    "rotated_linear": 3,
    "rotated_linear_backward": 5,
    "project": 1,
    "project_backward": 2,
    "orthogonality_penalty": 0,
    "orthogonality_penalty_backward": 1,
}


def _pointer(tensor):
    return 0 if tensor is None else tensor.data_ptr()


def _rows_of(x, K):
    """x [..., K] as [M, K] of unit inner stride; copies only where there is no such view."""
    rows = x.reshape(-1, K)
    return rows if rows.stride(1) == 1 or K == 1 else rows.contiguous()


def _stride(rows):
    return 0 if rows is None else rows.stride(0)


class _Core:
    """C = T^T of z = x H^T, or T when reversed, as the kernels take it: transposing swaps the strides."""

    def __init__(self, matrix, row, column, lower):
        self.matrix, self.row, self.column, self.lower = matrix, row, column, lower

    @classmethod
    def of(cls, T, reverse):
        r = T.shape[0]
        return cls(T, r, 1, False) if reverse else cls(T, 1, r, True)

    @property
    def mT(self):
        return _Core(self.matrix, self.column, self.row, not self.lower)

    def arguments(self):
        return self.matrix.data_ptr(), self.row, self.column, self.lower


# fmt: off
def _run_rows(M, like, V, x=None, z=None, P=None, S=None, core=None, given=None, saved=None, saved_out=None,
              saved_core=None, sign=-1.0, paired=False):
    """P = x V, S = P C, z = x + sign S V^T, as far as there is a tensor for it (csrc/cuda/householder_rows.cuh)."""
    if M == 0:
        return
    (K, r), library, split = V.shape, _cuda.library(), None
    if given is None and (parts := library.householder_row_parts(M, K)) > 1:
        split = V.new_empty(parts, M, r)
        S = V.new_empty(M, r) if S is None and z is not None else S
    with _cuda.guard(V):
        library.householder_rows(
            _CODES[like.dtype], _pointer(x), _stride(x), V.data_ptr(), _pointer(z), _stride(z), _pointer(P),
            _pointer(S), _pointer(split), _pointer(given), _pointer(saved), _pointer(saved_out),
            core and core.arguments(), saved_core and saved_core.arguments(), M, K, r, sign,
            paired, _cuda.stream(V),
        )


def _run_outer(like, pairs, K, r, sign=1.0, core=None):
    """sign times the sum of x^T S over pairs (x, S) [K, r] and, for core = (A, B), of A^T B [r, r] float64."""
    library, S = _cuda.library(), pairs[0][1]
    chunks = sum(library.householder_outer_chunks(x.shape[0], K) for x, _ in pairs)
    partial, dV = S.new_empty(chunks, K, r), S.new_empty(K, r)
    A, B = core or (None, None)
    rows = 0 if core is None else A.shape[0]
    core_partial = S.new_empty(library.householder_core_partials(rows, r), 1024, dtype=torch.float64)
    D = None if core is None else S.new_empty(r, r, dtype=torch.float64)
    with _cuda.guard(S):
        library.householder_outer(
            _CODES[like.dtype], [(x.data_ptr(), _stride(x), s.data_ptr(), x.shape[0]) for x, s in pairs],
            partial.data_ptr(), dV.data_ptr(), _pointer(A), _pointer(B), core_partial.data_ptr(), _pointer(D), rows,
            K, r, sign, _cuda.stream(S),
        )
    return dV, D


def _product(A, B, alpha=1.0, D=None):
    """alpha A B + D for float64 matrices of any strides."""
    (m, k), n = A.shape, B.shape[1]
    C = A.new_empty(m, n)
    if m and n:
        with _cuda.guard(A):
            _cuda.library().householder_product_f64(
                A.data_ptr(), *A.stride(), B.data_ptr(), *B.stride(), _pointer(D), 0 if D is None else D.stride(0),
                C.data_ptr(), m, n, k, alpha, _cuda.stream(A),
            )
    return C


def _run_factor(Vs, outs, job, squared=True, grad=None):
    """Jobs on the Gram matrices of several V with one r and dtype, in one launch for every 64 of them."""
    library, r = _cuda.library(), Vs[0].shape[1]
    for i in range(0, len(Vs), _MAX_LAYERS):
        some, results = Vs[i : i + _MAX_LAYERS], outs[i : i + _MAX_LAYERS]
        tiles = sum(library.householder_factor_partials(V.shape[0], r) for V in some)
        partial = some[0].new_empty(tiles, 1024, dtype=torch.float64)
        size = library.householder_factor_matrix(r)  # 0 where the device's shared memory is enough
        matrix = some[0].new_empty(len(some), size, dtype=torch.float64) if size else None
        counters = _cuda.counters(some[0], len(some))
        with _cuda.guard(some[0]):
            library.householder_factor(
                [(V.data_ptr(), out.data_ptr(), V.shape[0]) for V, out in zip(some, results, strict=True)], job, r,
                some[0].dtype is torch.float64, squared, partial.data_ptr(), _pointer(matrix), counters.data_ptr(),
                _pointer(grad), _cuda.stream(some[0]),
            )


def _run_factor_backward(dT, V, T):
    """dV = V (U + U^T + diag(dA)); V dT for a symmetric dT without T."""
    V, dT, dV = V.contiguous(), dT.contiguous(), V.new_empty(V.shape)
    with _cuda.guard(V):
        _cuda.library().householder_factor_backward(
            V.dtype is torch.float64, V.data_ptr(), _pointer(T), dT.data_ptr(), dV.data_ptr(), *V.shape,
            _cuda.stream(V),
        )
    return dV
# fmt: on


def factor_many(Vs):
    """T of each V [K, r], one dtype and r, K as it comes: one launch for every 64 layers."""
    Vs = [V.contiguous() for V in Vs]
    Ts = [V.new_empty(V.shape[1], V.shape[1], dtype=torch.float64) for V in Vs]
    _run_factor(Vs, Ts, _FACTOR)
    return Ts


def wy_factor(V):
    return factor_many([V])[0]


def wy_factor_backward(dT, V, T):
    return _run_factor_backward(dT, V, T.contiguous())


def rotate(x, V, T, reverse):
    K, r = V.shape
    rows, V, core = _rows_of(x, K), V.contiguous(), _Core.of(T.contiguous(), reverse)
    if x.dtype is torch.float64:
        P = _product(rows, V)
        return _product(_product(P, T if reverse else T.mT), V.mT, -1.0, rows).view(x.shape), P
    z, P = x.new_empty(rows.shape), V.new_empty(rows.shape[0], r)
    _run_rows(rows.shape[0], x, V, x=rows, z=z, P=P, core=core)
    return z.view(x.shape), P


def rotate_backward(dz, x, P, V, T, reverse, output_mask):
    (K, r), (want_dx, want_dV) = V.shape, output_mask
    dz_rows, rows, P, V, T = _rows_of(dz, K), _rows_of(x, K), P.contiguous(), V.contiguous(), T.contiguous()
    M, core = rows.shape[0], _Core.of(T, reverse)
    dx = x.new_empty(rows.shape) if want_dx else None
    dV = dT = None
    if x.dtype is torch.float64:
        C = T if reverse else T.mT
        Q = _product(dz_rows, V)
        R = _product(Q, C.mT)
        dx = _product(R, V.mT, -1.0, dz_rows) if want_dx else None
        if want_dV:
            dV = _product(dz_rows.mT, _product(P, C), -1.0)
            dV = _product(rows.mT, R, -1.0, dV)
            dT = _product(P.mT, Q, -1.0) if reverse else _product(Q.mT, P, -1.0)
    elif want_dV:
        Q, R, S = V.new_empty(3, M, r)
        # fmt: off
        _run_rows(M, x, V, x=dz_rows, z=dx, P=Q, S=R, core=core.mT, saved=P, saved_out=S, saved_core=core)
        # fmt: on
        pair = (P, Q) if reverse else (Q, P)
        dV, dT = _run_outer(x, [(dz_rows, S), (rows, R)], K, r, -1.0, pair)
    elif want_dx:
        _run_rows(M, x, V, x=dz_rows, z=dx, core=core.mT)
    return dx.view(x.shape) if want_dx else x.new_empty(0), *_or_empty(dV, dT, V, T)


def _or_empty(dV, dT, V, T):
    return (V.new_empty(0), T.new_empty(0)) if dV is None else (dV, dT)


def _pair_basis(V, T):
    """Vp [K, r] and the core Cp of H^T in the basis of means and differences (README.md, eq. 9)."""
    Vp, Cp = V.new_empty(V.shape), T.new_empty(T.shape)
    with _cuda.guard(V):
        _cuda.library().householder_pair_basis(
            V.data_ptr(), T.data_ptr(), Vp.data_ptr(), Cp.data_ptr(), *V.shape, _cuda.stream(V)
        )
    return Vp, Cp


def _plain_basis(B):
    """The columns of which B [N, r] has the means and differences."""
    plain = B.new_empty(B.shape)
    with _cuda.guard(B):
        _cuda.library().householder_plain_basis(B.data_ptr(), plain.data_ptr(), *B.shape, _cuda.stream(B))
    return plain


def rotated_linear(x, weight, bias, V, T, keep):
    if x.dtype not in _HALF:
        z, P = rotate(x, V, T, False)
        return F.linear(z, weight, bias), P, V.new_empty(0, V.shape[1])
    (K, r), N = V.shape, weight.shape[0]
    rows, W, V, T = _rows_of(x, K), _rows_of(weight, K), V.contiguous(), T.contiguous()
    M = rows.shape[0]
    Vp, Cp = _pair_basis(V, T)
    P, S = V.new_empty(2, M, r)
    _run_rows(M, x, Vp, x=rows, P=P, S=S, core=_Core(Cp, r, 1, True), paired=True)
    WV = V.new_empty(N, r)
    _run_rows(N, x, Vp, x=W, P=WV)
    if bias is None:
        # The update alone is rounded, to its own magnitude; the product's accumulator starts from it.
        y = x.new_empty(M, N)
        _run_rows(M, x, WV, z=y, given=S)
        y.addmm_(rows, weight.mT)
    else:
        y = _extended_linear(rows, weight, bias, S, WV, Vp, Cp)
    return y.view(*x.shape[:-1], N), P, WV if keep else V.new_empty(0, r)


def _extended_linear(rows, weight, bias, S, WV, Vp, Cp):
    """rows W^T - S WV^T + b in one product whose K is extended by 3 r, since a bias would swamp a rounded update."""
    scale = reference._balance(Vp, Cp)
    S, S_low = reference._split((S / scale).to(S.dtype), rows.dtype)
    WV, WV_low = reference._split(WV * -scale.to(WV.dtype), rows.dtype)
    pad = -3 * S.shape[1] % 32
    left = F.pad(torch.cat((rows, S, S_low, S), 1), (0, pad))
    right = F.pad(torch.cat((weight, WV, WV, WV_low), 1), (0, pad))
    return F.linear(left, right, bias)


def rotated_linear_backward(dy, x, weight, P, B, V, T, output_mask):
    if B.shape[0] == 0:
        return rotate_backward(dy.matmul(weight), x, P, V, T, False, output_mask)
    (K, r), N, (want_dx, want_dV) = V.shape, weight.shape[0], output_mask
    dy_rows, rows, W = _rows_of(dy, N), _rows_of(x, K), _rows_of(weight, K)
    P, V, core = P.contiguous(), V.contiguous(), _Core.of(T.contiguous(), False)
    M = rows.shape[0]
    WV = _plain_basis(B.contiguous())
    Q, R, S = V.new_empty(3, M, r)
    saved = {"saved": P, "saved_out": S, "saved_core": core} if want_dV else {}
    _run_rows(M, x, WV, x=dy_rows, P=Q, S=R, core=core.mT, **saved)
    dV = dT = None
    dx = x.new_empty(0)
    if want_dx:
        # As y: the update alone is rounded, and the product's accumulator starts from it.
        dx = x.new_empty(M, K)
        _run_rows(M, x, V, z=dx, given=R)
        dx = dx.addmm_(dy_rows, weight).view(x.shape)
    if want_dV:
        U, _ = _run_outer(x, [(dy_rows, S)], N, r)
        dV, dT = _run_outer(x, [(W, U), (rows, R)], K, r, -1.0, (Q, P))
    return dx, *_or_empty(dV, dT, V, T)


def project(x, V):
    rows, V = _rows_of(x, V.shape[0]), V.contiguous()
    if x.dtype is torch.float64:
        return _product(rows, V)
    P = V.new_empty(rows.shape[0], V.shape[1])
    _run_rows(rows.shape[0], x, V, x=rows, P=P)
    return P


def project_backward(dP, x, V, output_mask):
    (K, r), (want_dx, want_dV) = V.shape, output_mask
    rows, V, dP = _rows_of(x, K), V.contiguous(), dP.contiguous()
    dx, dV = x.new_empty(0), V.new_empty(0)
    if x.dtype is torch.float64:
        dx = _product(dP, V.mT).view(x.shape) if want_dx else dx
        return dx, _product(rows.mT, dP) if want_dV else dV
    if want_dx:
        dx = x.new_empty(rows.shape)
        _run_rows(rows.shape[0], x, V, z=dx, given=dP, sign=1.0)
        dx = dx.view(x.shape)
    if want_dV:
        dV, _ = _run_outer(x, [(rows, dP)], K, r)
    return dx, dV


def orthogonality_penalty(V, squared):
    V, total = V.contiguous(), V.new_empty(())
    _run_factor([V], [total], _PENALTY, squared)
    return total


def orthogonality_penalty_backward(grad, V, squared):
    V, M = V.contiguous(), V.new_empty(V.shape[1], V.shape[1], dtype=torch.float64)
    _run_factor([V], [M], _PENALTY_CORE, squared, grad.to(V.dtype))
    return _run_factor_backward(M, V, None)
