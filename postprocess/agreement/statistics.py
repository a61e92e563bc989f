"""Measures how far models' probabilities of the same rows are apart, and how sure such a figure is.

Arrays in, numbers out; no file is read, no model loaded. comparison.py and conditions.py, the report
and the benchmarks call this.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from scipy import stats

from recipes.pairwise.tracking.metrics import ORDERS, SMALLEST, row_losses, rows_are_right

QUANTISED = "quantised"  # and quantised-2, … : the columns of quantised models
CONFIDENCE = 0.95
FEW_GROUPS = 20  # with fewer groups of prompts, an interval says little
# The bootstrap: how many samples are drawn, from which seed, and which quantiles are its 95 % interval.
RESAMPLES = 1000
SEED = 0
MIDDLE = (0.025, 0.975)
DECIMALS = 6  # of an interval: the last bits of a sum depend on the machine


@dataclass(frozen=True)
class Column:
    """One model's probabilities of the rows."""

    name: str  # recorded, trained, merged, or the name of a candidate for the package
    probabilities_rov: np.ndarray  # float64 of shape (rows, orders, verdicts)
    precision: str  # what the model computed in

    def mean_rv(self) -> np.ndarray:
        """The mean of both orders, (rows, verdicts): what a submission holds."""
        return self.probabilities_rov.mean(axis=1)


@dataclass(frozen=True)
class ComparedRows:
    """What is known of the rows beside the models' probabilities."""

    labels_rv: np.ndarray  # the shares of the human votes
    # The place of each row's winner among the verdicts; -1 where it is none of them.
    winners_r: np.ndarray
    groups_r: np.ndarray  # the number of each row's group of prompts
    # Parts of the rows that are judged on their own, by name, as masks of shape (rows,).
    slices: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Resamples:
    """Bootstrap samples: draws of whole groups of rows, with replacement."""

    group_r: np.ndarray  # the place of each row's group in `counts_sg`
    counts_sg: np.ndarray  # how often a draw holds each group, (draws, groups)


@dataclass(frozen=True)
class Estimate:
    """A mean over rows with its interval, which is infinite where a t interval has one group only."""

    value: float
    low: float
    high: float


def estimate_mean(
    values_r: np.ndarray, groups_r: np.ndarray, confidence: float = CONFIDENCE
) -> Estimate:
    """Estimate the mean of the values with a t interval over groups.

    Rows that share a prompt are no independent evidence, so that the standard error is that of the
    groups' sums (Liang and Zeger 1986). With differences of two models as values it is a paired t-test.
    """
    row_count = len(values_r)
    mean = float(values_r.mean()) if row_count else math.nan

    # Groups are numbered anew without gaps: groups 7, 9, 7 of three rows become 0, 1, 0.
    group_numbers, group_r = np.unique(groups_r, return_inverse=True)
    group_count = len(group_numbers)

    # One group alone does not show how much groups differ.
    if group_count < 2:
        return Estimate(mean, -math.inf, math.inf)

    # For each group, the sum of its rows' deviations from the mean. Of these sums it is the usual
    # variance of a sample, n / (n - 1) included.
    residuals_g = np.bincount(group_r, weights=values_r - mean)
    sum_of_squares = float((residuals_g**2).sum())
    variance_of_sum = group_count / (group_count - 1) * sum_of_squares
    standard_error = math.sqrt(variance_of_sum) / row_count

    # What is outside of the interval is shared out over both ends: 2.5 % each for a confidence of 95 %.
    upper_probability = (1 + confidence) / 2
    t_quantile = float(stats.t.ppf(upper_probability, df=group_count - 1))
    half_width = t_quantile * standard_error
    return Estimate(mean, mean - half_width, mean + half_width)


def difference(column: Column, reference: Column) -> dict[str, float]:
    """Measure how far a model's probabilities are from a reference model's.

    Returns:
        The largest and the mean difference in probability; the mean over rows and orders of the
        Kullback-Leibler divergence from the reference, in nats; and the number of rows whose verdict,
        by the mean of both orders, is another.
    """
    differences_rov = np.abs(column.probabilities_rov - reference.probabilities_rov)
    divergence_ro = divergence(column.probabilities_rov, reference.probabilities_rov)
    is_changed_r = verdicts(column) != verdicts(reference)
    return {
        "largest": float(differences_rov.max()),
        "mean": float(differences_rov.mean()),
        "kl_divergence": float(divergence_ro.mean()),
        "verdicts_changed": int(is_changed_r.sum()),
    }


