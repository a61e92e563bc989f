"""Position bias, against values computed by hand."""

import pytest

from postprocess.report.metrics import model_row
from postprocess.report.position_bias import measure_position_bias
from preprocess.model_input import VERDICTS
from tests.postprocess.report import reported
from tests.postprocess.report.reported import Row


def test_position_bias_is_what_the_first_answer_gets_more_than_the_second(tmp_path):
    """As given the first answer is A: chosen in 3 of 4; swapped it is B: chosen in 2 of 4."""
    bias = measure_position_bias(reported.score(tmp_path / "run"))
    assert bias.verdict_bias.value == pytest.approx(0.25)
    assert bias.probability_bias.value == pytest.approx(0.25)
    assert bias.flip_rate.value == 0.25
    # As given row 1 is right, which the mean has wrong.
    assert [(line.name, line.accuracy.value) for line in bias.orders] == [
        ("order as given", 0.75),
        ("order swapped", 0.5),
        ("mean of both", 0.5),
    ]
    assert bias.gain.accuracy.value == -0.25


def test_a_tie_of_three_verdicts_is_neither_first_nor_second(tmp_path):
    rows = [Row(0.5, 0.5, "tie", tie=0.8), Row(0.7, 0.8, tie=0.2), Row(0.8, 0.7, tie=0.2)]
    scored = reported.score(tmp_path / "run", rows, VERDICTS)
    bias = measure_position_bias(scored)
    assert model_row(scored).accuracy.value == 1.0
    assert (bias.verdict_bias.value, round(bias.probability_bias.value, 12)) == (0.0, 0.0)
