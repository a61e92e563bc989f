"""Measure position bias: whether the model prefers the answer that stands first.

`results.measure_run` calls `measure_position_bias`. Every pair is scored in the order as given
and with its answers swapped. Over both orders, either position has the better answer equally often,
so that a difference between the positions is bias. Shape letters: see docs/style.md.
"""

from dataclasses import dataclass

import numpy as np

from postprocess.agreement.statistics import Estimate
from postprocess.report.metrics import Gain, ScoredRows, TableRow, make_table_row, model_row
from recipes.pairwise.tracking.metrics import row_losses, rows_are_right


@dataclass(frozen=True)
class PositionBias:
    """How much the order of the answers changes the verdicts."""

    verdict_bias: Estimate  # share of verdicts for the first answer less that for the second
    probability_bias: Estimate  # mean probability of the first answer less that of the second
    flip_rate: Estimate  # share of rows whose verdict changes with the order
    orders: tuple[TableRow, ...]  # as given, swapped, and their mean, as one model each
    gain: Gain  # of the mean of both over the order as given


def measure_position_bias(scored: ScoredRows) -> PositionBias | None:
    """Measure how much verdicts depend on which answer stands first; None if the order changes none."""
    as_given_rv = scored.probabilities_rov[:, 0]
    swapped_rv = scored.probabilities_rov[:, 1]

    # A reward model scores each answer alone, so that it has no position bias.
    if np.array_equal(as_given_rv, swapped_rv):
        return None

    # Accuracy and log loss if only one order was used, beside those of the mean of both.
    is_right_r = rows_are_right(as_given_rv, scored.winners_r)
    losses_r = row_losses(as_given_rv, scored.labels_rv)
    swapped_is_right_r = rows_are_right(swapped_rv, scored.winners_r)
    swapped_losses_r = row_losses(swapped_rv, scored.labels_rv)
    orders = (
        make_table_row("order as given", scored, is_right_r, losses_r),
        make_table_row("order swapped", scored, swapped_is_right_r, swapped_losses_r),
        model_row(scored, "mean of both"),
    )

    return PositionBias(
        verdict_bias=measure_preference(
            scored, one_hot_verdicts(as_given_rv), one_hot_verdicts(swapped_rv)
        ),
        probability_bias=measure_preference(scored, as_given_rv, swapped_rv),
        flip_rate=scored.estimate(find_flips(scored)),
        orders=orders,
        gain=scored.estimate_gain(is_right_r, losses_r),
    )


def measure_preference(
    scored: ScoredRows, as_given_rv: np.ndarray, swapped_rv: np.ndarray
) -> Estimate:
    """Measure how much more the answer that stands first gets than the second.

    Args:
        scored: The measured rows.
        as_given_rv: What each verdict gets in the order as given, (rows, verdicts).
        swapped_rv: The same of the swapped order. Verdicts name the answers as the pairs file does, so
            that the first answer of the swapped order is model_b.
    """
    place_of_a = scored.verdicts.index("model_a")
    place_of_b = scored.verdicts.index("model_b")

    # Over both orders, without bias, first and second get the same.
    first_r = as_given_rv[:, place_of_a] + swapped_rv[:, place_of_b]
    second_r = as_given_rv[:, place_of_b] + swapped_rv[:, place_of_a]
    return scored.estimate((first_r - second_r) / 2)


def one_hot_verdicts(probabilities_rv: np.ndarray) -> np.ndarray:
    """Give the likeliest verdict of each row 1 and all others 0."""
    verdict_count = probabilities_rv.shape[1]
    return np.eye(verdict_count)[probabilities_rv.argmax(axis=1)]


def find_flips(scored: ScoredRows) -> np.ndarray:
    """Return for each row whether its verdict changes with the order, bool of shape (rows,)."""
    verdicts_ro = scored.probabilities_rov.argmax(axis=2)
    return verdicts_ro[:, 0] != verdicts_ro[:, 1]
