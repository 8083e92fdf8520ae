"""No launch of Triton's asks for more programs than a device takes, however many rows there are."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from peftkern.ops import _triton
from peftkern.ops.block_rotation import triton_backend as block_rotation
from peftkern.ops.butterfly import triton_backend as butterfly
from peftkern.ops.householder import triton_backend as householder

ROWS = 8_000_000


class Grids:
    """Takes the place of a module of kernels and launches nothing."""

    def __init__(self):
        self.seen = []

    def __getattr__(self, kernel):
        return self

    def __getitem__(self, grid):
        self.seen.append(grid)
        return lambda *args, **options: None


@pytest.fixture(params=("sm80", "sm86", "sm90", "sm100", "gfx942", "generic"))
def grids(request, monkeypatch):
    grids = Grids()
    for module in (householder, block_rotation, butterfly):
        monkeypatch.setattr(module, "_kernels", lambda: grids)
    monkeypatch.setattr(_triton, "family", lambda: request.param)
    return grids


def empty(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32, torch.float64))
def test_eight_million_rows_fit_a_launch(grids, dtype):
    working = torch.float64 if dtype is torch.float64 else torch.float32
    K, N, both = 256, 64, (True, True)
    x, y, W = empty(ROWS, K, dtype=dtype), empty(ROWS, N, dtype=dtype), empty(N, K, dtype=dtype)
    for r in (1, 24, 64, 128):
        V, P, B = empty(K, r, dtype=working), empty(ROWS, r, dtype=working), empty(N, r, dtype=working)
        T = empty(r, r, dtype=torch.float64)
        householder.rotate(x, V, T, False)
        for mask in (both, (True, False), (False, True)):
            householder.rotate_backward(x, x, P, V, T, False, mask)
            householder.project_backward(P, x, V, mask)
        householder.project(x, V)
        if dtype in (torch.bfloat16, torch.float16):
            householder.rotated_linear(x, W, None, V, T, True)
            householder.rotated_linear_backward(y, x, W, P, B, V, T, both)
    for b in (8, 64, 256):
        R = empty(K // b, b, b, dtype=working)
        block_rotation.block_rotate(x, R, False)
        block_rotation.block_rotate_backward(x, x, R, False, both)
    R = empty(4, K // 8, 8, 8, dtype=working)
    butterfly.butterfly_rotate_backward(x, x, R, False, both)
    butterfly.scale_outputs_backward(y, y, empty(N, dtype=working), None, both)
    assert len(grids.seen) > 40
    for x, *more in grids.seen:
        assert x < 2**31 and all(programs <= 65535 for programs in more)


def test_rows_whose_terms_are_too_far_apart_are_refused(grids):
    x, V, T = empty(2**23, 256), empty(256, 128), empty(128, 128, dtype=torch.float64)
    with pytest.raises(ValueError, match="up to 8388607 rows for 128 reflections; this call has 8388608"):
        householder.rotate(x, V, T, False)
