"""What the launches of the `block_rotation` operations cost: one module per backend, as in peftkern.ops._costs."""

import importlib
import importlib.util


def table(package, backend):
    """The module of `package` that states the costs of a backend; raises NotImplementedError where there is none."""
    name = f"{package}.costs_{backend}"
    if backend not in ("triton", "cuda") or importlib.util.find_spec(name) is None:
        raise NotImplementedError(f"no costs are stated for {backend}")
    return importlib.import_module(name)


def launches(op, backend, *, M, K, N, b, f=1, dtype, family, shared=False, terms=5, mask=None):
    """As in peftkern.ops._costs. f is ignored; shared: one R for all blocks; terms: of the polynomial, as PEFT counts
    them; mask: which gradients are wanted, all by default. No bias.
    """
    of = table(__package__, backend)
    return of.launches(op, M=M, K=K, N=N, b=b, dtype=dtype, family=family, shared=shared, terms=terms, mask=mask)
