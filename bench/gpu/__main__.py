"""Level 5: build, test, check, measure and report on this machine's GPU, within ten minutes.

python -m bench.gpu                     all steps; writes bench/results/<card>.json and the page beside it
python -m bench.gpu --dry-run           no GPU: every step up to the launch, and what would run
python -m bench.gpu --only timing       some steps (environment, build, tests, sanitizer, peaks, timing)
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
import time
from pathlib import Path

try:
    import torch  # noqa: F401
except ImportError:
    raise SystemExit(f"{sys.executable} has no torch; name a Python that has with PEFTKERN_PYTHON=...") from None

from bench import environment
from bench.gpu import card, page, steps
from bench.result import Result


def result(done: dict[str, steps.Step], dry: bool) -> dict[str, object]:
    """The result file: rows as pytest-benchmark writes them, and under `gpu` what only such a run has."""
    surroundings = done["environment"]
    found = surroundings.data.get("card", {})
    timing = done["timing"].data
    shared = {
        "machine": environment.machine() | {"gpu": found.get("name")},
        "versions": surroundings.data.get("versions", {}),
        "backends": environment.backends("cuda"),
        "commit": environment.commit(),
    }
    rows = [row | {"extra_info": row["extra_info"] | shared} for row in timing.pop("rows", [])]
    return {
        "machine_info": shared["machine"],
        "datetime": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "benchmarks": rows,
        "gpu": {
            "dry_run": dry,
            "versions": shared["versions"],
            "card": found,
            "peaks": done["peaks"].data,
            "steps": [step.fields() for step in done.values()],
            "order": timing.get("order"),
            "dropped": timing.get("dropped", []),
        },
    }


def run_steps(run: steps.Run, only: list[str]) -> dict[str, steps.Step]:
    """All steps in order; one that raises is noted and the next one runs."""
    done = {}
    for name, function in steps.STEPS.items():
        start = time.time()
        if only and name not in only and name != "environment":
            done[name] = steps.Step(name, said=["not asked for"])
            continue
        print(f"\n=== {name} (at most {run.left(name):.0f} s)", flush=True)
        try:
            done[name] = function(run)
        except Exception as error:
            done[name] = steps.Step(name, ok=False, said=[f"the step itself broke: {type(error).__name__}: {error}"])
        done[name].seconds = time.time() - start
        for sentence in done[name].said:
            print(sentence, flush=True)
    return done


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="without a GPU: every step up to the launch")
    parser.add_argument("--only", action="append", choices=list(steps.STEPS), help="this step alone; repeatable")
    parser.add_argument("--seconds", type=float, default=steps.TOTAL_SECONDS, help="for everything (default: 600)")
    parser.add_argument("--cases", type=int, help="time at most so many cases, from the start of the plan")
    parser.add_argument("--out", type=Path, help="the result file (default: bench/results/<card>.json; dry run: none)")
    options = parser.parse_args(arguments)

    with tempfile.TemporaryDirectory(prefix="peftkern-gpu-") as folder:
        run = steps.Run(options.dry_run, Path(folder), time.time() + options.seconds, options.cases)
        done = run_steps(run, options.only or [])
    data = result(done, options.dry_run)

    print("\n=== summary")
    for step in done.values():
        state = {True: "ok", False: "FAILED", None: "did not run, or in part"}[step.ok]
        print(f"{step.name:<12} {state} ({step.seconds:.0f} s)")
    out = options.out
    if out is None and not options.dry_run and data["gpu"]["card"]:
        out = steps.ROOT / "bench" / "results" / f"{card.slug(data['gpu']['card']['name'])}.json"
    if out is not None:
        out.write_text(json.dumps(data, indent=1) + "\n")
        print(f"result: {out}")
        loaded = Result.load(out)
        print(page.text(loaded))
        out.with_suffix(".html").write_text(page.render(loaded))
        print(f"page: {out.with_suffix('.html')}")
    return 1 if any(step.ok is False for step in done.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
