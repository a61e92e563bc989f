"""Measure calibration: how often verdicts of a given confidence are right, and a best temperature.

`results.measure_run` calls `measure_calibration`, `postprocess.temperature` calls
`estimate_temperature`. Shape letters: see docs/style.md.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp

from postprocess.agreement.statistics import MIDDLE, Estimate
from postprocess.report.metrics import ScoredRows
from recipes.pairwise.tracking.metrics import SMALLEST

BINS = 10
# The temperature is sought by its inverse: from 10, the most that a spec takes, to 0.05.
INVERSE_TEMPERATURES = (0.1, 20.0)
TOLERANCE = 1e-6  # of the inverse temperature
# For the interval the range is walked in steps of about 1 %, the same for every resample.
INTERVAL_STEPS = 500


@dataclass(frozen=True)
class Bin:
    """The rows whose likeliest verdict has a probability within a bin; `confidence` is its mean."""

    row_count: int
    confidence: float
    accuracy: Estimate


@dataclass(frozen=True)
class Calibration:
    """Whether the model is as sure as it is right."""

    bins: tuple[Bin, ...]  # those that have rows, in the order of their confidence
    lowest_confidence: float  # the least that the likeliest verdict can have: 1/2 or 1/3
    error: float  # the expected calibration error (Guo et al. 2017)
    temperature: float  # the one with the least log loss on these rows
    log_loss: float  # of all rows at temperature 1, in nats
    log_loss_at_temperature: float


def measure_calibration(scored: ScoredRows) -> Calibration | None:
    """Measure whether a model is right as often as it is sure: with a probability of 0.7, on 70 % of rows.

    Returns:
        The calibration of the mean of both orders; None if no row has a winner.
    """
    if not scored.is_decided_r.any():
        return None

    # A model is at least this sure of its verdict: the likeliest of two has a probability of 1/2 or more.
    lowest_confidence = 1 / len(scored.verdicts)
    bins = fill_bins(scored, lowest_confidence)

    # The expected calibration error: the bins' errors, weighted by their numbers of rows.
    total_error = 0.0
    for filled_bin in bins:
        bin_error = abs(filled_bin.accuracy.value - filled_bin.confidence)
        total_error += filled_bin.row_count * bin_error

    temperature, log_loss_at_temperature = find_best_temperature(scored.mean_rv, scored.labels_rv)
    return Calibration(
        bins=tuple(bins),
        lowest_confidence=lowest_confidence,
        error=float(total_error / scored.is_decided_r.sum()),
        temperature=temperature,
        log_loss=float(scored.losses_r.mean()),
        log_loss_at_temperature=log_loss_at_temperature,
    )


def fill_bins(scored: ScoredRows, lowest_confidence: float) -> list[Bin]:
    """Sort the rows that have a winner into bins of equal width, by the probability of the model's verdict."""
    # A confidence of exactly 1 belongs to the last bin.
    confidence_r = scored.mean_rv.max(axis=1)
    share_of_range_r = (confidence_r - lowest_confidence) / (1 - lowest_confidence)
    bin_of_row_r = np.clip((share_of_range_r * BINS).astype(int), 0, BINS - 1)

    # Bins without rows are left out.
    bins = []
    for number in range(BINS):
        mask_r = scored.is_decided_r & (bin_of_row_r == number)
        if mask_r.any():
            accuracy = scored.estimate(scored.is_right_r, mask_r)
            confidence = float(confidence_r[mask_r].mean())
            bins.append(Bin(int(mask_r.sum()), confidence, accuracy))
    return bins


def find_best_temperature(
    probabilities_rv: np.ndarray, labels_rv: np.ndarray
) -> tuple[float, float]:
    """Find the temperature with the least log loss on these rows.

    Log loss is convex in 1 / temperature: it has one minimum.

    Returns:
        The temperature, and the log loss with it in nats.
    """

    def compute_log_loss(inverse_temperature: float) -> float:
        return float(soften_and_score(probabilities_rv, labels_rv, inverse_temperature).mean())

    minimum = minimize_scalar(
        compute_log_loss,
        bounds=INVERSE_TEMPERATURES,
        method="bounded",
        options={"xatol": TOLERANCE},
    )
    return 1 / float(minimum.x), float(minimum.fun)


def soften_and_score(
    probabilities_rv: np.ndarray, labels_rv: np.ndarray, inverse_temperature: float
) -> np.ndarray:
    """Compute the log loss of each row at a temperature.

    The temperature is applied as the kernel does it: the probabilities to the power of
    1 / temperature, scaled to sum to 1.

    Returns:
        The losses in nats, (rows,).
    """
    # log(p ** (1 / T)), scaled to sum to 1, is the logit less the logarithm of the sum.
    logits_rv = inverse_temperature * np.log(np.clip(probabilities_rv, SMALLEST, 1))
    mean_logit_r = (labels_rv * logits_rv).sum(axis=1)
    return logsumexp(logits_rv, axis=1) - mean_logit_r


def estimate_temperature(scored: ScoredRows, probabilities_rv: np.ndarray) -> Estimate:
    """Estimate the best temperature of some probabilities, with its 95 % confidence interval.

    The interval is a bootstrap: each resample draws groups of rows, and has a best temperature of its own.
    """
    best, _ = find_best_temperature(probabilities_rv, scored.labels_rv)

    # How often each group was drawn: (resamples, groups).
    counts_sg = scored.resamples.counts_sg
    resample_count, group_count = counts_sg.shape

    # All resamples walk along the same temperatures, and each keeps the one with its least loss.
    least_loss_s = np.full(resample_count, np.inf)
    temperature_s = np.ones(resample_count)
    for inverse_temperature in np.geomspace(*INVERSE_TEMPERATURES, INTERVAL_STEPS):
        losses_r = soften_and_score(probabilities_rv, scored.labels_rv, inverse_temperature)
        losses_g = np.bincount(scored.resamples.group_r, losses_r, minlength=group_count)
        losses_s = counts_sg @ losses_g

        is_better_s = losses_s < least_loss_s
        least_loss_s[is_better_s] = losses_s[is_better_s]
        temperature_s[is_better_s] = 1 / inverse_temperature

    low, high = np.quantile(temperature_s, MIDDLE)
    return Estimate(best, float(low), float(high))
