"""Accuracy, log loss, baselines and slices, against values computed by hand."""

import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from postprocess.report import metrics
from postprocess.report.calibration import measure_calibration
from postprocess.report.position_bias import measure_position_bias
from postprocess.report.predictions import Predictions
from postprocess.report.worst_rows import rank_wrong_rows
from preprocess.model_input import VERDICTS
from tests.postprocess.report import reported
from tests.postprocess.report.reported import FOUR, TWO, Row

LOSS = -(math.log(0.82) + math.log(0.41) + math.log(0.81) + math.log(0.28)) / 4


def test_accuracy_and_log_loss_are_of_the_mean_of_both_orders(tmp_path):
    """Each group has one row right and one wrong, so that no draw of groups has another accuracy; of single rows some have."""
    model = metrics.model_row(reported.score(tmp_path / "run"))
    assert (model.row_count, model.group_count, model.accuracy) == (4, 2, metrics.Estimate(0.5, 0.5, 0.5))
    assert model.log_loss.value == pytest.approx(LOSS)
    alone = [Row(row.given, row.swapped, row.winner) for row in FOUR]
    assert metrics.model_row(reported.score(tmp_path / "alone/run", alone)).accuracy == metrics.Estimate(0.5, 0.0, 1.0)


def test_a_part_of_the_rows_has_the_interval_of_its_own_groups(tmp_path):
    rows = [Row(0.9, 0.9, group=number // 2) for number in range(4)] + [Row(0.1, 0.1, group=9)]
    part = metrics.model_row(reported.score(tmp_path / "run", rows), "part", np.array([True, True, True, True, False]))
    assert (part.row_count, part.group_count, part.accuracy) == (4, 2, metrics.Estimate(1.0, 1.0, 1.0))


def test_the_constant_guess_takes_the_shares_of_the_labels(tmp_path):
    (constant,) = metrics.make_baselines(reported.score(tmp_path / "run"), None)
    assert (constant.table_row.name, constant.table_row.accuracy.value) == ("one constant verdict", 0.5)
    assert constant.table_row.log_loss.value == pytest.approx(math.log(2))
    assert (constant.gain.accuracy.value, constant.gain.log_loss.value) == (0.0, pytest.approx(LOSS - math.log(2)))


def test_the_longer_answer_is_as_sure_as_it_is_often_right_and_of_equal_ones_it_is_the_first(tmp_path):
    """It wins in three of four rows: accuracy 0.75, log loss that of three times 0.75 and once 0.25."""
    winners = ["model_a", "model_a", "model_b", "model_b"]
    scored = reported.score(tmp_path / "run", [Row(0.5, 0.5, winner) for winner in winners])
    lengths = metrics.Lengths(np.zeros(4), np.array([6, 5, 1, 6]), np.array([1, 5, 6, 1]))
    longer, _ = metrics.make_baselines(scored, lengths)
    assert (longer.table_row.name, longer.table_row.accuracy.value) == ("the longer answer", 0.75)
    assert longer.table_row.log_loss.value == pytest.approx(-(3 * math.log(0.75) + math.log(0.25)) / 4)


def test_the_order_of_the_verdicts_changes_no_number(tmp_path):
    rows = [Row(0.9, 0.8, "tie", tie=0.2, group=1), Row(0.7, 0.2, "model_a", tie=0.1), Row(0.3, 0.1, "model_b", tie=0.5)]
    rows += [Row(0.6, 0.6, "model_a")]  # so that one verdict is the commonest
    first = reported.score(tmp_path / "first/run", rows, VERDICTS)
    second = reported.score(tmp_path / "second/run", rows, ("model_b", "tie", "model_a"))
    assert metrics.model_row(first) == metrics.model_row(second)
    assert measure_position_bias(first) == measure_position_bias(second)
    assert measure_calibration(first).error == measure_calibration(second).error
    lengths = metrics.Lengths(np.zeros(4), np.array([2, 1, 2, 2]), np.array([1, 2, 1, 1]))
    assert metrics.make_baselines(first, lengths) == metrics.make_baselines(second, lengths)


def test_ties_of_a_model_of_two_verdicts_count_in_log_loss_alone(tmp_path):
    scored = reported.score(tmp_path / "run", [Row(0.9, 0.9), Row(0.8, 0.8, "tie")])
    model = metrics.model_row(scored)
    assert (model.row_count, model.accuracy.value) == (2, 1.0)
    assert model.log_loss.value == pytest.approx(-(math.log(0.9) + (math.log(0.8) + math.log(0.2)) / 2) / 2)
    assert rank_wrong_rows(scored) == []


def test_without_the_pairs_file_the_winner_is_the_label():
    columns = {f"p_model_{side}_{order}": [0.5] for side in "ab" for order in ("as_given", "swapped")}
    table = pl.DataFrame({"id": ["x"], "fold": [0], "winner": ["tie"], **columns})
    assert metrics.score_rows(Predictions(Path("predictions.parquet"), table), TWO).labels_rv.tolist() == [[0.5, 0.5]]


def test_the_thirteenth_language_and_those_after_it_share_a_line(tmp_path):
    rows = [Row(0.9, 0.9, language=f"L{number:02d}") for number in range(13)] + [Row(0.9, 0.9, language=None)] * 2
    scored = reported.score(tmp_path / "run", rows)
    table = metrics.slice_by_name(scored, pl.Series("language", [row.language for row in rows]), "languages")
    assert [(line.name, line.row_count) for line in table[:2]] == [("unknown", 2), ("L00", 1)]
    assert (len(table), table[-1].name, table[-1].row_count) == (12, "3 other languages", 3)


@pytest.mark.parametrize(
    ("lengths", "lines"),
    [
        (range(1, 9), [("up to 2 characters", 2), ("3 to 4", 2), ("5 to 6", 2), ("7 to 8", 2)]),
        ([16] * 5, [("up to 16 characters", 5)]),
    ],
)
def test_lengths_are_quarters_of_the_rows_and_equal_ones_are_one_line(tmp_path, lengths, lines):
    scored = reported.score(tmp_path / "run", [Row(0.9, 0.9)] * len(lengths))
    table = metrics.slice_by_length(scored, np.array(lengths))
    assert [(line.name, line.row_count) for line in table] == lines


def test_lines_by_which_answer_won(tmp_path):
    rows = reported.read(tmp_path / "read/run", [*FOUR, Row(0.5, 0.5, "tie")]).predictions.rows
    scored = reported.score(tmp_path / "run", [*FOUR, Row(0.5, 0.5, "tie")])
    table = metrics.slice_by_longer_answer(scored, metrics.measure_lengths(rows))
    assert [(line.name, line.row_count, line.accuracy and line.accuracy.value) for line in table] == [
        ("the longer answer won", 2, 1.0),
        ("the shorter answer won", 2, 0.0),
        ("a tie", 1, None),
    ]
