"""Calls of an operation past torch's dispatcher: the same result, and not where somebody has to see the call."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from peftkern.ops import householder
from peftkern.ops.householder import contract


def _arguments():
    x, V = torch.randn(6, 11), torch.randn(11, 3)
    return x, V, torch.ops.peftkern.wy_factor(V), False


def test_a_call_past_the_dispatcher_is_the_operation():
    for call in (contract.ROTATE, contract.ROTATE.unchecked):
        arguments = _arguments()
        for found, wanted in zip(call(*arguments), torch.ops.peftkern.rotate(*arguments), strict=True):
            assert torch.equal(found, wanted)


def test_a_call_past_the_dispatcher_is_checked_unless_somebody_has_seen_to_it():
    x, V, T, reverse = _arguments()
    with pytest.raises(ValueError, match="x must have K = 11 columns like V; got"):
        contract.ROTATE(x[:, :5], V, T, reverse)


class _Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_a_mode_and_the_profiler_see_every_operation():
    x, u = torch.randn(6, 11, requires_grad=True), torch.randn(11, 3, requires_grad=True)
    with _Seen() as seen:
        householder.rotate(x, u).sum().backward()
    with torch.profiler.profile() as profile:
        householder.rotate(x, u).sum().backward()
    profiled = {event.key for event in profile.key_averages()}
    for name in ("wy_factor", "rotate", "rotate_backward", "wy_factor_backward"):
        assert f"peftkern::{name}" in seen.names and f"peftkern::{name}" in profiled


def test_what_only_the_dispatcher_can_read_goes_through_it():
    x, V, T, reverse = _arguments()
    negative = torch.complex(x, -x).conj().imag
    assert negative.is_neg()
    assert torch.equal(contract.ROTATE(negative, V, T, reverse)[0], contract.ROTATE(x, V, T, reverse)[0])
    on_meta = contract.ROTATE(*(t.to("meta") for t in (x, V, T)), reverse)
    assert on_meta[0].is_meta and on_meta[0].shape == x.shape
    rows = x.view(2, 3, 11)
    batched = torch.vmap(lambda part: contract.ROTATE(part, V, T, reverse)[0])(rows)
    assert torch.allclose(batched.view(6, 11), contract.ROTATE(x, V, T, reverse)[0], atol=1e-6)
