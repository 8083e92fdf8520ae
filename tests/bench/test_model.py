"""The model of the GPU: the roofline on cases computed by hand, and sense in what it says of the real kernels."""

import json
import time
from dataclasses import replace

import pytest
import torch

from bench import cards, layers, model
from bench.cases import Case
from bench.gpu import page, predictions, timing
from bench.gpu import plan as gpu_plan
from bench.gpu.device import StandIn
from bench.layers import NoCosts
from bench.model import Prediction
from bench.result import Result
from peftkern import dispatch
from peftkern.ops._costs import FLOP_KINDS, Launch

H100 = cards.card("H100")
ONE_SECOND = cards.Rates("one", dict.fromkeys(FLOP_KINDS, 1.0), hbm=1.0, l2=2.0, launch=0.5)
FOUR = replace(H100, multiprocessors=4)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
HRA, OFT, BOFT = (goal.case for goal in model.GOALS)


@pytest.mark.parametrize(
    ("launch", "seconds", "limit"),
    [
        (Launch("k", read=3, written=1, unique=4), 4, "HBM"),
        (Launch("k", read=30, written=10, unique=4), 20, "L2"),
        (Launch("k", read=3, written=1, unique=4, flops={"tensor_bf16": 9, "fp64": 8}), 9, "tensor bf16"),
        (Launch("k", read=3, written=1, unique=4, flops={"tensor_bf16": 9, "fp64": 12}), 12, "fp64"),
        # One block has a quarter of the arithmetic and of L2's bandwidth of four multiprocessors, and all of HBM's.
        (Launch("k", read=3, written=1, unique=4, flops={"fp64": 1}, blocks=1), 8, "L2"),
        (Launch("k", read=1, written=0, unique=1, flops={"fp64": 2}, blocks=1), 8, "fp64"),
        (Launch("k", read=1, written=0, unique=1, flops={"fp64": 2}, blocks=400), 2, "fp64"),
    ],
)
def test_a_launch_takes_the_longest_of_its_times(launch, seconds, limit):
    assert model.time_of(launch, FOUR, ONE_SECOND) == (seconds, limit)


def test_launches_add_up_with_a_gap_before_each_and_the_limit_is_the_largest_part():
    launches = [Launch("a", 3, 1, 4), Launch("b", 0, 0, 0, {"fp32": 3}), Launch("c", 0, 0, 0, {"fp32": 2})]
    found = model.predict(launches, FOUR, ONE_SECOND)
    assert found == Prediction(10.5, {"HBM": 4.0, "launch": 1.5, "fp32": 5.0})
    assert found.limit == "fp32"
    assert model.predict([], FOUR, ONE_SECOND).limit == "nothing"


def test_own_products_are_derated_and_the_librarys_are_not():
    slower = replace(ONE_SECOND, own=0.5)
    flops = {"tensor_bf16": 8}
    assert model.time_of(Launch("k", 0, 0, 0, flops), FOUR, slower)[0] == 16
    assert model.time_of(Launch(layers.LIBRARY + "k", 0, 0, 0, flops), FOUR, slower)[0] == 8
    assert model.time_of(Launch("k", 0, 0, 0, {"fp64": 8}), FOUR, slower)[0] == 8


def test_the_floor_of_the_goal_is_what_the_data_sheet_gives():
    floor = model.predict(layers.frozen(HRA), H100, H100.peak)
    assert floor.seconds == pytest.approx(2 * (2 * 8192 * 4096 * 4096 / 989.4e12 + 1e-6))
    assert floor.limit == "tensor bf16"
    in_fp32 = model.predict(layers.frozen(replace(HRA, dtype="fp32")), H100, H100.peak)
    assert in_fp32.limit == "fp32"


def test_no_form_that_calls_the_frozen_layer_as_it_is_reaches_the_goal():
    passes = 5 * 8192 * 4096 * 2 / 3.35e12
    least = model.predict(layers.fewest_passes(HRA), H100, H100.peak).seconds
    assert least == pytest.approx(model.predict(layers.frozen(HRA), H100, H100.peak).seconds + passes + 2e-6)
    assert "five times at least: 18.3 %" in "".join(model.goal_lines())


def test_a_form_that_rotates_the_weight_passes_over_it_instead():
    rows, weight = 8192 * 4096 * 2, 4096 * 4096 * 2
    for case, backward in ((OFT, 3), (BOFT, 6)):
        passes = layers.fewest_passes(case, reads_weight=True)
        frozen = sum(launch.unique for launch in layers.frozen(case))
        assert sum(launch.unique for launch in passes) == 2 * weight + backward * rows + frozen
    lines = "\n".join(model.goal_lines())
    assert lines.count("rotates its fewer rows passes over them twice and over its own") == 2
    assert "three times: 14.7 % at data-sheet peaks" in lines and "six times: 25.7 % at data-sheet peaks" in lines


