"""The CUDA library, also without a GPU: it loads, knows its architectures, and a launch says what is missing."""

import re

import pytest
import torch

from peftkern import _versions

INFO = _versions.build_info()["cuda"]
if not INFO["built"]:
    pytest.skip(f"no CUDA library: {INFO['reason']}", allow_module_level=True)

from peftkern import _native_cuda  # noqa: E402


def test_it_holds_code_for_the_architectures_that_were_asked_for():
    asked = [int(re.match(r"\d+", arch)[0]) * 10 for arch in INFO["archs"].split(";")]
    assert [int(arch) for arch in _native_cuda.archs().split(",")] == asked


def test_its_runtime_is_the_one_of_its_compiler():
    major, minor = INFO["compiler"].split()[1].split(".")[:2]
    assert _native_cuda.runtime_version() == int(major) * 1000 + int(minor) * 10


@pytest.mark.skipif(_native_cuda.driver_version() != 0, reason="needs a machine without a CUDA driver")
def test_without_a_driver_a_launch_returns_a_status_and_a_query_raises_a_sentence():
    status = _native_cuda.probe_arch(0, 0)
    assert status != 0
    assert "driver" in _native_cuda.error_string(status)
    with pytest.raises(RuntimeError, match=r"device_count: .* \(CUDA error \d+\)"):
        _native_cuda.device_count()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_on_a_gpu_code_of_its_architecture_runs():
    out = torch.zeros(1, dtype=torch.int32, device="cuda")
    assert _native_cuda.probe_arch(out.data_ptr(), torch.cuda.current_stream().cuda_stream) == 0
    major, minor = torch.cuda.get_device_capability()
    assert 800 <= out.item() <= major * 100 + minor * 10
