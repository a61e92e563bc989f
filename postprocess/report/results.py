"""Compute everything that the page shows of a run.

This is the second of the report's three steps: `run_data` reads the run folder, this module
computes, `page` draws and renders. It reads no file and draws nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from postprocess.report.calibration import Calibration, measure_calibration
from postprocess.report.learning_curves import LearningChart, make_learning_charts
from postprocess.report.metrics import (
    Baseline,
    ScoredRows,
    TableRow,
    make_baselines,
    make_slices,
    measure_lengths,
    model_row,
    score_rows,
)
from postprocess.report.position_bias import PositionBias, depends_on_order, measure_position_bias
from postprocess.report.predictions import Predictions
from postprocess.report.run_data import RunData
from postprocess.report.worst_rows import WorstRow, find_worst_rows


@dataclass(frozen=True)
class Measurements:
    """What was measured on the rows of the predictions.

    Attributes:
        scored: The rows as arrays, for the pictures that show single rows.
        model: Accuracy and log loss of the model on all rows.
        baselines: Guesses that read no text, on the same rows.
        slices: Title and rows of the tables by language, length, source, winner, fold.
        calibration: None if no row has a winner among the model's verdicts.
        position_bias: None if the order of the answers changes nothing (a reward model).
        worst_rows: The rows with a wrong verdict whose winner had the least probability.
    """

    scored: ScoredRows
    model: TableRow
    baselines: Sequence[Baseline]
    slices: Sequence[tuple[str, Sequence[TableRow]]]
    calibration: Calibration | None
    position_bias: PositionBias | None
    worst_rows: Sequence[WorstRow]

    @property
    def group_count(self) -> int:
        """Number of groups of rows with nearly the same prompt."""
        return self.scored.resamples.counts_bg.shape[1]

    @property
    def wrong_count(self) -> int:
        """Number of rows with a wrong verdict."""
        is_wrong_r = self.scored.is_decided_r & ~self.scored.is_right_r
        return int(is_wrong_r.sum())


@dataclass(frozen=True)
class Results:
    """All that the report computes. `measurements` is None if the run has no predictions."""

    measurements: Measurements | None
    learning_charts: Sequence[LearningChart]


def compute_results(run: RunData) -> Results:
    """Compute the results of a run."""
    measurements = None
    if run.predictions is not None:
        measurements = measure_predictions(run.predictions, run.verdicts)
    return Results(measurements, make_learning_charts(run))


def measure_predictions(predictions: Predictions, verdicts: tuple[str, ...]) -> Measurements:
    """Measure the rows of predictions.parquet or oof.parquet.

    Args:
        predictions: The rows, with texts and labels if the pairs file was found.
        verdicts: The model's verdicts.
    """
    scored = score_rows(predictions, verdicts)

    # Lengths need the texts of the pairs file.
    lengths = None
    longer_is_a_r = None
    if predictions.has_pairs:
        lengths = measure_lengths(predictions.rows)
        longer_is_a_r = lengths.longer_is_a_r

    # A reward model scores each answer alone: no order, no bias.
    position_bias = None
    if depends_on_order(scored):
        position_bias = measure_position_bias(scored)

    return Measurements(
        scored=scored,
        model=model_row(scored),
        baselines=make_baselines(scored, longer_is_a_r),
        slices=make_slices(predictions, scored, lengths),
        calibration=measure_calibration(scored),
        position_bias=position_bias,
        worst_rows=find_worst_rows(predictions.rows, scored),
    )
