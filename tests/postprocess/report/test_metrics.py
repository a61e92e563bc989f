"""The report's metrics, against values computed by hand."""

import math

import numpy as np
import polars as pl
import pytest

from postprocess.report import metrics
from postprocess.report.run_data import read_evidence
from preprocess.model_input import VERDICTS
from tests.postprocess.report import reported
from tests.postprocess.report.reported import FOUR, TWO, Row

LOSS = -(math.log(0.82) + math.log(0.41) + math.log(0.81) + math.log(0.28)) / 4


def rows_of(tmp_path, rows=FOUR, verdicts=TWO):
    return read_evidence(reported.run(tmp_path / "run", rows, verdicts)).rows


def data_of(tmp_path, rows=FOUR, verdicts=TWO):
    return metrics.scored(rows_of(tmp_path, rows, verdicts), verdicts)


def test_accuracy_and_log_loss_are_of_the_mean_of_both_orders(tmp_path):
    line = metrics.model_line(data_of(tmp_path))
    assert (line.rows, line.groups, line.accuracy.value) == (4, 2, 0.5)
    assert line.log_loss.value == pytest.approx(LOSS)


def test_the_interval_is_of_whole_groups_of_prompts(tmp_path):
    """Each group has one row right and one wrong, so that no draw of groups has another accuracy; of single rows some have."""
    assert metrics.model_line(data_of(tmp_path)).accuracy == metrics.Figure(0.5, 0.5, 0.5)
    alone = [Row(row.given, row.swapped, row.winner) for row in FOUR]
    assert metrics.model_line(data_of(tmp_path / "alone", alone)).accuracy == metrics.Figure(0.5, 0.0, 1.0)


def test_a_part_of_the_rows_has_the_interval_of_its_own_groups(tmp_path):
    rows = [Row(0.9, 0.9, group=number // 2) for number in range(4)] + [Row(0.1, 0.1, group=9)]
    data = data_of(tmp_path, rows)
    part = metrics.model_line(data, "part", np.array([True, True, True, True, False]))
    assert (part.rows, part.groups, part.accuracy) == (4, 2, metrics.Figure(1.0, 1.0, 1.0))


def test_the_longer_answer_and_the_constant_guess_are_the_baselines(tmp_path):
    rows = rows_of(tmp_path)
    data, length = metrics.scored(rows, TWO), metrics.lengths(rows)
    longer, constant = metrics.baselines(data, metrics.longer_is_a(length))
    assert (longer.line.name, longer.line.accuracy.value, constant.line.accuracy.value) == ("the longer answer", 0.5, 0.5)
    assert constant.line.log_loss.value == pytest.approx(math.log(2))
    assert constant.gain_log_loss.value == pytest.approx(LOSS - math.log(2))
    assert longer.gain_accuracy.value == 0.0


def test_the_longer_answer_is_as_sure_as_it_is_often_right(tmp_path):
    """It wins in three of four rows: accuracy 0.75, log loss that of three times 0.75 and once 0.25."""
    rows = [Row(0.5, 0.5, "model_a", a="longer", b="s")] * 2 + [Row(0.5, 0.5, "model_b", a="s", b="longer")] * 2
    rows[3] = Row(0.5, 0.5, "model_b", a="longer", b="s")
    table = rows_of(tmp_path, rows)
    length = metrics.lengths(table)
    longer, _ = metrics.baselines(metrics.scored(table, TWO), metrics.longer_is_a(length))
    assert longer.line.accuracy.value == 0.75
    assert longer.line.log_loss.value == pytest.approx(-(3 * math.log(0.75) + math.log(0.25)) / 4)


def test_calibration_by_hand(tmp_path):
    """Confidences 0.82 and 0.81 share a bin and are right; 0.59 and 0.72 have bins of their own and are wrong."""
    found = metrics.calibration(data_of(tmp_path))
    assert [(one.rows, round(one.confidence, 3), one.accuracy.value) for one in found.bins] == [
        (1, 0.59, 0.0),
        (1, 0.72, 0.0),
        (2, 0.815, 1.0),
    ]
    assert found.error == pytest.approx((0.59 + 0.72 + 2 * 0.185) / 4)


def test_the_best_temperature_makes_confidence_what_accuracy_is(tmp_path):
    """Always 0.9 sure and right in three of four: logit(0.9) / T = logit(0.75), so T = ln 9 / ln 3 = 2."""
    found = metrics.calibration(data_of(tmp_path, [Row(0.9, 0.9)] * 3 + [Row(0.9, 0.9, "model_b")]))
    assert found.temperature == pytest.approx(2, abs=1e-3)
    assert found.log_loss == pytest.approx(-(3 * math.log(0.9) + math.log(0.1)) / 4)
    assert found.log_loss_at_temperature == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))


def test_position_bias_is_what_the_first_answer_gets_more_than_the_second(tmp_path):
    """As given the first answer is A: chosen in 3 of 4; swapped it is B: chosen in 2 of 4."""
    found = metrics.positions(data_of(tmp_path))
    figures = {one.name: [round(part.value, 4) for part in (one.as_given, one.swapped, one.both)] for one in found.first}
    assert figures == {
        "preferred by the labels": [0.5, 0.5, 0.5],
        "chosen by the model": [0.75, 0.5, 0.625],
        "mean probability": [0.66, 0.59, 0.625],
    }
    assert found.chosen.value == pytest.approx(0.25)
    assert found.probability.value == pytest.approx(0.25)
    assert found.flips.value == 0.25


def test_either_order_and_both_are_scored_alone(tmp_path):
    """As given row 1 is right, which the mean has wrong: the mean gains -0.25 in accuracy."""
    found = metrics.positions(data_of(tmp_path))
    assert [(line.name, line.accuracy.value) for line in found.orders] == [
        ("order as given", 0.75),
        ("order swapped", 0.5),
        ("mean of both", 0.5),
    ]
    assert found.gain_accuracy.value == -0.25


