"""`make gpu` without a GPU: every step up to the launch, and the promise that none takes another one along."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from devices import missing

from bench import arms, lycoris, measure, rotations
from bench.arm import NotAvailable
from bench.cases import Case
from bench.gpu import __main__ as gpu
from bench.gpu import card, child, contenders, page, plan, small, stand_in, steps, timing
from bench.gpu.device import Cuda, StandIn
from bench.result import Result

ROOT = Path(__file__).parents[2]
SMALL = Case("linear", 64, 48, 24, 6, "fp32")


@pytest.fixture
def run(tmp_path):
    return steps.Run(dry=True, folder=tmp_path, stop=time.time() + 100)


def test_a_dry_run_goes_through_every_step_and_says_what_would_run(tmp_path, capfd):
    out = tmp_path / "card.json"
    assert gpu.main(["--dry-run", "--cases", "1", "--out", str(out)]) == 0
    printed = capfd.readouterr().out
    data = json.loads(out.read_text())["gpu"]
    by_name = {step["name"]: step for step in data["steps"]}
    assert list(by_name) == list(steps.STEPS)
    assert not [name for name, step in by_name.items() if step["ok"] is False]
    assert "setup.py build_ext --inplace" in printed and "triton or cuda" in printed and "racecheck" in printed

    planned = plan.cases(child.timed_operations())
    assert data["dropped"] == [case.id for case in planned[1:]]
    for backend, kind in (("triton", "_kernel"), ("cuda", "")):
        if backend not in stand_in.missing() and not missing(backend):
            assert any(name.endswith(kind) for name in by_name["timing"]["launched"])

    result = Result.load(out)
    (case,) = result.cases.values()
    assert {"frozen", "peft", "compiled", "torch", "reference-fast", "reference-exact"} <= set(case.arms)
    assert case.why_missing("lycoris") == "LyCORIS has no HRA"
    assert page.DRY in page.render(result)
    assert page.DRY in page.text(result)


@pytest.mark.parametrize("head", [plan.HEAD, plan.OFT, plan.BOFT], ids=lambda case: case.kind)
@pytest.mark.parametrize("served_by", ["triton", "cuda"])
def test_every_layer_of_a_backend_is_prepared_up_to_its_launches(served_by, head):
    absent = stand_in.missing().get(served_by) or missing(served_by)
    if absent:
        pytest.skip(f"backend {served_by}: {absent}")
    device = StandIn()
    with device.backends() as launched:
        measured = timing.measure_case(plan.shrunk(head), device, 0.01)
    assert {f"{served_by}-fast", f"{served_by}-exact"} <= set(measured.samples)
    for precision in ("fast", "exact"):
        assert served_by in measured.info[f"{served_by}-{precision}"]["served"].values()
        assert "error" not in measured.info[f"{served_by}-{precision}"]
    assert launched


def test_the_plan_names_each_case_once_and_starts_with_the_goal():
    planned = plan.cases({"rotate": "householder", "block_rotate": "block_rotation", "scale_outputs": "butterfly"})
    assert planned[0] == plan.HEAD
    assert len({case.id for case in planned}) == len(planned)
    assert {(c.width_in, c.r, c.dtype) for c in planned if c.kind == "linear"} == {
        (width, r, dtype) for width in (2048, 4096, 8192) for r in (8, 32, 128) for dtype in plan.DTYPES
    }
    assert {(c.width_in, c.r, c.factors, c.dtype) for c in planned if c.kind in ("oft", "boft")} == {
        (width, *size, dtype)
        for width in (2048, 4096, 8192)
        for size in ((32, 1), (8, 4), (8, 1))
        for dtype in plan.DTYPES
        if size != (8, 1) or width == 4096
    }
    sizes = {c.operation: (c.of, c.r, c.factors) for c in planned if c.operation}
    assert sizes == {"rotate": ("linear", 32, 1), "block_rotate": ("oft", 32, 1), "scale_outputs": ("boft", 8, 4)}


def test_every_operation_of_the_timed_families_has_arguments():
    from peftkern import dispatch

    for name, family in child.timed_operations().items():
        operation, head = dispatch.operations()[name], plan.OP_FAMILIES[family]
        for dtype in plan.DTYPES:
            case = replace(plan.shrunk(head), kind=f"op:{name}", of=head.kind, dtype=dtype)
            operation.check(*contenders.arguments(operation, timing.make_problem(case)))


def test_the_sanitizers_set_has_every_operation_and_layer_at_shapes_that_exist():
    work = small.work("reference", ("bf16+fp32",))
    assert {case.operation for case, _ in work} - {None} == set(child.timed_operations())
    assert {(case.kind, name) for case, name in work if case.operation is None} == {
        (kind, f"reference-{precision}") for kind in contenders.OURS for precision in ("fast", "exact")
    }
    assert small.run("reference", StandIn()) == []


def test_layers_that_rotate_blocks_are_judged_and_say_what_differs():
    measured = timing.measure_case(replace(plan.BOFT, width_in=64, width_out=64, tokens=24, factors=2), StandIn(), 0.01)
    assert set(measured.info["reference-fast"]["error"]) == {"y", "dx", "du"}
    assert measured.info["reference-exact"]["orthogonality_error"] < 1e-6
    if "lycoris" in measured.samples:
        assert measured.info["lycoris"]["differs"] and measured.info["lycoris"]["error"]["du"] < 1e-2
    else:
        assert "LyCORIS cannot be imported" in measured.absent["lycoris"]


@pytest.mark.parametrize("head", [plan.OFT, plan.BOFT], ids=lambda case: case.kind)
def test_rotations_are_made_on_the_device_of_their_tensors(head):
    """Not on torch's default device: meta tensors refuse to meet those of the processor."""
    case = replace(head, width_in=64, width_out=64, tokens=24, bias=True, dtype="fp32")
    on_device = {name: tensor.to("meta") for name, tensor in _tensors(case).items()}
    problem = timing.Problem(case, **on_device)
    problem.x.requires_grad_()
    made = measure.step(arms.build("torch", problem), problem)
    found = [*made, *rotations.truth(problem), *vars(lycoris.truth(problem)).values()]
    assert {tensor.device.type for tensor in found} == {"meta"}


