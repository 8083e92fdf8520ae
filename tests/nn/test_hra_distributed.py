"""DDP and FSDP2 with two gloo processes on the CPU train as one process does."""

import os
import subprocess
import sys
import time
from pathlib import Path

import oracle
import pytest
import safetensors
import torch
import two_processes

import peftkern

# All scenarios share the two processes: starting them costs more than running them.
TIMEOUT = 110


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Scenario name to ({tensor name: value}, traceback) of each rank; what never ran is missing.

    Of several pytest workers the first one runs the scenarios, the others wait for its files.
    """
    parallel = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if parallel else base) / f"two_processes-{parallel}"
    try:
        folder.mkdir()
    except FileExistsError:
        deadline = time.monotonic() + TIMEOUT + 10
        while not (folder / "done").exists() and time.monotonic() < deadline:
            time.sleep(0.2)
    else:
        _run(folder)
        (folder / "done").touch()
    log = "\n".join(path.read_text()[-2000:] for path in folder.glob("*.log"))
    return {"log": log, **{name: _read(folder, i) for i, name in enumerate(two_processes.SCENARIOS)}}


def _run(folder):
    here = Path(__file__).parent
    path = os.pathsep.join([str(Path(peftkern.__file__).parents[1]), str(here), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = []
    for rank in range(2):
        with (folder / f"{rank}.log").open("w") as log:
            command = [sys.executable, str(here / "two_processes.py"), str(rank), str(folder)]
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    deadline = time.monotonic() + TIMEOUT
    try:
        for process in processes:
            process.wait(max(0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _read(folder, index):
    ranks = []
    for path in sorted(folder.glob(f"{index}.*.safetensors")):
        with safetensors.safe_open(path, "pt") as file:
            names = list(file.keys())
            ranks.append(({name: file.get_tensor(name) for name in names}, file.metadata()["error"]))
    return ranks


def results(outcomes, name):
    ranks = outcomes[name]
    assert len(ranks) == 2, f"the processes did not get to {name!r}: {outcomes['log']}"
    for _, error in ranks:
        assert not error, error
    return [tensors for tensors, _ in ranks]


def assert_trained(outcomes, name, tolerance, **options):
    """Both ranks hold the same model, and it is that of one process: losses, gradients, parameters."""
    first, second = results(outcomes, name)
    alone = two_processes.single(**options)
    start = dict(two_processes.model(**{k: v for k, v in options.items() if k != "cast"}).named_parameters())
    assert first.keys() == second.keys() == alone.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
        if key in start and not start[key].requires_grad:
            assert torch.equal(value, start[key].float()), key
        else:
            assert oracle.error(value, alone[key]) <= tolerance, f"{key}: {oracle.error(value, alone[key]):.1e}"


@pytest.mark.parametrize("name", ["ddp", "fsdp, layers", "fsdp, model only", "fsdp, bases apart"])
def test_two_processes_train_like_one(outcomes, name):
    assert_trained(outcomes, name, 2e-5)


@pytest.mark.parametrize("name", ["ddp, gram_schmidt", "fsdp, gram_schmidt"])
def test_two_processes_train_like_one_with_gram_schmidt(outcomes, name):
    assert_trained(outcomes, name, 5e-5, apply_gs=True)


@pytest.mark.parametrize("name", ["ddp, bfloat16", "fsdp, layers, bfloat16", "fsdp, bases apart, bfloat16"])
def test_two_processes_train_like_one_in_bfloat16(outcomes, name):
    assert_trained(outcomes, name, 2e-2, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "name", ["fsdp, mixed precision", "fsdp, mixed precision, exact", "fsdp, mixed precision, bases apart"]
)
def test_mixed_precision_of_fsdp_trains_like_one_process_that_casts_its_parameters(outcomes, name):
    assert_trained(outcomes, name, 2e-2, cast=torch.bfloat16)


def test_a_base_layer_sharded_by_itself_is_called_not_read(outcomes):
    results(outcomes, "fsdp, reasons")


def test_generation_between_steps_follows_the_shards(outcomes):
    results(outcomes, "fsdp, generation")


def test_sharded_weights_are_refused_where_they_cannot_serve(outcomes):
    results(outcomes, "fsdp, refusals")
