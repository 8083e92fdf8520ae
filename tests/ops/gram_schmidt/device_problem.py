"""One call of each operation, of a shape and dtype, for the tests of the device backends' kernels."""

import torch

from peftkern.ops.gram_schmidt import costs

ops = torch.ops.peftkern
SHAPES = ((64, 8), (123, 17), (96, 32), (130, 45), (160, 100))  # K, r


def run(K, r, dtype=torch.float32, duplicate=False):
    """The results of orthonormal_factor and its backward; with a column twice, orthonormalisation goes the long way."""
    generator = torch.Generator().manual_seed(K + r)
    V, dQ = torch.randn(2, K, r, generator=generator, dtype=torch.float64).to(dtype)
    dT = torch.randn(r, r, generator=generator, dtype=torch.float64)
    if duplicate:
        V[:, -1] = V[:, 0] * (1 + 1e-4 * dQ[:, 0])
    Q, T, B = ops.orthonormal_factor(V)
    return Q, T, B, ops.orthonormal_factor_backward(dQ, dT, Q, B)


def assert_counts_are_the_formulas(launches, backend, K, r):
    """Bytes and tensor-core flops of each launch, in order."""
    shape = {"M": 0, "K": K, "N": 0, "r": r, "dtype": torch.float32, "family": "sm80"}
    names = ("orthonormal_factor", "orthonormal_factor_backward")
    expected = [launch for name in names for launch in costs.launches(name, backend, **shape)]
    for launch, wanted in zip(launches, expected, strict=True):
        counts = launch.counts
        assert 0.9 * wanted.read <= counts.global_bytes_read <= 1.1 * wanted.read, wanted.kernel
        assert 0.9 * wanted.written <= counts.global_bytes_written <= 1.1 * wanted.written, wanted.kernel
        tensor, flops = dict(counts.flops).get("tensor_fp64", 0), wanted.flops.get("tensor_fp64", 0)
        assert 0.9 * flops <= tensor <= 1.1 * flops, wanted.kernel
