"""Compares models by their probabilities of the same rows: one dictionary, which becomes agreement.json.

The columns: `recorded` (of a mean of runs there is none) and `trained`, `merged` where there is one,
and the candidates for the package, which are all others. Several quantised models, made with other
seeds, are `quantised`, `quantised-2`, … gate.py calls this.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np

from postprocess.agreement.conditions import HOLDS, Condition, list_conditions, summarise
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
    """Compare the columns, choose the candidate that is packaged, and judge it.

    Args:
        columns: The models' probabilities.
        rows: The rows that they are of.
        package: The recipe's tolerances.

    Returns:
        What agreement.json holds. Of the candidates, `packaged` is the nearest to `trained` on average.
    """
    by_name = {column.name: column for column in columns}
    resamples = resample(rows.groups_r)
    models = {}
    for name, column in by_name.items():
        models[name] = describe_model(column, by_name, rows, resamples)

    candidates = {}
    for name, model in models.items():
        if name not in NO_CANDIDATES:
            candidates[name] = model["against_trained"]["mean"]
    packaged = find_nearest(candidates)

    conditions = list_conditions(packaged, by_name, rows, package)
    verdict = summarise(conditions)
    return {
        "rows": len(rows.labels_rv),
        "groups": resamples.counts_sg.shape[1],
        "resamples": RESAMPLES,
        "tolerance": package.tolerance,
        "packaged": packaged,
        "candidates": candidates,
        "mean_difference": find_worst_difference(conditions),
        "agrees": verdict == HOLDS,
        "verdict": verdict,
        "conditions": [asdict(condition) for condition in conditions],
        "packaged_minus_trained": measure_cost(by_name[packaged], by_name["trained"], rows),
        **describe_repeats(models),
        "models": list(models.values()),
    }


def describe_model(
    column: Column, by_name: Mapping[str, Column], rows: ComparedRows, resamples: Resamples
) -> dict:
    """Give a model's metrics with their intervals, and its differences from `recorded` and `trained`."""
    right_r = is_right(column, rows.winners_r)
    losses_r = losses(column, rows.labels_rv)
    has_winner_r = rows.winners_r >= 0
    model = {
        "model": column.name,
        "precision": column.precision,
        **scores(column.probabilities_rov, rows.labels_rv, rows.winners_r),
        "accuracy_interval": interval(right_r, has_winner_r, resamples),
        "log_loss_interval": interval(losses_r, np.full(len(losses_r), True), resamples),
    }
    for reference in ("recorded", "trained"):
        if reference in by_name:
            model[f"against_{reference}"] = difference(column, by_name[reference])
    return model


def find_nearest(mean_differences: Mapping[str, float]) -> str:
    """Find the model with the smallest mean difference; one that gave a NaN comes last."""
    finite_differences = {}
    for name, value in mean_differences.items():
        finite_differences[name] = value if math.isfinite(value) else math.inf
    return min(finite_differences, key=finite_differences.get)


def find_worst_difference(conditions: Sequence[Condition]) -> float:
    """Find the largest of the mean differences that decide."""
    values = []
    for condition in conditions:
        if condition.bound_name == "pairwise.package.tolerance":
            values.append(condition.value)
    # np.max, unlike max, hands a NaN on.
    return float(np.max(values))


def measure_cost(packaged: Column, trained: Column, rows: ComparedRows) -> dict[str, dict]:
    """Measure what packaging changes row by row: accuracy and log loss, each with its interval."""
    changes = {
        "accuracy": is_right(packaged, rows.winners_r) - is_right(trained, rows.winners_r),
        "log_loss": losses(packaged, rows.labels_rv) - losses(trained, rows.labels_rv),
    }
    costs = {}
    for metric, changes_r in changes.items():
        # A row without a winner says nothing of accuracy.
        is_counted_r = np.full(len(changes_r), True)
        if metric == "accuracy":
            is_counted_r = rows.winners_r >= 0
        estimate = estimate_mean(changes_r[is_counted_r], rows.groups_r[is_counted_r])
        costs[metric] = {"difference": estimate.mean, "interval": [estimate.low, estimate.high]}
    return costs


def describe_repeats(models: Mapping[str, dict]) -> dict[str, dict]:
    """Describe the spread of several quantised models; nothing where there is one.

    Returns:
        Least, largest and standard deviation (of a sample) of mean difference and accuracy.
    """
    quantised = [model for name, model in models.items() if name.startswith(QUANTISED)]
    if len(quantised) < 2:
        return {}

    figures = {
        "mean_difference": [model["against_trained"]["mean"] for model in quantised],
        "accuracy": [model["accuracy"] for model in quantised],
    }
    repeats: dict[str, object] = {"models": [model["model"] for model in quantised]}
    for name, values in figures.items():
        repeats[name] = {
            "min": float(np.min(values)),
            "max": float(np.max(values)),
            "standard_deviation": float(np.std(values, ddof=1)),
        }
    return {"repeats": repeats}