@pytest.mark.parametrize(("case", "op"), ((OFT, "block_rotate"), (BOFT, "butterfly_rotate_weight")))
@pytest.mark.parametrize("backend", model.BACKENDS)
def test_fast_rotates_the_weight_where_it_has_fewer_rows(case, op, backend):
    """As the package does (rotates_weight): not of as many rows, not in exact precision."""

    def rotated(tokens, precision="fast"):
        parts = layers.layer(replace(case, tokens=tokens), backend, precision, "sm90")
        return next(
            launch for name in (op, "butterfly_rotate") for launch in parts.get(name, ()) if "rot" in launch.kernel
        )

    weight, few = (2 * rows * 4096 * 2 for rows in (4096, 1024))
    for tokens in (4097, 8192, 65536):
        assert weight <= rotated(tokens).unique <= 1.05 * weight
    assert few <= rotated(1024).unique <= 1.1 * few
    assert op not in layers.layer(case, backend, "exact", "sm90")
    in_fp32 = layers.layer(replace(case, dtype="fp32"), backend, "fast", "sm90")
    assert op in in_fp32 and ("scale_outputs" in in_fp32) is False


def test_a_scaled_output_is_ten_passes_at_least():
    size = 8192 * 4096 * 2
    passes = layers.fewest_passes(BOFT)
    assert sum(launch.unique for launch in passes) == 10 * size + sum(launch.unique for launch in layers.frozen(BOFT))
    assert [launch.unique for launch in layers.fewest_passes(OFT)] == [
        launch.unique for launch in layers.fewest_passes(HRA)
    ]


@pytest.mark.parametrize("kind", layers.KINDS)
@pytest.mark.parametrize("precision", layers.PRECISIONS)
def test_a_layer_of_each_kind_is_made_of_operations_that_exist(kind, precision):
    names = {*layers.KINDS[kind].factor, *layers.KINDS[kind].rows[precision], *layers.KINDS[kind].by_weight}
    assert names <= {*dispatch.operations(), *layers.PRODUCTS}


def test_the_sizes_of_a_layer_reach_the_costs_by_their_names(monkeypatch):
    asked = []

    class Costs:
        def launches(op, backend, **sizes):
            asked.append((op, backend, sizes))
            return []

    monkeypatch.setattr(layers, "_costs", lambda family: Costs)
    shared = {"M": 8192, "K": 4096, "N": 4096, "dtype": torch.bfloat16, "family": "sm90"}
    sizes = {HRA: {"r": 32}, OFT: {"b": 32, "f": 1}, BOFT: {"b": 8, "f": 4}}
    for case, own in sizes.items():
        layers.layer(case, "cuda", "exact", "sm90")
        names = (layers.KINDS[case.kind].factor[0], *layers.KINDS[case.kind].rows["exact"])
        assert asked[: len(names)] == [(name, "cuda", {**shared, **own}) for name in names]
        asked.clear()


def test_what_autograd_adds_is_sums_of_gradients_and_casts_of_half_precision_parameters(monkeypatch):
    monkeypatch.setattr(layers, "launches_of", lambda *args: [])

    def glue(case):
        return {
            launch.kernel.removeprefix("library: "): launch for launch in layers.layer(case, "", "fast", "")["autograd"]
        }

    mixed = {"dtype": "bf16+fp32"}
    assert glue(replace(OFT, **mixed)) == {}
    assert set(glue(replace(BOFT, **mixed))) == {"scale: abs", "scale: clamp", "scale: copysign", "dscale / scale"}
    assert set(glue(replace(HRA, **mixed))) == {"dV + dV"}
    assert set(glue(OFT)) == {"q to float32", "dq to q's dtype"}
    few = {"tokens": 4096, **mixed}
    assert set(glue(replace(BOFT, **few))) == set() and "dscale / scale" not in glue(replace(BOFT, tokens=4096))
    assert glue(OFT)["q to float32"].unique == (2 + 4) * 128 * 32 * 31 // 2
    assert glue(BOFT)["dboft_R to boft_R's dtype"].unique == (2 + 4) * 4 * 512 * 8 * 8
    assert glue(BOFT)["boft_s to float32"].unique == (2 + 4) * 4096


def test_unknown_cards_are_refused_with_a_sentence(capsys):
    with pytest.raises(ValueError, match="no rates are known for a card 'Voodoo 2'; the cards are A100"):
        cards.card("Voodoo 2")
    assert model.main(["--card", "Voodoo 2"]) == 1
    assert "no rates are known" in capsys.readouterr().err
    assert cards.card("NVIDIA H100 80GB HBM3") is cards.card("h100") is H100
    assert cards.card("4090").name == "RTX 4090"


