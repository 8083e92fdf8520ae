"""The helpers that measure: order, time, saved bytes, errors, gain, and the refusal to time what is wrong."""

from collections import Counter
from functools import partial
from itertools import pairwise

import pytest
import torch

from bench import arms, measure, oracle, row
from bench.cases import Case, make_problem
from bench.conftest import ReplayClock

SMALL = {
    "linear": Case("linear", 48, 40, 37, 6, "fp32", bias=True),
    "gram_schmidt": Case("gram_schmidt", 48, 40, 37, 5, "fp32"),
    "decode": Case("decode", 48, 40, 1, 6, "fp32"),
    "conv": Case("conv", 6, 5, 2 * 7 * 7, 4, "fp32", bias=True, batch=2, image=7),
}


@pytest.mark.parametrize("count", range(2, 8))
def test_each_arm_follows_each_other_equally_often(count):
    orders = measure.balanced_orders(count)
    assert all(sorted(order) == list(range(count)) for order in orders)
    follows = Counter(pair for order in orders for pair in pairwise(order))
    assert len(follows) == count * (count - 1)
    assert len(set(follows.values())) == 1


def test_interleaved_times_are_per_call_and_slow_arms_run_in_fewer_rounds():
    now = 0.0
    runs = Counter()

    def work(name, seconds):
        nonlocal now
        now += seconds
        runs[name] += 1

    plan = measure.Plan(6, {"a": 1, "b": 1, "slow": 3}, {"a": 4, "b": 2, "slow": 1}, frozenset({"a"}))
    seconds = {"a": 1.0, "b": 2.0, "slow": 50.0}
    times = measure.interleave({name: partial(work, name, s) for name, s in seconds.items()}, plan, lambda: now)
    assert times == {"a": dict.fromkeys(range(6), 1.0), "b": dict.fromkeys(range(6), 2.0), "slow": {0: 50.0, 3: 50.0}}
    assert runs == {"a": 6 * (4 + 1), "b": 6 * 2, "slow": 2}