def test_a_tie_of_three_verdicts_is_neither_first_nor_second(tmp_path):
    rows = [Row(0.5, 0.5, "tie", tie=0.8), Row(0.75, 0.75, "model_a", tie=0.2)]
    data = data_of(tmp_path, rows, VERDICTS)
    found = metrics.positions(data)
    assert metrics.model_line(data).accuracy.value == 1.0
    assert [round(one.both.value, 4) for one in found.first] == [0.25, 0.25, 0.25]  # (0.1 + 0.6 + 0.1 + 0.2) / 4 = 0.25
    assert (found.chosen.value, round(found.probability.value, 12)) == (0.0, 0.0)


def test_the_order_of_the_verdicts_changes_no_number(tmp_path):
    rows = [Row(0.9, 0.8, "tie", tie=0.2, group=1), Row(0.7, 0.2, "model_a", tie=0.1), Row(0.3, 0.1, "model_b", tie=0.5)]
    rows += [Row(0.6, 0.6, "model_a")]  # so that one verdict is the commonest
    one, other = (data_of(tmp_path / "".join(order), rows, order) for order in (VERDICTS, ("model_b", "tie", "model_a")))
    assert metrics.model_line(one) == metrics.model_line(other)
    assert metrics.positions(one) == metrics.positions(other)
    assert metrics.calibration(one).error == metrics.calibration(other).error
    longer_r = np.array([True, False, True, True])
    assert metrics.baselines(one, longer_r) == metrics.baselines(other, longer_r)


def test_ties_of_a_model_of_two_verdicts_count_in_log_loss_alone(tmp_path):
    data = data_of(tmp_path, [Row(0.9, 0.9), Row(0.8, 0.8, "tie")])
    line = metrics.model_line(data)
    assert (line.rows, line.accuracy.value) == (2, 1.0)
    assert line.log_loss.value == pytest.approx(-(math.log(0.9) + (math.log(0.8) + math.log(0.2)) / 2) / 2)
    assert metrics.worst(data, 50) == []


def test_the_thirteenth_language_and_those_after_it_share_a_line(tmp_path):
    rows = [Row(0.9, 0.9, language=f"L{number:02d}") for number in range(13)] + [Row(0.9, 0.9, language=None)] * 2
    table = rows_of(tmp_path, rows)
    lines = metrics.by_name(metrics.scored(table, TWO), table["language"], "languages")
    assert [(line.name, line.rows) for line in lines[:2]] == [("unknown", 2), ("L00", 1)]
    assert (len(lines), lines[-1].name, lines[-1].rows) == (12, "3 other languages", 3)


def test_of_equally_long_answers_the_first_counts_as_the_longer():
    length = {"response_a": np.array([5, 4, 6]), "response_b": np.array([5, 5, 5])}
    assert metrics.longer_is_a(length).tolist() == [True, False, True]


def test_lengths_are_quarters_of_the_rows(tmp_path):
    rows = [Row(0.9, 0.9, prompt="", a="x" * number, b="") for number in range(1, 9)]
    table = rows_of(tmp_path, rows)
    lines = metrics.by_length(metrics.scored(table, TWO), sum(metrics.lengths(table).values()))
    assert [(line.name, line.rows) for line in lines] == [
        ("up to 2 characters", 2),
        ("3 to 4", 2),
        ("5 to 6", 2),
        ("7 to 8", 2),
    ]


def test_rows_of_equal_length_are_one_line(tmp_path):
    table = rows_of(tmp_path, [Row(0.9, 0.9)] * 5)
    lines = metrics.by_length(metrics.scored(table, TWO), sum(metrics.lengths(table).values()))
    assert [(line.name, line.rows) for line in lines] == [("up to 16 characters", 5)]


def test_lines_by_which_answer_won(tmp_path):
    table = rows_of(tmp_path, [*FOUR, Row(0.5, 0.5, "tie")])
    lines = metrics.by_longer(metrics.scored(table, TWO), metrics.lengths(table))
    assert [(line.name, line.rows, line.accuracy and line.accuracy.value) for line in lines] == [
        ("the longer answer won", 2, 1.0),
        ("the shorter answer won", 2, 0.0),
        ("a tie", 1, None),
    ]


def test_the_worst_errors_are_those_with_the_least_probable_winner(tmp_path):
    data = data_of(tmp_path)
    assert metrics.worst(data, 50) == [3, 1]
    assert metrics.worst(data, 1) == [3]


def test_without_the_pairs_file_the_winner_is_the_label():
    table = pl.DataFrame({"id": ["x"], "fold": [0], "winner": ["tie"]}).with_columns(
        **{f"p_model_{side}{suffix}": pl.lit(0.5) for side in "ab" for suffix in ("", "_as_given", "_swapped")}
    )
    assert metrics.scored(table, TWO).labels_rv.tolist() == [[0.5, 0.5]]


def test_a_curve_is_by_step_and_smoothed_over_a_tenth():
    records = [{"step": 2, "loss": 1.0}, {"step": 1, "loss": 3.0}, {"step": 2, "eval_loss": 9.0}, {"step": 3, "loss": "nan"}]
    assert metrics.curve(records, "loss") == [(1, 3.0), (2, 1.0)]
    bumpy = [(step, float(step % 2)) for step in range(40)]
    smooth = metrics.smoothed(bumpy)
    assert smooth[0] == (0, 0.0)
    assert smooth[1] == (1, pytest.approx(1 / 3))
    assert smooth[20] == (20, pytest.approx(2 / 5))