def test_rates_that_are_reached_are_below_the_peaks():
    for card in cards.CARDS.values():
        usual = cards.typical(card)
        assert set(card.peak.flops) == set(usual.flops) == set(FLOP_KINDS)
        assert all(0 < usual.flops[kind] < rate for kind, rate in card.peak.flops.items())
        assert usual.hbm < card.peak.hbm and usual.l2 < card.peak.l2 and usual.launch > card.peak.launch


def test_flops_of_an_unknown_kind_are_refused():
    with pytest.raises(ValueError, match="tensor_int3"):
        Launch("k", 0, 0, 0, {"tensor_int3": 1})


# ---- what the kernels state


def case_of(op):
    """A layer in which an operation occurs, or one of its family."""
    return BOFT if dispatch.operations()[op].family.endswith("butterfly") else HRA


def stated():
    """(operation, backend) whose costs are stated."""
    found = []
    for name in dispatch.operations():
        for backend in model.BACKENDS:
            try:
                layers.launches_of(name, backend, case_of(name), "sm90")
            except NoCosts:
                continue
            found.append((name, backend))
    return found


STATED = stated()
every_cost = pytest.mark.parametrize(("op", "served_by"), STATED or [pytest.param(None, None, marks=pytest.mark.skip)])
families = pytest.mark.parametrize("family", sorted({card.family for card in cards.CARDS.values()}))


@every_cost
@families
@pytest.mark.parametrize("dtype", DTYPES)
def test_costs_are_of_launches_that_could_be(op, served_by, family, dtype):
    launches = layers.launches_of(op, served_by, replace(case_of(op), dtype=dtype), family)
    assert launches
    for launch in launches:
        assert isinstance(launch, Launch) and launch.kernel
        assert launch.unique > 0
        # Each distinct byte is requested at least once.
        assert launch.read + launch.written >= launch.unique
        assert all(isinstance(n, int) and n >= 0 for n in (launch.read, launch.written, *launch.flops.values()))
        assert launch.blocks is None or launch.blocks >= 1


@every_cost
@pytest.mark.parametrize("card", cards.CARDS)
def test_more_columns_and_more_rows_never_cost_less(op, served_by, card):
    card = cards.card(card)

    def seconds(**changes):
        launches = layers.launches_of(op, served_by, replace(case_of(op), **changes), card.family)
        return model.predict(launches, card, card.peak).seconds

    # Above 32 a backend may change to another form of the operation.
    rotates = dispatch.operations()[op].family.endswith(("block_rotation", "butterfly"))
    for of_one_form in ((8, 16, 32),) if rotates else ((8, 16, 32), (64, 128)):
        by_r = [seconds(r=r, factors=1) for r in of_one_form]
        assert by_r == sorted(by_r)
    by_rows = [seconds(tokens=tokens) for tokens in (2048, 4096, 8192, 16384)]
    assert by_rows == sorted(by_rows)


@pytest.mark.skipif(not model.layers_of(H100, H100.peak), reason="no backend states a layer's costs")
def test_no_layer_is_faster_than_its_frozen_layer():
    for card in cards.CARDS.values():
        for rates in (card.peak, cards.typical(card)):
            for found in model.layers_of(card, rates):
                assert found.added > 0, (card.name, rates.name, found.case.id, found.backend, found.precision)
                assert found.total.seconds == pytest.approx(sum(part.seconds for part in found.parts.values()))


@pytest.mark.parametrize("kind", layers.KINDS)
@pytest.mark.parametrize("backend", model.BACKENDS)
def test_fast_multiplies_by_the_weight_as_often_as_the_frozen_layer(kind, backend):
    case = next(case for case in model.CASES if case.kind == kind)
    try:
        parts = layers.layer(case, backend, "fast", "sm90")
    except NoCosts as reason:
        pytest.skip(str(reason))

    def products(launches):
        return [launch.flops for launch in launches if launch.kernel.startswith(layers.LIBRARY) and launch.flops]

    everything = products(launch for launches in parts.values() for launch in launches)
    weight = products(layers.frozen(case))
    assert [flops for flops in everything if flops == weight[0]] == weight


# ---- what is shown


@pytest.fixture
def invented(monkeypatch):
    """Costs of one backend that add a tenth of a pass each, whatever the kernels state."""

    def launches(op, backend, case, family):
        if backend != "cuda":
            raise NoCosts(f"{backend} does not write {op}")
        own = Launch(op, 10**7, 0, 10**7)
        if "rotated_linear" in op:
            return [layers.frozen(case)[op.endswith("_backward")], own]
        return [own]

    monkeypatch.setattr(layers, "launches_of", launches)


