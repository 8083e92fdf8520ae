"""What `import peftkern` costs beyond torch, in fresh processes."""

import subprocess
import sys
from pathlib import Path

ROUNDS = 9
PROGRAM = """
import sys, time
import torch
start = time.perf_counter()
import peftkern
print(time.perf_counter() - start)
"""


def test_import(benchmark, replay, surroundings):
    def once() -> float:
        # The tree is on the path of a benchmark run; where peftkern is installed, this finds that.
        run = subprocess.run(
            [sys.executable, "-c", PROGRAM], cwd=Path(__file__).parent.parent, capture_output=True, text=True
        )
        assert run.returncode == 0, f"peftkern cannot be imported: {run.stderr.strip().splitlines()[-1]}"
        return float(run.stdout)

    once()
    times = [once() for _ in range(ROUNDS)]
    benchmark.group = "import"
    benchmark.extra_info.update(case={"kind": "import", "id": "import", "title": "import peftkern"}, **surroundings)
    replay(benchmark, times)
