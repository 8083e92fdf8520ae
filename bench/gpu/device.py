"""The device that a run measures on, and its stand-in on a machine without one: the same calls, nothing to believe."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch

from bench.gpu import stand_in

LONGEST_HOLD = 50e-3


class Cuda:
    """torch's current CUDA device."""

    kind = "cuda"
    simulated = False
    OutOfMemory = torch.cuda.OutOfMemoryError

    def __init__(self):
        self._cycles_per_second = 1e9
        torch.cuda._sleep(1000)
        cycles = 20_000_000
        seconds, _ = self.seconds([lambda: torch.cuda._sleep(cycles)])
        self._cycles_per_second = cycles / seconds[0]

    @contextmanager
    def backends(self):
        yield []

    def seconds(self, stages: Sequence[Callable[[], object]], hold: float = 0.0) -> tuple[list[float], float]:
        """Device seconds of each stage, and host seconds to enqueue them all.

        hold: the device waits this long first, so that the host runs ahead and the stages follow each other without
        gaps: then the device's time is measured, not Python's.
        """
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(stages) + 1)]
        torch.cuda.synchronize()
        if hold:
            torch.cuda._sleep(int(min(hold, LONGEST_HOLD) * self._cycles_per_second))
        start = time.perf_counter()
        marks[0].record()
        for stage, mark in zip(stages, marks[1:], strict=True):
            stage()
            mark.record()
        host = time.perf_counter() - start
        torch.cuda.synchronize()
        return [1e-3 * a.elapsed_time(b) for a, b in pairwise(marks)], host

    def peak_bytes(self, call: Callable[[], object]) -> int:
        """Most memory allocated during a call, beyond what was allocated before it."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def alive(self) -> bool:
        """Whether the device still answers in this process: some errors end that."""
        try:
            return torch.ones(1, device=self.kind).item() == 1
        except Exception:
            return False

    def release(self):
        """Give unused memory back, so that one contender's heap is not the next one's."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


class StandIn:
    """CPU tensors, kernels that stop before the launch, seconds of the processor."""

    kind = "cpu"
    simulated = True

    class OutOfMemory(RuntimeError):
        pass

    backends = staticmethod(stand_in.prepared)

    def seconds(self, stages: Sequence[Callable[[], object]], hold: float = 0.0) -> tuple[list[float], float]:
        taken = []
        for stage in stages:
            start = time.perf_counter()
            stage()
            taken.append(time.perf_counter() - start)
        return taken, sum(taken)

    def peak_bytes(self, call: Callable[[], object]) -> int:
        call()
        return 0

    def alive(self) -> bool:
        return True

    def release(self):
        pass
