"""Level 3: what real layers launch, compiled for every architecture, does not spill, fits and uses what it names."""

from importlib.metadata import version

import devices
import levels
import pytest
import torch

import peftkern
from compiled import cases, cuda_library, driver, machine_code, table


@pytest.fixture
def memory_never_touched():
    """Nothing here is executed: unpoisoned, the tensors of a real layer cost no memory."""
    torch.utils.deterministic.fill_uninitialized_memory = False


class BrokenRules(AssertionError):
    """What a kernel must not do, against being different from the table."""


def numbered(names):
    """Names, the second of a kind with #2 and so on."""
    seen = {}
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        yield name if seen[name] == 1 else f"{name} #{seen[name]}"


def broken_rules(target, kernel, figures, many_rows=True):
    """Rules of cases.py that a kernel breaks, as sentences. Tiles of few rows have no 16 bytes for every lane."""
    lines = []
    if figures.spilled:
        lines.append(f"{figures.spilled} bytes spilled")
    if figures.shared > cases.SHARED_LIMIT[target]:
        lines.append(f"{figures.shared} bytes of shared memory, a block has {cases.SHARED_LIMIT[target]}")
    if (unit := cases.TENSOR.get(kernel)) and not cases.UNITS[unit][target] & set(figures.tensor):
        lines.append(f"no {unit} tensor cores (found: {' '.join(figures.tensor) or 'none'})")
    if kernel in cases.WIDE and many_rows and figures.widest_in_loops < 16:
        lines.append(f"loops move at most {figures.widest_in_loops} bytes per access to global memory")
    return lines


def judge(request, compiler, version, target, name, found):
    """Hold {kernel: figures} to the table, if this version of the compiler wrote it, or write it there."""
    rows = {kernel: figures.row() for kernel, figures in found.items()}
    if request.config.option.write_compiled:
        table.write(compiler, version, target, name, rows)
        return []
    if not table.written_by(compiler, version):
        return []
    committed = table.read().get(compiler, {}).get(target, {}).get(name)
    if committed is None:
        return ["not in the table; `pytest tests/compiled --write-compiled` writes it"]
    lines = [
        f"{kernel}: {line}"
        for kernel in rows.keys() & committed.keys()
        for line in table.worse(committed[kernel], rows[kernel])
    ]
    lines += [f"{kernel}: not in the table" for kernel in rows.keys() - committed.keys()]
    return lines + [f"{kernel}: in the table, but not compiled" for kernel in committed.keys() - rows.keys()]


def triton_params():
    old = not devices.triton_missing() and table.minor(version("triton")) == "3.6"
    for target in driver.TARGETS:
        for name in cases.CASES:
            marks = [pytest.mark.xdist_group(f"compiled {target}")]
            marks += [] if name in cases.FIRST else [pytest.mark.slow]
            if reason := cases.KNOWN.get(f"{target} {name}"):
                marks.append(pytest.mark.xfail(reason=reason, raises=BrokenRules, strict=True))
            elif target == "sm100" and old:
                reason = "Triton 3.6 takes no float64 product to sm_100's tensor cores, and spills instead"
                marks.append(pytest.mark.xfail(reason=reason, raises=BrokenRules, strict=False))
            yield pytest.param(target, name, marks=marks, id=f"{target}-{name}")


@pytest.mark.skipif(devices.triton_missing() is not None, reason=str(devices.triton_missing()))
@pytest.mark.parametrize("target, name", list(triton_params()))
def test_triton(request, memory_never_touched, target, name):
    op, _, _, rows = cases.CASES[name]
    many = cases.ROWS[rows] > 64
    with peftkern.use_backend("triton"), driver.compiling(target) as launches:
        cases.call(name)
    unique = {(launch.kernel, launch.asm["ptx" if "ptx" in launch.asm else "amdgcn"]): launch for launch in launches}
    kernels = [kernel for kernel, _ in unique]
    found = {
        label: machine_code.of_launch(launch) for label, launch in zip(numbered(kernels), unique.values(), strict=True)
    }
    lines = [
        f"{label}: {line}" for label, f in found.items() for line in broken_rules(target, label.split()[0], f, many)
    ]
    different = judge(request, "triton", version("triton"), target, name, found)
    levels.proves(request.node, 3, "triton", [op])
    assert not different, "\n".join(different)
    if lines:
        raise BrokenRules("\n".join(lines))


@pytest.mark.skipif(cuda_library.missing() is not None, reason=str(cuda_library.missing()))
@pytest.mark.parametrize("target", ("sm80", "sm90", "sm100"))
def test_cuda(request, target):
    found = cuda_library.figures(target)
    if not found:
        pytest.skip(f"the CUDA library was not built for {target}")
    lines = [
        f"{kernel}: {line}" for kernel, figures in found.items() for line in cuda_library.broken_rules(kernel, figures)
    ]
    lines += judge(request, "cuda", cuda_library.version(), target, "library", found)
    operations = [name for name, operation in peftkern.operations().items() if operation.backend("cuda")[0]]
    levels.proves(request.node, 3, "cuda", operations)
    assert not lines, "\n".join(lines)