def _tensors(case):
    problem = timing.make_problem(case)
    return {name: getattr(problem, name) for name in ("x", "weight", "bias", "u", "grad_y")}


def test_a_step_that_breaks_takes_no_other_along(run, monkeypatch, capsys):
    def breaks(run):
        raise OSError("no such thing")

    monkeypatch.setattr(steps, "STEPS", {"environment": breaks, "peaks": breaks, "timing": lambda run: steps.Step("t")})
    done = gpu.run_steps(run, [])
    assert list(done) == ["environment", "peaks", "timing"]
    assert done["peaks"].ok is False and done["peaks"].said == ["the step itself broke: OSError: no such thing"]
    assert "no such thing" in capsys.readouterr().out


def test_a_process_ends_at_its_time_with_what_it_printed_and_its_children():
    start = time.time()
    status, text = steps.process(["sh", "-c", "echo begun; sleep 600 & echo $!; wait"], 2)
    assert status is None and time.time() - start < 300
    begun, pid = text.split()
    assert begun == "begun"
    stat = Path(f"/proc/{pid}/stat")

    def ended():
        # Gone, or a zombie that nobody has collected yet.
        try:
            return stat.read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            return True

    # A killed process ends when it is next scheduled.
    stop = time.time() + 60
    while not ended() and time.time() < stop:
        time.sleep(0.05)
    assert ended()


def test_a_contender_that_kills_the_process_is_named_and_the_rest_goes_on(run, monkeypatch):
    planned = plan.cases(child.timed_operations())
    statuses = iter([-11, 0])
    commands = []

    def process(command, seconds, **environ):
        commands.append(command)
        out = run.folder / "timing.jsonl"
        if len(commands) == 1:
            child.append(out, done=planned[0].id)
            child.append(out, start=[planned[1].id, "cuda"])
        else:
            for case in planned[1:]:
                child.append(out, done=case.id)
        return next(statuses), "somebody crashed\n"

    monkeypatch.setattr(steps, "process", process)
    run.dry, run.card = False, {"name": "a card"}
    step = steps.timing(run)
    assert len(commands) == 2
    assert step.data["ended"] == {planned[1].id: {"cuda": "ended the process with signal SIGSEGV: somebody crashed"}}
    assert step.data["dropped"] == [] and step.ok is False


