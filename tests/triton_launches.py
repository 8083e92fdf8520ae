"""What tests ask of the launches of Triton kernels on the simulated machine, whichever family they belong to."""

from importlib.metadata import version

import torch


def _old():
    return version("triton").startswith("3.6.")


def close(seen, stated):
    return 0.9 * stated <= seen <= 1.1 * stated


def holds(launches, stated):
    """The launches seen are the stated ones, in bytes, flops and blocks; products of the library are not seen."""
    stated = [launch for launch in stated if not launch.kernel.startswith("library")]
    assert [launch.kernel for launch in launches] == [launch.kernel for launch in stated]
    for seen, launch in zip(launches, stated, strict=True):
        counts, (x, y, z) = seen.counts, seen.grid
        assert x * y * z == launch.blocks, launch.kernel
        assert close(counts.global_bytes_read, launch.read), launch.kernel
        assert close(counts.global_bytes_written, launch.written), launch.kernel
        assert counts.unique_bytes <= 1.1 * launch.unique, launch.kernel
        for kind, flops in launch.flops.items():
            # Triton 3.6 has warps repeat each other's rows of a float64 product.
            repeats = 2 if kind == "tensor_fp64" and _old() else 1
            assert 0.9 * flops <= counts.flops[kind] <= 1.1 * repeats * flops, f"{launch.kernel}: {kind}"


def whole_sectors(launches, names):
    """Rows are read without gaps: no sector of 32 bytes that is asked for twice or for a part."""
    for launch in launches:
        for name in names & launch.counts.tensors.keys():
            traffic = launch.counts.tensors[name]
            assert 32 * traffic.sectors_read <= 1.1 * traffic.read + 32, f"{launch.kernel}: {name}"


def no_bank_conflicts(launches, old=()):
    """No access to shared memory takes more wavefronts than its bytes.

    old: kernels of which Triton 3.6, not 3.9, lays out a sum over lanes or a float64 product otherwise.
    """
    for launch in launches:
        if launch.kernel not in old or not _old():
            assert launch.counts.bank_conflicts == 0, f"{launch.kernel}: {launch.counts.lines('conflicts')}"


def bits(result):
    """All numbers of a result in one row, to compare two runs with."""
    result = result if isinstance(result, tuple) else (result,)
    return torch.cat([t.double().flatten() for t in result])
