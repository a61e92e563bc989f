"""Measure the rows of a run for the page.

This is the second of the report's three steps: `run_data` reads the run folder, `measure_run`
computes, `page` draws and renders. Nothing here reads a file.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from postprocess.agreement.statistics import Estimate
from postprocess.report import metrics
from postprocess.report.calibration import Calibration, measure_calibration
from postprocess.report.metrics import Baseline, ScoredRows, TableRow
from postprocess.report.position_bias import PositionBias, measure_position_bias
from postprocess.report.run_data import RunData
from postprocess.report.worst_rows import WorstRow, find_worst_rows


@dataclass(frozen=True)
class Measurements:
    """What was measured on the rows of the predictions."""

    scored: ScoredRows
    model: TableRow  # accuracy and log loss on all rows
    brier_score: Estimate
    baselines: Sequence[Baseline]
    slices: Sequence[tuple[str, Sequence[TableRow]]]  # title and rows of each table
    calibration: Calibration | None  # None if no row has a winner among the model's verdicts
    position_bias: PositionBias | None  # None if the order changes nothing (a reward model)
    worst_rows: Sequence[WorstRow]
    wrong_count: int  # rows with a wrong verdict


def measure_run(run: RunData) -> Measurements:
    """Measure the rows of predictions.parquet or oof.parquet."""
    rows = run.predictions.rows
    scored = metrics.score_rows(run.predictions, run.verdicts)

    # Lengths need the texts of the pairs file.
    lengths = None
    if run.predictions.has_pairs:
        lengths = metrics.measure_lengths(rows)

    is_wrong_r = scored.is_decided_r & ~scored.is_right_r
    return Measurements(
        scored=scored,
        model=metrics.model_row(scored),
        brier_score=metrics.estimate_brier_score(scored),
        baselines=metrics.make_baselines(scored, lengths),
        slices=metrics.make_slices(rows, scored, lengths),
        calibration=measure_calibration(scored),
        position_bias=measure_position_bias(scored),
        worst_rows=find_worst_rows(rows, scored),
        wrong_count=int(is_wrong_r.sum()),
    )