def test_what_ended_a_process_is_left_out_of_the_next_one(tmp_path, monkeypatch):
    out = tmp_path / "timing.jsonl"
    first = plan.cases(child.timed_operations())[0]
    child.append(out, ended=[first.id, "peft", "it crashed"])
    assert child.time_cases(StandIn(), out, time.time() + 60, 1, 0.01) == 0
    rows = {line["row"]["extra_info"]["arm"]: line["row"]["extra_info"] for line in child.lines(out) if "row" in line}
    assert "peft" not in rows
    assert rows["frozen"]["refused"]["peft"] == "it crashed"


def test_no_case_starts_after_the_deadline(tmp_path):
    out = tmp_path / "timing.jsonl"
    assert child.time_cases(StandIn(), out, time.time() - 1, None, 0.01) == 0
    assert child.lines(out) == []


def test_contenders_that_fail_are_refused_with_a_sentence_and_the_others_are_timed(monkeypatch):
    build = contenders.build

    def failing(name, problem, device):
        if name == "peft":
            raise ValueError("a bug\nin two lines")
        if name == "reference-exact":
            raise device.OutOfMemory("40 GiB wanted")
        if name == "compiled":
            time.sleep(30)
        if name in ("triton-fast", "triton-exact", "cuda-fast", "cuda-exact"):
            raise NotAvailable("not in this test")
        contender = build(name, problem, device)
        if name == "torch":
            forward = contender.arm.forward
            contender.arm.forward = lambda x: forward(x) * 1.01
        return contender

    monkeypatch.setattr(contenders, "build", failing)
    measured = timing.measure_case(SMALL, StandIn(), 0.01, first_run=3.0)
    assert set(measured.samples) == {"frozen", "reference-fast"}
    assert measured.refused["peft"] == "ValueError: a bug"
    assert measured.refused["reference-exact"] == "out of memory: OutOfMemory: 40 GiB wanted"
    assert "its first run took more than 3 s" in measured.refused["compiled"]
    assert "so it was not timed" in measured.refused["torch"]
    rows = timing.as_rows(measured)
    (frozen,) = [row["extra_info"] for row in rows if row["extra_info"]["arm"] == "frozen"]
    assert frozen["refused"] == measured.refused and frozen["not_available"] == measured.absent


def test_a_backend_that_failed_gives_its_name_to_no_figure_of_the_next_one(monkeypatch):
    from peftkern import dispatch

    if stand_in.missing().get("triton") or missing("triton"):
        pytest.skip("no triton backend here")
    rotate = dispatch.operations()["rotate"]

    def fails(*args):
        raise RuntimeError("does not compile")

    with StandIn().backends(), pytest.warns(UserWarning, match="does not compile"):
        monkeypatch.setattr(rotate.backend("triton")[0], "rotate", fails)
        monkeypatch.setattr(rotate, "_broken", {})
        measured = timing.measure_case(replace(SMALL, dtype="bf16+fp32"), StandIn(), 0.01)
    # The exact precision does not call it.
    assert "does not compile" in measured.refused["triton-fast"]
    assert {"triton-exact", "reference-fast"} <= set(measured.samples)


def test_a_device_that_is_lost_is_not_used_again():
    class Losing(StandIn):
        def alive(self):
            return False

        def peak_bytes(self, call):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(timing.DeviceLost, match="illegal memory access") as lost:
        timing.measure_case(SMALL, Losing(), 0.01)
    assert lost.value.contender == "frozen"


