"""The demo's table and figure."""

import io

import pytest

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from demo import checks, figure, report


def result(factor):
    return {
        "measure": "held-out accuracy",
        "losses": [0.7, 0.6, 0.5, 0.4],
        "seconds": [2.0 * factor] * 4,
        "step_seconds": 2.0 * factor,
        "train_seconds": 8.0 * factor,
        "peak_bytes": 2**30 * factor,
        "saved_bytes": 2**29 * factor,
        "score_before": None,
        "score": {"total": 1000, "correct": 843, "loss": None},
    }


RESULTS = {"peft": result(1), "peftkern": result(0.25)}
TURNS = {"peft": 1.5, "peftkern": 0.25}


def shown(monkeypatch, passed):
    monkeypatch.setattr(report, "console", report.Console(width=110, record=True, file=io.StringIO()))
    report.closing(RESULTS, TURNS, [checks.Check(passed, "the curves")], passed is not False)
    return report.console.export_text()


def test_the_table_holds_both_arms_and_the_ratio(monkeypatch):
    text = shown(monkeypatch, True)
    for words in ("1.5 s", "250 ms", "6.0 x faster", "512 MiB", "128 MiB", "4.0 x less", "84.3%"):
        assert words in text
    assert "the same loss curve" in text


def test_a_failed_check_is_told_instead_of_the_verdict(monkeypatch):
    text = shown(monkeypatch, False)
    assert "The two runs do not agree" in text and "the same loss curve" not in text


def test_curves_that_were_not_judged_are_not_called_the_same(monkeypatch):
    text = shown(monkeypatch, None)
    assert "6.0 x faster" in text and "the same loss curve" not in text


def test_one_arm_alone_has_a_table_without_ratios(monkeypatch):
    monkeypatch.setattr(report, "console", report.Console(width=110, record=True, file=io.StringIO()))
    report.closing({"peft": result(1)}, None, [], True)
    text = report.console.export_text()
    assert "2.0 s" in text and " x " not in text


def test_the_figure_is_a_png(tmp_path):
    figure.draw(RESULTS, "title", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_smoothing_is_the_mean_of_the_last_losses():
    assert figure.smoothed([1.0, 2.0, 3.0, 5.0], 2) == [1.0, 1.5, 2.5, 4.0]
