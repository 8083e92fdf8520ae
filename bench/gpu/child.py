"""What runs in a process of its own, so that a crash takes nothing else along: `python -m bench.gpu.child STEP OUT`.

Results are lines of JSON appended to OUT, each as soon as it is known: what is there survives the process.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path

import torch

from bench.gpu import card, plan, timing
from bench.gpu.device import Cuda, StandIn

LOST = 3  # exit status after an error that the device does not survive
ROUNDS_SECONDS = 2.0


def timed_operations() -> dict[str, str]:
    """Operations that are timed one by one, and the family of each."""
    from peftkern import dispatch

    families = {name: operation.family.rpartition(".")[2] for name, operation in dispatch.operations().items()}
    return {name: family for name, family in families.items() if family in plan.OP_FAMILIES}


def lines(path: Path) -> list[dict]:
    """What a step has written so far; a last line that its process did not finish is left out."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def unfinished(path: Path) -> tuple[set[str], dict[str, dict[str, str]], tuple[str, str] | None]:
    """(cases done, contenders that ended a process, by case, and what was running when the last line was written)."""
    done: set[str] = set()
    ended: dict[str, dict[str, str]] = {}
    running = None
    for line in lines(path):
        if "start" in line:
            running = tuple(line["start"])
        elif "done" in line:
            done.add(line["done"])
            running = None
        elif "ended" in line:
            case, name, reason = line["ended"]
            ended.setdefault(case, {})[name] = reason
            running = None
    return done, ended, running


def append(path: Path, **fields) -> None:
    with path.open("a") as file:
        file.write(json.dumps(fields) + "\n")


def time_cases(device, out: Path, deadline: float, most: int | None, rounds_seconds: float) -> int:
    """Time the cases of the plan that OUT does not have yet, until the deadline (time.time())."""
    done, ended, _ = unfinished(out)
    longest = 0.0
    for case in plan.cases(timed_operations())[:most]:
        left = deadline - time.time()
        if case.id in done:
            continue
        if left < min(longest, 30.0):
            break
        start = time.time()
        measured_as = plan.shrunk(case) if device.simulated else case
        note = partial(_note, out, case.id)
        try:
            with device.backends() as launched:
                first_run = min(timing.FIRST_RUN, max(left, 1.0))
                measured = timing.measure_case(measured_as, device, rounds_seconds, note, ended.get(case.id), first_run)
        except timing.DeviceLost as error:
            append(out, ended=[case.id, error.contender, str(error)])
            return LOST
        except Exception as error:
            append(out, failed=[case.id, timing.sentence(error)], done=case.id)
            if not device.alive():
                return LOST
            device.release()
            continue
        if not measured.samples:
            append(out, failed=[case.id, f"the frozen layer: {measured.refused.get('frozen', 'not measured')}"])
        for row in timing.as_rows(measured):
            append(out, row=row)
        if launched:
            append(out, launched=[case.id, sorted(set(launched))])
        append(out, done=case.id)
        del measured
        device.release()
        longest = max(longest, time.time() - start)
        print(f"{case.kind} {case.title}: {time.time() - start:.1f} s", flush=True)
    return 0


def _note(out: Path, case: str, name: str) -> None:
    append(out, start=[case, name])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="One step of bench.gpu, in a process of its own.")
    parser.add_argument("step", choices=("card", "peaks", "timing"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--deadline", type=float, default=float("inf"), help="time.time() at which to stop")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--cases", type=int, help="at most so many, from the start of the plan")
    options = parser.parse_args(arguments)
    torch.backends.cuda.matmul.allow_tf32 = False
    if options.step == "card":
        options.out.write_text(json.dumps({"card": card.describe()}) + "\n")
        return 0
    device = StandIn() if options.dry_run else Cuda()
    if options.step == "peaks":
        sizes = ((2**16,), (64,)) if options.dry_run else (card.COPY_BYTES, card.PRODUCT_SIZES)
        options.out.write_text(json.dumps({"peaks": card.peaks(device, *sizes)}) + "\n")
        return 0
    return time_cases(device, options.out, options.deadline, options.cases, 0.05 if options.dry_run else ROUNDS_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
