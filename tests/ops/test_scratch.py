"""Memory of temporaries that is used again."""

import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from peftkern.ops import _scratch


@pytest.fixture(autouse=True)
def nothing_kept():
    _scratch._kept.storage = None
    with torch.no_grad():
        yield
    _scratch._kept.storage = None


def _take(rows=512, dtype=torch.float32):
    return _scratch.take(torch.empty(rows, 256, dtype=dtype))


def test_given_memory_is_taken_again_for_any_shape_and_dtype_that_fits():
    first = _take()
    address = first.data_ptr()
    _scratch.give(first)
    del first
    second = _scratch.take(torch.empty(3, 128, 512, dtype=torch.bfloat16))
    assert second.data_ptr() == address
    assert second.shape == (3, 128, 512) and second.dtype is torch.bfloat16 and second.is_contiguous()


def test_memory_is_taken_once():
    _scratch.give(_take())
    first, second = _take(), _take()
    assert first.data_ptr() != second.data_ptr()


def test_what_does_not_fit_gets_memory_of_its_own():
    _scratch.give(_take(512))
    larger = _take(1024)
    assert larger.untyped_storage().nbytes() >= larger.numel() * 4


def test_a_tensor_with_a_view_is_not_kept():
    tensor = _take()
    view = tensor[0]
    _scratch.give(tensor)
    assert _scratch._kept.storage is None
    del view


def test_nothing_is_kept_while_autograd_records():
    with torch.enable_grad():
        _scratch.give(_take())
    assert _scratch._kept.storage is None


def test_a_tensor_that_a_graph_keeps_is_not_kept():
    tensor = _take()
    with torch.enable_grad():
        product = tensor * torch.ones(256, requires_grad=True)
    _scratch.give(tensor)
    assert _scratch._kept.storage is None
    del product


class _Holding(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_a_tensor_that_a_mode_may_hold_is_not_kept():
    with _Holding():
        _scratch.give(_take())
    assert _scratch._kept.storage is None


@pytest.mark.parametrize("size", [_scratch.LEAST - 4, _scratch.MOST + 4])
def test_memory_outside_of_the_limits_is_not_kept(size):
    _scratch.give(_scratch.take(torch.empty(size // 4)))
    assert _scratch._kept.storage is None


def test_each_thread_keeps_its_own():
    _scratch.give(_take())
    seen = []
    thread = threading.Thread(target=lambda: seen.append(getattr(_scratch._kept, "storage", None)))
    thread.start()
    thread.join()
    assert seen == [None] and _scratch._kept.storage is not None


def test_memory_from_inference_mode_serves_outside():
    with torch.inference_mode():
        _scratch.give(_take())
    assert not _take().is_inference()
