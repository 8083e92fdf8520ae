"""The demo's checks fail when the two runs differ."""

import math

import pytest
from demo.checks import Score, curves_agree, gaps, reload_agrees

CURVE = [1.0 - step / 100 for step in range(60)]


def bent(step, by):
    return [loss * (1 + by * (i == step)) for i, loss in enumerate(CURVE)]


def test_gaps_are_relative():
    assert gaps([2.0, 4.0], [2.0, 3.0]) == [0.0, 0.25]


@pytest.mark.parametrize("dtype, allowed", [("float32", 1e-4), ("float64", 1e-9)])
def test_curves_are_judged_over_the_first_fifty_steps(dtype, allowed):
    assert curves_agree(CURVE, bent(49, 0.9 * allowed), dtype).passed is True
    assert curves_agree(CURVE, bent(49, 1.1 * allowed), dtype).passed is False
    later = curves_agree(CURVE, bent(50, 0.25), dtype)
    assert later.passed is True and "2.5e-01 later" in later.text


def test_a_nan_fails():
    assert curves_agree(CURVE, bent(3, math.nan), "float32").passed is False


def test_half_precision_is_shown_and_not_judged():
    check = curves_agree(CURVE, bent(3, 0.5), "bfloat16")
    assert check.passed is None and "5.0e-01" in check.text


def test_curves_of_different_length_are_refused():
    with pytest.raises(ValueError):
        curves_agree(CURVE, CURVE[:-1], "float32")


def test_a_reloaded_classifier_must_be_right_as_often():
    assert reload_agrees(Score(100, correct=84), Score(100, correct=84), "float32").passed is True
    assert reload_agrees(Score(100, correct=84), Score(100, correct=83), "float32").passed is False


def test_a_reloaded_language_model_must_have_the_same_perplexity():
    assert reload_agrees(Score(100, loss=300.0), Score(100, loss=300.001), "float32").passed is True
    assert reload_agrees(Score(100, loss=300.0), Score(100, loss=300.1), "float32").passed is False


def test_scores_are_accuracy_or_perplexity():
    assert str(Score(1000, correct=843)) == "84.3%"
    assert str(Score(2, loss=2 * math.log(12.5))) == "12.500"
