"""Computes metrics and the table of predictions from the logits of the validation rows; results.py writes them."""

import math
from collections.abc import Iterable, Mapping

import numpy as np
import polars as pl

from preprocess.model_input import swap_probabilities

ORDERS = ("as_given", "swapped")
SMALLEST = 1e-15  # where a probability is clipped before its logarithm, as the competitions do


def probabilities(logits_rov: np.ndarray, verdicts: tuple[str, ...]) -> np.ndarray:
    """Softmax in float64 of logits (rows, 2 orders, verdicts), the swapped order then swapped back.

    A reward model's logits are (rows, 1, verdicts): its second order is its first.
    """
    logits = logits_rov.astype(np.float64)
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    both = exponentials / exponentials.sum(axis=-1, keepdims=True)
    if both.shape[1] == 1:
        return np.repeat(both, 2, axis=1)
    places = swap_probabilities(range(len(verdicts)), verdicts)
    return np.stack([both[:, 0], both[:, 1][:, places]], axis=1)


def row_losses(probabilities_rv: np.ndarray, labels_rv: np.ndarray) -> np.ndarray:
    """Each row's log loss against its soft label, in nats (rows,)."""
    return -(labels_rv * np.log(np.clip(probabilities_rv, SMALLEST, 1))).sum(axis=1)


def scores(both_rov: np.ndarray, labels_rv: np.ndarray, winners_r: np.ndarray) -> dict[str, float]:
    """Metrics of probabilities (rows, 2 orders, verdicts) against soft labels (rows, verdicts) and winners (rows,).

    accuracy: share of rows whose likeliest verdict, by the mean of both orders, is the winner, whatever a teacher's labels
    say; rows without a winner among the verdicts (-1: a tie for a model of two) do not count. log_loss: against the soft
    labels, on all rows. flip_rate: share of rows whose verdict changes when the answers are swapped.
    """
    mean, decided = both_rov.mean(axis=1), winners_r >= 0

    def accuracy(values):
        return float((values.argmax(axis=1) == winners_r)[decided].mean()) if decided.any() else float("nan")

    def log_loss(values):
        return float(row_losses(values, labels_rv).mean())

    return {
        "accuracy": accuracy(mean),
        "log_loss": log_loss(mean),
        "accuracy_as_given": accuracy(both_rov[:, 0]),
        "log_loss_as_given": log_loss(both_rov[:, 0]),
        "flip_rate": float((both_rov[:, 0].argmax(axis=1) != both_rov[:, 1].argmax(axis=1)).mean()),
    }


def longer_is_right(frame: pl.DataFrame) -> float:
    """Accuracy of picking the longer response, on the rows that have a winner; equal lengths count as model_a."""
    length = {side: pl.col(f"response_{side}").list.eval(pl.element().str.len_chars()).list.sum() for side in "ab"}
    right = pl.when(length["a"] >= length["b"]).then(pl.lit("model_a")).otherwise(pl.lit("model_b")) == pl.col("winner")
    return float(frame.filter(pl.col("winner") != "tie").select(right.mean()).item() or 0.0)


def predictions(ids: list[str], both_rov: np.ndarray, verdicts: tuple[str, ...], frame: pl.DataFrame) -> pl.DataFrame:
    """One row a pair: id, fold, winner, the mean probabilities and those of each order; a verdict not predicted is 0."""
    # The mean has no suffix, each order its name.
    probabilities_by_suffix = {"": both_rov.mean(axis=1)}
    for place, order in enumerate(ORDERS):
        probabilities_by_suffix[f"_{order}"] = both_rov[:, place]

    columns: dict[str, object] = {"id": ids}
    for suffix, values_rv in probabilities_by_suffix.items():
        for verdict in ("model_a", "model_b", "tie"):
            columns[f"p_{verdict}{suffix}"] = np.zeros(len(ids))
            if verdict in verdicts:
                columns[f"p_{verdict}{suffix}"] = values_rv[:, verdicts.index(verdict)]

    joined = pl.DataFrame(columns).join(frame.select("id", "fold", "winner"), on="id", how="left", maintain_order="left")
    del columns["id"]
    return joined.select("id", "fold", "winner", *columns).sort("id")


def history(log: Iterable[Mapping]) -> list[dict[str, float]]:
    """The trainer's log as history.json holds it: of each record that has a step its finite numbers, by name."""

    def is_finite(value: object) -> bool:
        return isinstance(value, int | float) and math.isfinite(value)

    return [{name: value for name, value in record.items() if is_finite(value)} for record in log if "step" in record]
