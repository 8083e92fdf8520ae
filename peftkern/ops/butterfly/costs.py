"""What the launches of the `butterfly` operations cost: one module per backend, as in peftkern.ops._costs."""

from peftkern.ops.block_rotation.costs import table


def launches(op, backend, *, M, K, N, b, f=1, dtype, family, shared=False, terms=5, mask=None):
    """As in peftkern.ops._costs: f stages of blocks of b, an output scale and no bias; mask: which gradients are
    wanted, all by default. shared and terms are block_rotation's.
    """
    return table(__package__, backend).launches(op, M=M, K=K, N=N, b=b, f=f, dtype=dtype, family=family, mask=mask)