@pytest.mark.parametrize("peft", [0.2, 3.0, 40.0])
def test_the_plan_keeps_to_the_time_or_to_the_fewest_rounds(peft):
    cost = {"frozen": 0.1, "torch": 0.12, "peft": peft}
    plan = measure.make_plan(cost, seconds=30)
    runs = {name: -(-plan.rounds // every) for name, every in plan.every.items()}
    spent = sum(cost[name] * runs[name] for name in cost)
    assert runs["peft"] >= 1
    assert spent <= 0.6 * 30 + max(0.4 * 30, peft)


def test_overhead_pairs_the_times_of_a_round():
    floor = {0: 1.0, 1: 2.0, 2: 4.0, 3: 1.0}
    found = measure.overhead({0: 2.0, 2: 12.0, 3: 5.0}, floor)
    assert found["median_of_ratios"] == 3.0
    assert found["ratio_of_medians"] == 5.0 / 1.5
    assert found["ratio_of_minima"] == 2.0
    assert (found["q1"], found["q3"], found["rounds"]) == (2.5, 4.0, 3)


def test_replayed_times_arrive_unrounded():
    times = [0.1, 1e-9, 3.0000000000000004]
    seen = []
    clock = ReplayClock()

    class Benchmark:
        def pedantic(self, target, setup, rounds):
            for _ in range(rounds):
                setup()
                start = clock()
                target()
                seen.append(clock() - start)

    clock.feed(Benchmark(), times)
    assert seen == times


def test_saved_bytes_count_each_storage_once_and_neither_parameters_nor_x():
    x = torch.randn(10, 8, requires_grad=True)
    weight = torch.randn(8, 8, requires_grad=True)

    def forward():
        h = x @ weight
        return (h * h.sigmoid()).view(-1) * x.view(-1)

    _, saved = measure.saved_for_backward(forward, [weight], x)
    # h (twice), its sigmoid (twice) and their product.
    assert saved == measure.Saved(bytes=3 * 10 * 8 * 4, x=True, outside=0)


def test_saved_bytes_include_what_a_function_hides_in_its_context():
    class Hiding(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.hidden = x + 1
            return x * 2

        @staticmethod
        def backward(ctx, dy):
            return dy * 2

    x = torch.randn(10, 8, requires_grad=True)
    _, saved = measure.saved_for_backward(lambda: Hiding.apply(x), [], x)
    assert saved == measure.Saved(bytes=320, x=False, outside=320)


def _chain(u):
    H = torch.eye(len(u), dtype=torch.float64)
    for v in u.double().T:
        H = H @ (torch.eye(len(u), dtype=torch.float64) - 2 * torch.outer(v, v) / (v @ v))
    return H


def test_oracle_is_the_product_of_explicit_reflections():
    x, u, dz = torch.randn(9, 7), torch.randn(7, 5), torch.randn(9, 7, dtype=torch.float64)
    z = oracle.rotate(x, u)
    torch.testing.assert_close(z, x.double() @ _chain(u).T, rtol=0, atol=1e-13)
    x64, u64 = x.double().requires_grad_(), u.double().requires_grad_()
    expected = torch.autograd.grad(x64 @ _chain(u64).T, (x64, u64), dz)
    torch.testing.assert_close(oracle.rotate_backward(dz, z, u), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("name", ["peft", "torch"])
def test_arms_that_are_no_part_of_the_package_compute_the_layer(kind, name):
    problem = make_problem(SMALL[kind])
    arm = arms.build(name, problem)
    found = measure.errors(measure.step(arm, problem), oracle.truth(problem))
    assert set(found) == ({"y", "dx", "du"} if kind != "decode" else {"y"})
    assert max(found.values()) < 5e-6


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "bf16+fp32"])
@pytest.mark.parametrize("size", measure.GAIN_SIZES)
def test_small_updates_have_the_size_asked_for(dtype, size):
    problem = make_problem(Case("linear", 512, 512, 128, 8, dtype))
    u = measure.small_update(problem, size)
    assert u.dtype == problem.case.adapter_dtype
    y = problem.x.detach().double() @ problem.weight.double().T
    reached = oracle.update(problem.x.detach(), problem.weight, u).norm() / y.norm()
    assert size / 1.2 < reached < size * 1.2


def test_gain_is_the_part_of_the_update_that_arrived():
    y0, D = torch.randn(20, 30), torch.randn(20, 30, dtype=torch.float64)
    assert measure.gain(y0, y0, D) == 0
    assert measure.gain(y0.double() + 0.25 * D, y0, D) == pytest.approx(0.25)


def test_gains_of_a_float32_path_are_whole_and_the_adapter_is_put_back():
    problem = make_problem(Case("linear", 256, 256, 64, 8, "bf16+fp32"))
    peft, frozen = arms.build("peft", problem), arms.build("frozen", problem)
    found = measure.gains({"peft": peft}, frozen, problem)
    assert found["peft"]["0.01"] == pytest.approx(1, abs=0.05)
    assert torch.equal(peft.u, problem.u)


def test_an_arm_that_computes_something_else_is_refused_with_a_sentence(monkeypatch):
    build = arms.build

    def wrong(name, problem):
        arm = build(name, problem)
        if name == "torch":
            forward = arm.forward
            arm.forward = lambda x: forward(x) * 1.001
        if name in arms.OURS:
            raise arms.NotAvailable("not in this test")
        return arm

    monkeypatch.setattr(arms, "build", wrong)
    measured = row.measure_row(SMALL["linear"], seconds=0.01)
    assert set(measured.times) == {"frozen", "peft"}
    assert "plain torch" in measured.refused["torch"] and "not timed" in measured.refused["torch"]
    assert measured.absent == dict.fromkeys(("fast", "auto"), "not in this test")


def test_the_verdict_asks_twice_the_baseline_of_the_package_alone():
    case = Case("linear", 64, 64, 8, 4, "bf16+fp32")
    baseline = {"y": 1e-3, "dx": 1e-3, "du": 1e-6}
    assert row.verdict("auto", case, {"y": 1.9e-3, "dx": 1.9e-3, "du": 2e-3}, baseline) is None
    assert "2.1 times that of PEFT" in row.verdict("auto", case, {"y": 2.1e-3, "dx": 1e-3, "du": 1e-6}, baseline)
    assert row.verdict("torch", case, {"y": 2.1e-3, "dx": 1e-3, "du": 1e-6}, baseline) is None
    assert "du" in row.verdict("auto", case, {"y": 1e-3, "dx": 1e-3, "du": 1e-2}, baseline)
    assert row.verdict("torch", case, {"y": float("nan")}, baseline) is not None
