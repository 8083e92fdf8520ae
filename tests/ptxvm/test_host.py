"""Launchers of a compiled library, called with raw pointers as they would be on a device."""

import ctypes
from functools import cache
from pathlib import Path

import pytest
import torch

from . import HostLibrary, OutOfBounds

NEEDS = ("needs_nvcc",)


@cache
def library():
    return HostLibrary([Path(__file__).with_name("kernels") / "launchers.cu"])


def call(name, *tensors_and_numbers):
    def argument(x):
        if isinstance(x, torch.Tensor):
            return ctypes.c_void_p(x.data_ptr())
        return ctypes.c_float(x) if isinstance(x, float) else x

    return getattr(library().cdll, name)(*map(argument, tensors_and_numbers))


def test_a_launcher_runs_its_kernel():
    x, y = torch.randn(200), torch.empty(200)
    with library().on_cpu() as vm:
        assert call("launch_scale", x, y, 3.0, 200, None) == 0
    assert torch.equal(y, 3 * x)
    (launch,) = vm.launches
    assert launch.grid == (2, 1, 1) and launch.block == (128, 1, 1) and launch.counts.global_bytes == 1600


def test_pointers_serve_all_launches_of_one_call():
    x, y = torch.randn(200), torch.empty(200)
    with library().on_cpu(seed=1) as vm:
        assert call("launch_twice", x, y, 3.0, 200, None) == 0
    assert torch.equal(y, 3 * (3 * x)) and len(vm.launches) == 2


def test_an_access_beyond_a_tensor_is_reported_and_fails_the_launch():
    x, y = torch.randn(200), torch.empty(200)
    with pytest.raises(OutOfBounds, match=r"at byte 400 of tensor 1 \(100,\) float32"):
        with library().on_cpu():
            assert call("launch_scale", x, y[:100], 3.0, 200, None) == 719


def test_memory_of_an_earlier_call_is_out_of_bounds():
    x, y = torch.randn(200), torch.empty(200)
    with pytest.raises(OutOfBounds):
        with library().on_cpu():
            assert call("launch_scale", x, y, 3.0, 200, None) == 0
            pointer = ctypes.c_void_p(x.untyped_storage().data_ptr())
            call("launch_scale", pointer, y, 3.0, 200, None)


def test_large_shared_memory_must_be_asked_for():
    x, y = torch.randn(4, 64), torch.empty(64)
    with library().on_cpu():
        assert call("launch_add_rows", x, y, 4, 64, 60 * 1024, 0) == 1
        assert call("launch_add_rows", x, y, 4, 64, 60 * 1024, 1) == 0
    torch.testing.assert_close(y, x.sum(0))


def test_outside_the_context_there_is_no_device():
    assert call("launch_scale", torch.zeros(4), torch.zeros(4), 3.0, 4, None) == 100