@pytest.fixture
def calls(monkeypatch):
    """torch.cuda's calls on the processor: what was called, in order."""
    seen = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            seen.append("mark")
            self.at = time.perf_counter()

        def elapsed_time(self, other):
            return 1e3 * (other.at - self.at)

    def noted(name, result=None):
        return lambda *args: seen.append(name) or result

    fakes = {
        "Event": Event,
        "_sleep": noted("hold"),
        "synchronize": noted("wait"),
        "reset_peak_memory_stats": noted("reset"),
        "empty_cache": noted("empty"),
        "memory_allocated": noted("allocated", 100),
        "max_memory_allocated": noted("most", 107),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(Cuda, "kind", "cpu")
    return seen


def test_stages_are_timed_by_events_behind_a_waiting_kernel(calls):
    device = Cuda()
    calls.clear()
    stages = [lambda: calls.append("forward"), lambda: calls.append("backward")]
    seconds, host = device.seconds(stages, hold=1e-3)
    assert calls == ["wait", "hold", "mark", "forward", "mark", "backward", "mark", "wait"]
    assert len(seconds) == 2 and all(s >= 0 for s in (*seconds, host))
    calls.clear()
    assert device.peak_bytes(lambda: calls.append("run")) == 7
    assert calls == ["wait", "reset", "allocated", "run", "wait", "most"]


def test_a_real_run_measures_what_a_dry_run_prepares(calls, tmp_path, monkeypatch):
    from peftkern import dispatch

    small = [
        replace(SMALL, dtype="bf16+fp32"),
        replace(SMALL, kind="gram_schmidt"),
        replace(SMALL, kind="op:rotate", of="linear"),
    ]
    monkeypatch.setattr(plan, "cases", lambda operations: small)
    monkeypatch.setitem(dispatch.PREFERENCE, "cpu", ("cpu", "reference"))
    out = tmp_path / "timing.jsonl"
    device = Cuda()
    assert child.time_cases(device, out, time.time() + 300, None, 0.01) == 0
    rows = [line["row"]["extra_info"] for line in child.lines(out) if "row" in line]
    arms = (("reference-exact", "peft"), ("reference-fast", "torch"), ("reference",))
    wanted = {(case.id, arm) for case, some in zip(small, arms, strict=True) for arm in ("frozen", *some)}
    assert wanted <= {(info["case"]["id"], info["arm"]) for info in rows}
    assert all(info["peak_bytes"] == 7 and info["overhead"]["rounds"] >= 1 for info in rows)
    judged = [info for info in rows if info["arm"] in ("peft", "torch", "reference-fast", "reference-exact")]
    assert all(set(info["error"]) == {"y", "dx", "du"} for info in judged)
    reasons = {info["not_available"].get("compiled") for info in rows if info["arm"] == "frozen"} - {None}
    assert reasons and all("compiling takes long" in reason for reason in reasons)

    peaks = card.peaks(device, copy_sizes=(2**16,), product_sizes=(32, 64))
    assert set(peaks["flops_per_second"]) == {kind for kind, _, _ in card.PRODUCTS}
    assert peaks["copy_bytes_per_second"] > 0 and peaks["launch_seconds"] > 0


def test_a_file_that_needs_a_missing_package_is_left_out_and_named(run, tmp_path, monkeypatch):
    (tmp_path / "test_needs.py").write_text("import no_such_package\n")
    (tmp_path / "test_cuda.py").write_text("def test_good(): pass\n")
    monkeypatch.setattr(steps, "DEVICE_TESTS", ("--rootdir", str(tmp_path), "-p", "no:cacheprovider", str(tmp_path)))
    step = steps.tests(run)
    assert step.ok is True
    assert any("No module named 'no_such_package': " in said and "test_needs.py" in said for said in step.said)
    (tmp_path / "test_needs.py").write_text("1 / 0\n")
    assert steps.tests(run).ok is False


def test_outcomes_survive_and_are_not_repeated(tmp_path):
    (tmp_path / "test_three.py").write_text(
        "import pytest\ndef test_good(): pass\ndef test_bad(): assert 1 == 2, 'why'\n"
        "@pytest.mark.skip(reason='not now')\ndef test_skipped(): pass\n"
    )
    out = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "bench.gpu.outcomes", "-p", "no:cacheprovider"]
    command += ["--rootdir", str(tmp_path), "--outcomes", str(out), str(tmp_path / "test_three.py")]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 1
    found = {line["test"].rpartition("::")[2]: line for line in child.lines(out)}
    assert {name: line["outcome"] for name, line in found.items()} == {
        "test_good": "passed", "test_bad": "failed", "test_skipped": "skipped"
    }  # fmt: skip
    assert "why" in found["test_bad"]["said"] and "not now" in found["test_skipped"]["said"]
    again = subprocess.run([*command, "--not-again", str(out)], cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 5 and "3 deselected" in again.stdout


def test_the_card_is_the_one_that_torch_uses(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        '#!/bin/sh\ncase "$*" in *--id=GPU-7*clocks.sm*|*clocks.sm*--id=GPU-7*) echo "1410 MHz";; *) exit 1;; esac\n'
    )
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    class Properties:
        name, major, minor, multi_processor_count, total_memory, uuid = "NVIDIA A100", 8, 0, 108, 80 << 30, "7"

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", {1: Properties}.__getitem__)
    found = card.describe()
    assert found["clocks.sm"] == "1410 MHz" and "power.limit" not in found
    assert (found["name"], found["capability"], found["l2_bytes"]) == ("NVIDIA A100", "8.0", None)
    assert card.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
