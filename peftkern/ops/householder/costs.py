"""What the launches of the `householder` operations cost: one module per backend, as in peftkern.ops._costs."""

from peftkern.ops.householder import costs_cuda, costs_triton

_TABLES = {"cuda": costs_cuda, "triton": costs_triton}


def launches(op, backend, *, M, K, N, r, dtype, family):
    if backend not in _TABLES:
        raise NotImplementedError(f"no costs are stated for {backend}")
    return _TABLES[backend].launches(op, M=M, K=K, N=N, r=r, dtype=dtype, family=family)
