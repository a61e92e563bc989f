"""Compute metrics and the table of predictions from the logits of the validation rows.

results.py writes both into the run folder; packaging and the report read them.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import polars as pl

from preprocess.model_input import VERDICTS, swap_probabilities

ORDERS = ("as_given", "swapped")
SMALLEST = 1e-15  # where a probability is clipped before its logarithm, as the competitions do


def softmax(logits: np.ndarray) -> np.ndarray:
    """Convert logits to probabilities along the last axis."""
    # Less their maximum, no exponential overflows.
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def probabilities(logits_rov: np.ndarray, verdicts: Sequence[str]) -> np.ndarray:
    """Convert the logits of both orders of the responses to probabilities in float64.

    In the swapped order the model reads response B first, and calls it model_a. Its probabilities are
    swapped back, so that a verdict names the same response in both orders. With the verdicts model_a,
    model_b and tie:

        0.6  0.3  0.1    the order as given: response A is better with 0.6
        0.2  0.7  0.1    the swapped order: the response read second, which is A, is better with 0.7
        0.7  0.2  0.1    the swapped order, swapped back

    Args:
        logits_rov: Logits (rows, 2 orders, verdicts). A reward model's are (rows, 1, verdicts): it reads
            each response by itself, so that its second order is its first.
        verdicts: The verdicts in the order of the logits.

    Returns:
        Probabilities (rows, 2 orders, verdicts).
    """
    probabilities_rov = softmax(logits_rov.astype(np.float64))
    has_one_order = probabilities_rov.shape[1] == 1
    if has_one_order:
        return np.repeat(probabilities_rov, 2, axis=1)

    # The column to take for each verdict. In the example above, columns 0, 1, 2 become 1, 0, 2.
    columns = range(len(verdicts))
    swapped_columns = swap_probabilities(columns, verdicts)

    as_given_rv = probabilities_rov[:, 0]
    swapped_rv = probabilities_rov[:, 1]
    swapped_back_rv = swapped_rv[:, swapped_columns]
    return np.stack([as_given_rv, swapped_back_rv], axis=1)


def row_losses(probabilities_rv: np.ndarray, labels_rv: np.ndarray) -> np.ndarray:
    """Compute each row's log loss against its soft label, in nats (rows,)."""
    # A probability of 0 would make the mean infinite.
    logarithms_rv = np.log(np.clip(probabilities_rv, SMALLEST, 1))
    return -(labels_rv * logarithms_rv).sum(axis=1)


def row_brier_scores(probabilities_rv: np.ndarray, labels_rv: np.ndarray) -> np.ndarray:
    """Compute each row's Brier score (Brier 1950): the squared errors, summed over verdicts (rows,)."""
    return ((probabilities_rv - labels_rv) ** 2).sum(axis=1)


def rows_are_right(probabilities_rv: np.ndarray, winners_r: np.ndarray) -> np.ndarray:
    """Tell for each row whether its likeliest verdict is its winner, given by place (rows,)."""
    return probabilities_rv.argmax(axis=1) == winners_r


def measure_answers(probabilities_rv: np.ndarray, winners_r: np.ndarray) -> dict[str, float]:
    """Compute the metrics of the competitions, by the names that their entries use; log_loss is in nats."""
    # One-hot: 1 for the winner and 0 for the others, taken from the rows of the identity matrix.
    labels_rv = np.eye(probabilities_rv.shape[1])[winners_r]
    return {
        "accuracy": compute_accuracy(probabilities_rv, winners_r),
        "log_loss": float(row_losses(probabilities_rv, labels_rv).mean()),
        "brier_score": float(row_brier_scores(probabilities_rv, labels_rv).mean()),
    }


def compute_accuracy(probabilities_rv: np.ndarray, winners_r: np.ndarray) -> float:
    """Compute the share of rows whose likeliest verdict is the winner.

    Args:
        probabilities_rv: Probabilities (rows, verdicts).
        winners_r: The index of each row's winner among the verdicts. It is -1 for a tie where the model
            has only the verdicts model_a and model_b: it cannot get such a row right, which does not count.

    Returns:
        The accuracy; NaN where no row counts.
    """
    has_winner_r = winners_r >= 0
    if not has_winner_r.any():
        return float("nan")
    is_right_r = rows_are_right(probabilities_rv, winners_r)
    return float(is_right_r[has_winner_r].mean())


