"""Turn the trainer's log into curves over the steps of the training.

`page` calls `make_learning_charts`, and its template draws the charts by `svg`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from postprocess.report.run_data import Fold, RunData

Curve = Sequence[tuple[int, float]]  # step and value, by step

# A smoothed value is the mean of a tenth of the curve, a twentieth on either side.
REACHES_PER_CURVE = 20
MAX_TABLE_POINTS = 12  # of a curve


@dataclass(frozen=True)
class Series:
    """A curve of a chart."""

    kind: str  # its style: training, validation, or raw (not smoothed)
    curve: Curve  # its points
    fold: str = ""  # the fold's name; empty in a run without folds


@dataclass(frozen=True)
class LearningChart:
    """A chart over the steps of the training, with a series of each kind for each fold."""

    title: str
    axis: str
    series: tuple[Series, ...]

    def rows(self) -> list[tuple[str, int, float]]:
        """List curve, step and value of some points of each curve, the last one among them."""
        rows = []
        for series in self.series:
            if series.kind == "raw":
                continue
            name = f"{series.kind} {series.fold}".strip()
            for step, value in thin_out(series.curve, MAX_TABLE_POINTS):
                rows.append((name, step, value))
        return rows

    @property
    def has_line(self) -> bool:
        """Whether a curve has two points or more; single points alone make no chart."""
        return any(len(series.curve) > 1 for series in self.series)


def make_learning_charts(run: RunData) -> list[LearningChart]:
    """Make the charts of loss, accuracy and learning rate by step; one without any curve is left out."""
    loss = []
    accuracy = []
    learning_rate = []
    folds = {name: fold for name, fold in run.folds.items() if fold.history}
    for name, fold in folds.items():
        # The smoothed loss is drawn over its raw values. These are left out where there are several folds:
        # they would hide the curves.
        training_loss = read_curve(fold.history, "loss")
        if len(folds) == 1:
            loss.append(Series("raw", training_loss))
        loss.append(Series("training", smooth(training_loss), name))
        loss.append(Series("validation", read_validation(fold, "log_loss"), name))

        # The trainer logs no accuracy on the training rows.
        accuracy.append(Series("validation", read_validation(fold, "accuracy"), name))
        learning_rates = read_curve(fold.history, "learning_rate")
        learning_rate.append(Series("training", learning_rates, name))

    charts = [
        make_chart("Loss", "loss", loss),
        make_chart("Accuracy", "accuracy", accuracy),
        make_chart("Learning rate", "learning rate", learning_rate),
    ]
    return [chart for chart in charts if chart.has_line]


def make_chart(title: str, axis: str, series: Sequence[Series]) -> LearningChart:
    """Make a chart of the series that have points."""
    return LearningChart(title, axis, tuple(curve for curve in series if curve.curve))


def read_curve(records: Sequence[dict], key: str) -> Curve:
    """Collect step and value of the records that have a number at `key`, by step.

    Of a step that was logged twice, the later record counts: the training was resumed.
    """
    value_of_step = {}
    for record in records:
        value = record.get(key)
        if isinstance(value, int | float):
            value_of_step[record["step"]] = float(value)
    return sorted(value_of_step.items())


def read_validation(fold: Fold, metric: str) -> Curve:
    """Read the curve of a validation metric.

    A run that was not validated during training has one point: that after its last step, from
    metrics.json.
    """
    curve = read_curve(fold.history, f"eval_{metric}")
    if curve:
        return curve

    steps = fold.metrics.get("steps")
    value = fold.metrics.get(metric)
    if steps and value:
        return [(steps, value)]
    return []


def thin_out(curve: Curve, points: int) -> Curve:
    """Reduce a curve to about `points` points, evenly spaced from its last one on."""
    distance = math.ceil(len(curve) / points)
    from_the_end = curve[::-distance]
    return from_the_end[::-1]


def smooth(curve: Curve) -> Curve:
    """Replace each value by the mean of its neighbourhood, which is narrower at both ends."""
    values = np.array([value for _, value in curve])
    last = len(curve) - 1
    widest_reach = len(curve) // REACHES_PER_CURVE

    smoothed = []
    for place, (step, _) in enumerate(curve):
        # Reach equally far to both sides: a lopsided mean would bend the ends of a rising or falling curve.
        reach = min(widest_reach, place, last - place)
        neighbourhood = values[place - reach : place + reach + 1]
        smoothed.append((step, float(neighbourhood.mean())))
    return smoothed
