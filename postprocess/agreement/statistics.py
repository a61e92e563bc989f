"""What models make of the same rows, compared: differences, divergence, accuracy with its interval, and whether they agree.

Arrays in, one dictionary out; no file is read, no model loaded. The columns: `recorded` and `trained`, `merged` where there
is one, and the candidates for the package, which are all others. Several quantised models, made with other seeds, are
`quantised`, `quantised-2`, `quantised-3`, …
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from recipes.pairwise.tracking.metrics import SMALLEST, row_losses, scores

NO_CANDIDATES = ("recorded", "trained", "merged")
QUANTISED = "quantised"
RESAMPLES = 1000
SEED = 0
MIDDLE = (0.025, 0.975)  # 95 %
DECIMALS = 6  # of an interval: the last bits of a sum depend on the machine


@dataclass(frozen=True)
class Column:
    """One model's probabilities of the rows, float64 of shape (rows, orders, verdicts), and the precision it computed in."""

    name: str
    probabilities_rov: np.ndarray
    precision: str


@dataclass(frozen=True)
class Resamples:
    """Draws of whole groups of rows: the group of each row, (rows,), and how often a draw holds each, (draws, groups)."""

    group_r: np.ndarray
    counts_sg: np.ndarray


def compare(
    columns: list[Column],
    labels_rv: np.ndarray,
    winners_r: np.ndarray,
    tolerance: float,
    groups_r: np.ndarray | None = None,
) -> dict:
    """The report: each column's metrics and its differences from `recorded` and from `trained`, and whether they agree.

    Differences are between probabilities of the same row, order and verdict. Of the candidates, the one with the smallest
    mean difference from `trained` is to be packaged. The models agree where it differs from `recorded` and from `trained`,
    and if it was made of `merged` that one from `trained`, by at most `tolerance` on average; a NaN never agrees.
    `groups_r`: the number of each row's group of prompts, by which rows are resampled; without it, row by row.
    """
    by_name = {column.name: column for column in columns}
    resamples = resample(np.arange(len(labels_rv)) if groups_r is None else groups_r)
    of_model = {name: model_line(column, by_name, labels_rv, winners_r, resamples) for name, column in by_name.items()}
    candidates = {name: of_model[name]["against_trained"]["mean"] for name in by_name if name not in NO_CANDIDATES}
    packaged = min(candidates, key=lambda name: candidates[name] if math.isfinite(candidates[name]) else math.inf)
    gates = gated(packaged, of_model)
    worst = float(np.max([gate["mean"] for gate in gates]))  # np.max, unlike max, hands a NaN on
    return {
        "rows": len(labels_rv),
        "groups": resamples.counts_sg.shape[1],
        "resamples": RESAMPLES,
        "tolerance": tolerance,
        "packaged": packaged,
        "candidates": candidates,
        "gates": gates,
        "mean_difference": worst,
        "agrees": worst <= tolerance,
        "packaged_minus_trained": paired(by_name[packaged], by_name["trained"], labels_rv, winners_r, resamples),
        **repeats(of_model),
        "models": list(of_model.values()),
    }


def model_line(
    column: Column, by_name: Mapping[str, Column], labels_rv: np.ndarray, winners_r: np.ndarray, resamples: Resamples
) -> dict:
    """What the report says of one column."""
    right_r, loss_r = outcomes(column, labels_rv, winners_r)
    return {
        "model": column.name,
        "precision": column.precision,
        **scores(column.probabilities_rov, labels_rv, winners_r),
        "accuracy_interval": interval(right_r, winners_r >= 0, resamples),
        "log_loss_interval": interval(loss_r, np.full(len(loss_r), True), resamples),
        **{f"against_{name}": difference(column, by_name[name]) for name in ("recorded", "trained")},
    }


def difference(one: Column, other: Column) -> dict[str, float]:
    """How far `one` is from `other`.

    Largest and mean difference in probability; the mean over rows and orders of the Kullback-Leibler divergence from `other`
    to `one`, sum of q log(q / p) over the verdicts for `other`'s q and `one`'s p, in nats (Kullback and Leibler 1951); and
    the rows whose verdict, by the mean of both orders, is another.
    """
    p, q = one.probabilities_rov, other.probabilities_rov
    differences = np.abs(p - q)
    logarithms = np.log(np.clip(q, SMALLEST, 1)) - np.log(np.clip(p, SMALLEST, 1))
    return {
        "largest": float(differences.max()),
        "mean": float(differences.mean()),
        "kl_divergence": float(np.maximum((np.clip(q, SMALLEST, 1) * logarithms).sum(axis=-1), 0).mean()),
        "verdicts_changed": int((verdicts(one) != verdicts(other)).sum()),
    }


