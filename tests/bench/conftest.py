"""The benchmarks are not installed with the package: they are found in the tree, however pytest was started."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2]))

for needed in ("pytest_benchmark", "peft"):
    pytest.importorskip(needed)