def scores(
    probabilities_rov: np.ndarray, labels_rv: np.ndarray, winners_r: np.ndarray
) -> dict[str, float]:
    """Compute the metrics of a run's validation rows.

    Args:
        probabilities_rov: Probabilities (rows, 2 orders, verdicts): the pair as it is given, and with its
            responses swapped. In both, a verdict names the same response (see `probabilities`).
        labels_rv: Soft labels (rows, verdicts), the shares of the votes. Log loss is measured on them.
        winners_r: The index of each row's winner, -1 for none (see compute_accuracy). Accuracy is
            measured on them.

    Returns:
        accuracy and log_loss of the mean of both orders, the same of the order as given alone, and
        flip_rate: the share of rows whose verdict changes with the order.
    """
    mean_rv = probabilities_rov.mean(axis=1)
    as_given_rv = probabilities_rov[:, 0]
    swapped_rv = probabilities_rov[:, 1]

    flips_r = as_given_rv.argmax(axis=1) != swapped_rv.argmax(axis=1)
    return {
        "accuracy": compute_accuracy(mean_rv, winners_r),
        "log_loss": float(row_losses(mean_rv, labels_rv).mean()),
        "accuracy_as_given": compute_accuracy(as_given_rv, winners_r),
        "log_loss_as_given": float(row_losses(as_given_rv, labels_rv).mean()),
        "flip_rate": float(flips_r.mean()),
    }


def longer_is_right(pairs: pl.DataFrame) -> float:
    """Compute the accuracy of picking the longer response, of equal ones A, on the rows that have a winner."""
    # A response is a list of texts, one for each turn: its length is the sum of theirs.
    character_counts = pl.element().str.len_chars()
    length_a = pl.col("response_a").list.eval(character_counts).list.sum()
    length_b = pl.col("response_b").list.eval(character_counts).list.sum()
    longer = pl.when(length_a >= length_b).then(pl.lit("model_a")).otherwise(pl.lit("model_b"))

    decided_pairs = pairs.filter(pl.col("winner") != "tie")
    is_right = longer == pl.col("winner")
    share = decided_pairs.select(is_right.mean()).item()

    # Polars' mean of no rows is None.
    if share is None:
        return 0.0
    return float(share)


def predictions(
    ids: list[str], probabilities_rov: np.ndarray, verdicts: tuple[str, ...], pairs: pl.DataFrame
) -> pl.DataFrame:
    """Make the table of predictions.

    Returns:
        One row a pair, sorted by id: id, fold, winner, the mean probabilities of both orders (such as
        p_model_a), and those of each order (such as p_model_a_as_given and p_model_a_swapped).
    """
    # By the ending of the column's name: the mean has none, each order its name.
    probabilities_by_suffix = {"": probabilities_rov.mean(axis=1)}
    for order_index, order in enumerate(ORDERS):
        probabilities_by_suffix[f"_{order}"] = probabilities_rov[:, order_index]

    # The table has columns for all three verdicts, also where the model has two.
    columns: dict[str, np.ndarray] = {}
    for suffix, values_rv in probabilities_by_suffix.items():
        for verdict in VERDICTS:
            column = np.zeros(len(ids))
            if verdict in verdicts:
                column = values_rv[:, verdicts.index(verdict)]
            columns[f"p_{verdict}{suffix}"] = column

    table = pl.DataFrame({"id": ids, **columns})
    labels = pairs.select("id", "fold", "winner")
    joined = table.join(labels, on="id", how="left", maintain_order="left")
    return joined.select("id", "fold", "winner", *columns).sort("id")


def history(log: Iterable[Mapping]) -> list[dict[str, float]]:
    """Make the records of history.json from those of the trainer's log that have a step: their finite numbers."""
    records = []
    for record in log:
        if "step" not in record:
            continue

        # A number that is not finite could not be written as JSON.
        numbers = {}
        for name, value in record.items():
            if isinstance(value, int | float) and math.isfinite(value):
                numbers[name] = value
        records.append(numbers)
    return records
