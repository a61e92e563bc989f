"""Compares models by their probabilities of the same rows: one dictionary, which becomes agreement.json.

The columns: `recorded` (of a mean of runs there is none) and `trained`, `merged` where there is one,
and the candidates for the package, which are all others. Several quantised models, made with other
seeds, are `quantised`, `quantised-2`, … gate.py calls this.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np

from postprocess.agreement.conditions import HOLDS, TOLERANCE_KEY, list_conditions, summarise
from postprocess.agreement.statistics import (
    QUANTISED,
    RESAMPLES,
    Column,
    ComparedRows,
    Resamples,
    difference,
    estimate_mean,
    interval,
    is_right,
    losses,
    resample,
)
from recipes.pairwise.config.schema import PackageBlock
from recipes.pairwise.tracking.metrics import scores

NO_CANDIDATES = ("recorded", "trained", "merged")


def compare(columns: Sequence[Column], rows: ComparedRows, package: PackageBlock) -> dict:
    """Compare the columns, and judge the candidate that is nearest to `trained` on average: it is packaged.

    What agreement.json holds is returned.
    """
    by_name = {column.name: column for column in columns}
    resamples = resample(rows.groups_r)
    models = {}
    for name in by_name:
        models[name] = describe_model(name, by_name, rows, resamples)

    # The nearest one is packaged whatever its score, which differs by chance.
    candidates = {}
    for name, model in models.items():
        if name not in NO_CANDIDATES:
            candidates[name] = model["against_trained"]["mean"]
    packaged = find_nearest(candidates)

    conditions = list_conditions(packaged, by_name, rows, package)
    verdict = summarise(conditions)
    deciding_differences = [
        condition.value for condition in conditions if condition.bound_name == TOLERANCE_KEY
    ]
    report = {
        "rows": len(rows.labels_rv),
        "groups": resamples.counts_sg.shape[1],
        "resamples": RESAMPLES,
        "tolerance": package.tolerance,
        "packaged": packaged,
        "candidates": candidates,
        # np.max, unlike max, hands a NaN on.
        "mean_difference": float(np.max(deciding_differences)),
        "agrees": verdict == HOLDS,
        "verdict": verdict,
        "conditions": [asdict(condition) for condition in conditions],
        "packaged_minus_trained": measure_cost(by_name[packaged], by_name["trained"], rows),
        "models": list(models.values()),
    }

    repeats = describe_repeats(models)
    if repeats is not None:
        report["repeats"] = repeats
    return report


def describe_model(
    name: str, by_name: Mapping[str, Column], rows: ComparedRows, resamples: Resamples
) -> dict:
    """Measure one of the compared models: its metrics, and how far it is from the model as trained.

    `by_name` has the probabilities of every model. Two of them are references: `trained`, the model as
    training left it, and `recorded`, what training itself wrote down, which may be absent.
    """
    column = by_name[name]
    right_r = is_right(column, rows.winners_r)
    losses_r = losses(column, rows.labels_rv)

    # Accuracy is measured on the rows that have a winner, log loss on every row.
    has_winner_r = rows.winners_r >= 0
    has_label_r = np.full(len(losses_r), True)
    model = {
        "model": name,
        "precision": column.precision,
        **scores(column.probabilities_rov, rows.labels_rv, rows.winners_r),
        "accuracy_interval": interval(right_r, has_winner_r, resamples),
        "log_loss_interval": interval(losses_r, has_label_r, resamples),
    }

    for reference in ("recorded", "trained"):
        if reference in by_name:
            model[f"against_{reference}"] = difference(column, by_name[reference])
    return model


def find_nearest(mean_differences: Mapping[str, float]) -> str:
    """Find the model with the smallest mean difference; one that gave a NaN comes last."""
    # Nothing is less than a NaN: `min` would choose it where it comes first.
    finite_differences = {}
    for name, value in mean_differences.items():
        finite_differences[name] = value if math.isfinite(value) else math.inf
    return min(finite_differences, key=finite_differences.get)


def measure_cost(packaged: Column, trained: Column, rows: ComparedRows) -> dict[str, dict]:
    """Measure what packaging changes row by row: accuracy and log loss, each with its interval.

    Returns:
        For each metric, the packaged model's mean less the trained one's: `difference` and `interval`.
    """
    # A row changes by 1 where only the packaged model is right, by -1 where only the trained one is. A
    # row without a winner says nothing of accuracy.
    has_winner_r = rows.winners_r >= 0
    changes_r = is_right(packaged, rows.winners_r) - is_right(trained, rows.winners_r)
    accuracy = estimate_mean(changes_r[has_winner_r], rows.groups_r[has_winner_r])

    added_losses_r = losses(packaged, rows.labels_rv) - losses(trained, rows.labels_rv)
    log_loss = estimate_mean(added_losses_r, rows.groups_r)

    costs = {}
    for metric, estimate in (("accuracy", accuracy), ("log_loss", log_loss)):
        costs[metric] = {"difference": estimate.value, "interval": [estimate.low, estimate.high]}
    return costs


def describe_repeats(models: Mapping[str, dict]) -> dict[str, object] | None:
    """Describe how far quantising again, calibrated on other rows, moves a model's figures.

    Returns:
        Least, largest and standard deviation (of a sample) of mean difference and accuracy; None where
        there are not several quantised models, as one alone has no spread.
    """
    quantised = [model for name, model in models.items() if name.startswith(QUANTISED)]
    if len(quantised) < 2:
        return None

    mean_differences = [model["against_trained"]["mean"] for model in quantised]
    accuracies = [model["accuracy"] for model in quantised]
    return {
        "models": [model["model"] for model in quantised],
        "mean_difference": describe_spread(mean_differences),
        "accuracy": describe_spread(accuracies),
    }


def describe_spread(values: Sequence[float]) -> dict[str, float]:
    """Give the least and the largest of several values, and their standard deviation."""
    return {
        "min": float(np.min(values)),
        "max": float(np.max(values)),
        "standard_deviation": float(np.std(values, ddof=1)),
    }