def divergence(probabilities: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Compute the sum of q log(q / p) over the verdicts (Kullback and Leibler 1951), in nats.

    It is what p adds to the expected log loss where q is right.

    Args:
        probabilities: p, of shape (..., verdicts).
        reference: q, of the same shape.

    Returns:
        Shape (...). Clipped to 1e-15, as the competitions clip, it is finite.
    """
    p = np.clip(probabilities, SMALLEST, 1)
    q = np.clip(reference, SMALLEST, 1)
    log_ratios = np.log(q) - np.log(p)
    sums = (q * log_ratios).sum(axis=-1)

    # Clipping may leave probabilities that sum to a little over 1, and then a sum below 0.
    return np.maximum(sums, 0)


def stack_orders(rows: pl.DataFrame, verdicts: Sequence[str]) -> np.ndarray:
    """Take the probabilities of both orders from columns such as p_model_a_swapped, (rows, orders, verdicts)."""
    probabilities_of_orders = []
    for order in ORDERS:
        columns = [f"p_{verdict}_{order}" for verdict in verdicts]
        probabilities_of_orders.append(rows.select(columns).to_numpy())
    return np.stack(probabilities_of_orders, axis=1).astype(np.float64)


def verdicts(column: Column) -> np.ndarray:
    """Give the place of each row's likeliest verdict by the mean of both orders, (rows,)."""
    return column.mean_rv().argmax(axis=1)


def is_right(column: Column, winners_r: np.ndarray) -> np.ndarray:
    """Give 1.0 for each row whose verdict is its winner, else 0.0."""
    return rows_are_right(column.mean_rv(), winners_r).astype(np.float64)


def losses(column: Column, labels_rv: np.ndarray) -> np.ndarray:
    """Compute each row's log loss by the mean of both orders, in nats, (rows,)."""
    return row_losses(column.mean_rv(), labels_rv)


def resample(groups_r: np.ndarray) -> Resamples:
    """Draw bootstrap samples of whole groups: of as many groups as there are, with replacement.

    It is a bootstrap over clusters (Davison and Hinkley 1997, section 3.8). The seed is fixed, and every
    model is measured on the same draws.

    Returns:
        How often each draw holds each group, as a row of counts. Of three groups, a draw of the first,
        the third and the third again is 1, 0, 2.
    """
    # Groups are numbered anew without gaps: groups 7, 9, 7 of three rows become 0, 1, 0.
    group_numbers, group_r = np.unique(groups_r, return_inverse=True)
    group_count = len(group_numbers)
    probabilities_g = np.full(group_count, 1 / group_count)
    generator = np.random.default_rng(SEED)

    # How often each group is drawn is all that a mean over its rows needs.
    counts_sg = generator.multinomial(group_count, probabilities_g, size=RESAMPLES)
    return Resamples(group_r, counts_sg)


def interval(values_r: np.ndarray, counted_r: np.ndarray, resamples: Resamples) -> list[float]:
    """Compute the 95 % bootstrap interval of the mean over the rows for which `counted_r` is True.

    Returns:
        The low and the high end; NaN where no sample holds a row that counts.
    """
    # For each group, the sum of its rows' values and the number of its rows, of those that count.
    group_count = resamples.counts_sg.shape[1]
    counted_values_r = np.where(counted_r, values_r, 0)
    sums_g = np.bincount(resamples.group_r, weights=counted_values_r, minlength=group_count)
    row_counts_g = np.bincount(resamples.group_r, weights=counted_r, minlength=group_count)

    # A sample that draws three groups 1, 0 and 2 times has the sum 1 × the first sum + 2 × the third.
    sums_s = resamples.counts_sg @ sums_g
    row_counts_s = resamples.counts_sg @ row_counts_g

    # A sample without a row that counts has no mean.
    has_rows_s = row_counts_s > 0
    if not has_rows_s.any():
        return [math.nan, math.nan]

    means_s = sums_s[has_rows_s] / row_counts_s[has_rows_s]
    low, high = np.quantile(means_s, MIDDLE)
    return [round(float(low), DECIMALS), round(float(high), DECIMALS)]