def verdicts(column: Column) -> np.ndarray:
    """The place of each row's likeliest verdict by the mean of both orders, (rows,)."""
    return column.probabilities_rov.mean(axis=1).argmax(axis=1)


def outcomes(column: Column, labels_rv: np.ndarray, winners_r: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each row whether its verdict is the winner, 1 or 0, and its log loss, both float64 (rows,).

    Their means, the first over the rows that have a winner, are accuracy and log_loss of `tracking.metrics.scores`.
    """
    mean_rv = column.probabilities_rov.mean(axis=1)
    right_r = (mean_rv.argmax(axis=1) == winners_r).astype(np.float64)
    return right_r, row_losses(mean_rv, labels_rv)


def resample(groups_r: np.ndarray) -> Resamples:
    """As many groups as there are, drawn with replacement, RESAMPLES times.

    A bootstrap over whole clusters, since rows that share a prompt are no independent evidence (Davison and Hinkley 1997,
    section 3.8). The seed is fixed, and every model is measured on the same draws.
    """
    names, group_r = np.unique(groups_r, return_inverse=True)
    shares = np.full(len(names), 1 / len(names))
    return Resamples(group_r, np.random.default_rng(SEED).multinomial(len(names), shares, size=RESAMPLES))


def interval(values_r: np.ndarray, counted_r: np.ndarray, resamples: Resamples) -> list[float]:
    """The middle 95 % of the resampled means of the values that count: [low, high]; NaN where no draw holds one of them."""
    groups = resamples.counts_sg.shape[1]
    sums_g = np.bincount(resamples.group_r, weights=np.where(counted_r, values_r, 0), minlength=groups)
    rows_g = np.bincount(resamples.group_r, weights=counted_r, minlength=groups)
    sums_s, rows_s = resamples.counts_sg @ sums_g, resamples.counts_sg @ rows_g
    if not rows_s.any():
        return [math.nan, math.nan]
    ends = np.quantile(sums_s[rows_s > 0] / rows_s[rows_s > 0], MIDDLE)
    return [round(float(end), DECIMALS) for end in ends]


def paired(one: Column, other: Column, labels_rv: np.ndarray, winners_r: np.ndarray, resamples: Resamples) -> dict:
    """Accuracy and log loss of `one` less those of `other`, row by row, each with its interval over the same resamples."""
    of_one, of_other = outcomes(one, labels_rv, winners_r), outcomes(other, labels_rv, winners_r)
    decided_r = winners_r >= 0
    found = {}
    for name, ours_r, theirs_r, counted_r in zip(
        ("accuracy", "log_loss"), of_one, of_other, (decided_r, np.full(len(decided_r), True)), strict=True
    ):
        gains_r = ours_r - theirs_r
        mean = float(gains_r[counted_r].mean()) if counted_r.any() else math.nan
        found[name] = {"difference": mean, "interval": interval(gains_r, counted_r, resamples)}
    return found


def gated(packaged: str, of_model: Mapping[str, dict]) -> list[dict]:
    """The mean differences that decide, the farthest first: model, the one it is compared with, mean difference."""
    pairs = [(packaged, "trained"), (packaged, "recorded")]
    if packaged.startswith(QUANTISED) and "merged" in of_model:
        pairs.append(("merged", "trained"))
    gates = [{"model": name, "against": other, "mean": of_model[name][f"against_{other}"]["mean"]} for name, other in pairs]
    return sorted(gates, key=lambda gate: -gate["mean"] if math.isfinite(gate["mean"]) else -math.inf)


def repeats(of_model: Mapping[str, dict]) -> dict[str, dict]:
    """Where quantising was repeated: least, largest and standard deviation (of a sample) of difference and accuracy."""
    lines = [line for name, line in of_model.items() if name.startswith(QUANTISED)]
    if len(lines) < 2:
        return {}
    figures = {
        "mean_difference": [line["against_trained"]["mean"] for line in lines],
        "accuracy": [line["accuracy"] for line in lines],
    }
    spread = {
        name: {"min": float(np.min(values)), "max": float(np.max(values)), "standard_deviation": float(np.std(values, ddof=1))}
        for name, values in figures.items()
    }
    return {"repeats": {"models": [line["model"] for line in lines], **spread}}
