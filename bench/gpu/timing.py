"""One case on a GPU: every contender checked against float64, then timed in turn with the others."""

from __future__ import annotations

import signal
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

from bench import measure, oracle, rotations, row
from bench.arm import NotAvailable
from bench.cases import Case, Problem, make_problem
from bench.gpu import contenders
from bench.gpu.contenders import Contender
from bench.gpu.device import LONGEST_HOLD

MOST_ROUNDS, FEWEST_ROUNDS = 30, 5
ROUNDS = "the rounds"
# The device is held for that many times what the host needs to enqueue a step: the host then stays ahead of it.
AHEAD = 1.3
# A contender may take this long to run for the first time, kernels compiled.
FIRST_RUN = 45.0


class DeviceLost(Exception):
    """The device answers no more in this process; `contender`: whose doing it was, as far as one can tell."""

    def __init__(self, contender: str, error: Exception):
        super().__init__(f"the device was lost: {sentence(error)}")
        self.contender = contender


@dataclass
class Sample:
    """Device seconds of the stages, and host seconds to enqueue them."""

    stages: list[float]
    host: float

    @property
    def total(self) -> float:
        return sum(self.stages)


@dataclass
class Measured:
    """samples[contender][round]; info[contender]: result fields; absent, refused: reasons by contender."""

    case: Case
    samples: dict[str, dict[int, Sample]] = field(default_factory=dict)
    info: dict[str, dict[str, object]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


class TookTooLong(BaseException):
    """Not an Exception: nothing that a compiler catches on its way."""


@contextmanager
def limit(seconds: float):
    def stop(signum, frame):
        raise TookTooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _serving(contender: Contender):
    return contender.serving() if contender.serving else nullcontext()


def sentence(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _prepare(name: str, problem: Problem, device, reference) -> tuple[Contender, dict[str, object], dict[str, float]]:
    """Build and run a contender once: (contender, result fields, errors)."""
    contender = contenders.build(name, problem, device)
    info: dict[str, object] = {}
    found: dict[str, float] = {}
    with _serving(contender):
        if contender.outputs is not None:
            arm = contender.arm
            if name not in ("frozen", "compiled"):
                saved = measure.saved_for_backward(lambda: arm.forward(problem.x), arm.parameters, problem.x)[1]
                info |= {"saved_bytes": saved.bytes, "saved_x_bytes": problem.x.nbytes if saved.x else 0}
            result = contender.outputs()
            # Nothing was launched by a stand-in: its outputs are unwritten memory.
            if name != "frozen" and not (device.simulated and name.startswith(("triton", "cuda"))):
                found = measure.errors(result, arm.truth() if arm.truth else reference)
                if arm.blocks:
                    info["orthogonality_error"] = rotations.orthogonality_error(arm.blocks())
            if arm.differs:
                info["differs"] = arm.differs
            del result
        else:
            for stage in contender.stages:
                stage()
        device.release()
        info["peak_bytes"] = device.peak_bytes(lambda: [stage() for stage in contender.stages])
    if contender.serving:
        if contender.serving.failed():
            raise RuntimeError("; ".join(contender.serving.failed()))
        info["served"] = contender.serving.served()
    return contender, info, found


def measure_case(
    case: Case,
    device,
    seconds: float,
    note: Callable[[str], None] = lambda name: None,
    skip: dict[str, str] | None = None,
    first_run: float = FIRST_RUN,
) -> Measured:
    """Build, check and time all contenders of a case.

    seconds: spent on the rounds, roughly. note: called with the name of each contender before it runs for the first
    time, and before the rounds. skip: contenders to leave out, with the reason. Raises DeviceLost after an error that
    ends the process's use of the device.
    """
    done = Measured(case)
    problem = make_problem(case, device=device.kind)
    layer = case.operation is None
    reference = oracle.truth(problem) if layer else None
    built: dict[str, Contender] = {}
    found: dict[str, dict[str, float]] = {}
    for name in contenders.names(case):
        if skip and name in skip:
            done.refused[name] = skip[name]
            continue
        note(name)
        try:
            with limit(first_run):
                built[name], done.info[name], found[name] = _prepare(name, problem, device, reference)
        except NotAvailable as reason:
            done.absent[name] = str(reason)
        except TookTooLong:
            done.refused[name] = f"its first run took more than {first_run:.0f} s, compilation included"
        except device.OutOfMemory as error:
            done.refused[name] = f"out of memory: {sentence(error)}"
        except Exception as error:
            if not device.alive():
                raise DeviceLost(name, error) from error
            done.refused[name] = sentence(error)
        device.release()
    del reference

    baseline = found.get(measure.baseline_of(case)) if layer else None
    for name in list(built):
        reason = row.verdict(name, case, found[name], baseline) if found[name] else None
        if reason is not None:
            done.refused[name] = reason
            del built[name], done.info[name]
        elif found[name]:
            done.info[name]["error"] = found[name]
            if baseline is not None:
                done.info[name]["error_ratio"] = {part: e / baseline[part] for part, e in found[name].items()}
                done.info[name]["error_baseline"] = measure.baseline_of(case)
    if "frozen" in built:
        note(ROUNDS)
        done.samples = rounds(built, device, seconds)
    return done


def _once(contender: Contender, device, hold: float) -> Sample:
    try:
        with _serving(contender):
            return Sample(*device.seconds(contender.stages, hold))
    except Exception as error:
        # It ran before: what it left behind cannot be trusted, whether the device still answers or not.
        raise DeviceLost(contender.name, error) from error


def rounds(built: dict[str, Contender], device, seconds: float) -> dict[str, dict[int, Sample]]:
    """Interleaved samples of each contender, by round; in each round in the next balanced order."""
    first = {name: min((_once(c, device, 0.0) for _ in range(3)), key=lambda s: s.total) for name, c in built.items()}
    cost = {name: max(s.total, s.host) for name, s in first.items()}
    hold = {name: AHEAD * s.host for name, s in first.items()}
    plan = measure.make_plan(cost, seconds, FEWEST_ROUNDS, MOST_ROUNDS)
    orders = measure.balanced_orders(len(built))
    listed = list(built)
    samples: dict[str, dict[int, Sample]] = {name: {} for name in built}
    stop = time.perf_counter() + 3 * seconds
    with measure.no_garbage_collection():
        for index in range(plan.rounds):
            for i in orders[index % len(orders)]:
                name = listed[i]
                if index % plan.every[name] == 0:
                    samples[name][index] = _once(built[name], device, hold[name])
            # What was cheap in the first run may not be: the rounds taken so far count then.
            if index and time.perf_counter() > stop:
                break
    return samples


def _overheads(samples: dict[int, Sample], floor: dict[int, Sample], stages: slice) -> dict[str, float]:
    def of(by_round):
        return {index: sum(sample.stages[stages]) for index, sample in by_round.items()}

    return measure.overhead(of(samples), of(floor))


def _stats(values: list[float]) -> dict[str, object]:
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {
        "min": min(values), "max": max(values), "mean": statistics.fmean(values), "median": statistics.median(values),
        "q1": quartiles[0], "q3": quartiles[2], "iqr": quartiles[2] - quartiles[0], "rounds": len(values),
    }  # fmt: skip


def as_rows(done: Measured) -> list[dict[str, object]]:
    """Rows of a result file, as bench/result.py reads them: seconds of forward + backward in `stats`, the forward's
    apart; of a single operation its own seconds, and as overhead its share of the frozen layer's forward + backward."""
    out = []
    floor = done.samples.get("frozen", {})
    for name, samples in done.samples.items():
        listed = list(samples.values())
        info = {"case": done.case.fields(), "arm": name, **done.info.get(name, {})}
        info["overhead"] = _overheads(samples, floor, slice(None))
        info["host_seconds"] = statistics.median(s.host for s in listed)
        # Then the device waited for Python within the step, as it would in use.
        info["host_bound"] = AHEAD * info["host_seconds"] > LONGEST_HOLD
        if len(listed[0].stages) > 1:
            info["forward"] = _stats([s.stages[0] for s in listed])
            info["forward_overhead"] = _overheads(samples, floor, slice(0, 1))
        if name == "frozen":
            info |= {"not_available": done.absent, "refused": done.refused}
        out.append(
            {
                "name": f"gpu[{done.case.id}-{name}]",
                "group": done.case.id,
                "extra_info": info,
                "stats": _stats([s.total for s in listed]),
            }
        )
    return out