def test_the_output_says_that_it_predicts_and_whether_the_goals_are_reached(invented, capsys):
    assert model.main(["--card", "H100", "--launches"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("PREDICTIONS, not measurements")
    goals = text[text.index("Goal: ") : text.index("Not predicted")].split("Goal: ")[1:]
    for goal, what in zip(goals, ("HRA r 32", "OFT b 32", "BOFT b 8, f 4"), strict=True):
        assert goal.startswith(f"{what}, bf16, 4096 x 4096, 8192 tokens on H100 SXM adds at most ")
        assert "cuda, exact, at data-sheet peaks: reached, predicted" in goal
        assert "Predicted to be reached by cuda, fast, at data-sheet peaks; cuda, exact, at data-sheet peaks;" in goal
    assert "OFT, 4096 wide, b 32, fp32" in text and "BOFT, 4096 wide, b 8, f 4, bf16, cuda, exact" in text
    assert "HRA, triton, fast: triton does not write wy_factor" in text
    assert "BOFT, triton, exact: triton does not write dense_cayley" in text
    assert all(line in text for line in cards.ASSUMPTIONS)


def test_a_goal_is_called_missed_where_it_is(invented, monkeypatch):
    monkeypatch.setattr(model, "GOALS", (replace(model.GOALS[0], most=0.001),))
    text = "".join(model.goal_lines())
    assert "missed" in text and ": reached" not in text
    assert text.endswith("No backend and precision is predicted to reach it, at either rates.")


def test_goals_of_kernels_without_costs_are_stated_as_such(invented, monkeypatch, tmp_path):
    def launches(op, backend, case, family):
        if case.layer == "oft":
            raise NoCosts("not stated")
        return known(op, backend, case, family)

    known = layers.launches_of
    monkeypatch.setattr(layers, "launches_of", launches)
    _, oft, boft = "\n".join(model.goal_lines()).split("Goal: ")[1:]
    assert "No backend states its costs" in oft and "No backend states its costs" not in boft
    html = predictions.section(tmp_path)
    assert html.count("No backend states its costs") == 1
    assert ">BOFT, 8192 wide, b 8, f 4, bf16</td>" in html and ">OFT, 4096" not in html


OPERATIONS = {gpu_plan.HEAD: "rotate", gpu_plan.BOFT: "butterfly_rotate"}


def test_measured_figures_stand_beside_the_predictions(invented, tmp_path):
    device = StandIn()
    rows = []
    timed = [replace(head, kind=f"op:{op}", of=head.kind) for head, op in OPERATIONS.items()]
    for case in (*OPERATIONS, *timed):
        measured = timing.measure_case(gpu_plan.shrunk(case), device, 0.01)
        # What a card would have measured: the reference's rows under the name of a backend that has predictions.
        rows += timing.as_rows(measured)
    for row in rows:
        row["extra_info"]["arm"] = row["extra_info"]["arm"].replace("reference", "cuda")
        row["extra_info"]["case"] |= {"width_in": 4096, "width_out": 4096, "tokens": 8192}
    flops = dict.fromkeys(("tensor_bf16", "tensor_fp16", "tensor_tf32", "fp32", "fp64"), 1e13)
    peaks = {"copy_bytes_per_second": 2e12, "flops_per_second": flops, "launch_seconds": 3e-6}
    data = {"datetime": time.strftime("%Y-%m-%dT%H:%M:%S"), "machine_info": {}, "benchmarks": rows}
    gpu = {"dry_run": False, "card": {"name": "NVIDIA H100 80GB HBM3"}, "peaks": peaks, "steps": [], "versions": {}}
    for row in rows:
        row["extra_info"] |= {"machine": {}, "versions": {}, "backends": {}, "commit": None}
    path = tmp_path / "h100.json"
    path.write_text(json.dumps({**data, "gpu": {**gpu, "order": "", "dropped": []}}))
    result = Result.load(path)
    html = page.render(result)
    assert predictions.LABEL in html and "measured rates" in html
    head, lines = predictions.beside_layers(result)
    assert [line[1:3] for line in lines] == 2 * [["cuda", "fast"], ["cuda", "exact"]]
    assert lines[2][0].startswith("BOFT, ")
    assert len(head) == len(lines[0]) == 8
    head, lines = predictions.beside_operations(result)
    assert [line[0].partition(",")[0] for line in lines] == ["rotate", "butterfly_rotate"]
    assert "Measured: NVIDIA H100 80GB HBM3" in predictions.section(tmp_path)


def test_predictions_of_a_case_are_about_that_case():
    case = Case("linear", 2048, 4096, 8192, 8, "bf16")
    forward, backward = layers.frozen(case)
    assert forward.flops == backward.flops == {"tensor_bf16": 2 * 2048 * 4096 * 8192}
    assert forward.written == 2 * 8192 * 4096 and backward.written == 2 * 8192 * 2048
