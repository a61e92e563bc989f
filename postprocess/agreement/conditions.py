"""The conditions under which a model may be packaged: what packaging costs stays within the tolerances.

comparison.py lists them, gate.py refuses a package where one does not hold.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from postprocess.agreement.statistics import (
    CONFIDENCE,
    QUANTISED,
    Column,
    ComparedRows,
    Estimate,
    difference,
    divergence,
    estimate_mean,
    losses,
    verdicts,
)
from recipes.pairwise.config.schema import PackageBlock

# Verdicts on a condition, and on a package.
HOLDS = "holds"
REFUSED = "refused"
UNDECIDED = "undecided"

# Keys of the recipe that set the bounds.
TOLERANCE_KEY = "pairwise.package.tolerance"
VERDICTS_KEY = "pairwise.package.tolerance_verdicts"
LOG_LOSS_KEY = "pairwise.package.tolerance_log_loss"

# Quantising loses a few per cent of the spread, a constant all of it.
MOST_SPREAD_LOST = 0.5

# The condition that fails where a file of the run was exchanged after training.
RECORD_CONDITION = "the mean difference in probability between recorded and trained"


@dataclass(frozen=True)
class Condition:
    """A figure that must not be above its bound."""

    name: str  # of the figure
    value: float
    bound: float  # the largest value that is let through
    bound_name: str  # the recipe's key that sets the bound
    verdict: str  # holds, refused or undecided
    # The upper end of the figure's interval, which must be below the bound; None where the figure
    # itself decides.
    high: float | None = None
    # About how many rows would decide; None where it is decided, or nobody can say.
    rows_needed: int | None = None


def list_conditions(
    packaged: str, columns: Mapping[str, Column], rows: ComparedRows, package: PackageBlock
) -> list[Condition]:
    """Check a packaged model against the trained one. It may be used only where every condition holds.

    `columns` has the models' probabilities by name. `trained` is always there; `recorded` (what training
    wrote down) and `merged` (adapter added into the base, not quantised) may be absent.
    """
    candidate = columns[packaged]
    trained = columns["trained"]
    conditions = check_mean_differences(packaged, columns, package.tolerance)

    # The share of rows on which the candidate comes to another verdict than the trained model.
    is_changed_r = verdicts(candidate) != verdicts(trained)
    changed_share = float(is_changed_r.mean())
    figure = f"the share of verdicts that {packaged} changes"
    conditions.append(check_figure(figure, changed_share, package.tolerance_verdicts, VERDICTS_KEY))

    # A broken package may give every row the same answer. If the model was hardly trained, its own answers
    # are so alike that the checks above let that pass; the lost spread, which is 1 then, shows it. A trained
    # model without any spread is refused too: the share stays NaN.
    trained_spread = measure_spread(trained)
    lost_share = math.nan
    if trained_spread > 0:
        lost_share = 1 - measure_spread(candidate) / trained_spread
    figure = f"the share of the probabilities' spread that {packaged} loses"
    conditions.append(check_figure(figure, lost_share, MOST_SPREAD_LOST, "the bound"))

    # What packaging adds to the log loss against the human votes: on all rows, then in each slice of them.
    added_losses_r = losses(candidate, rows.labels_rv) - losses(trained, rows.labels_rv)
    estimate = estimate_mean(added_losses_r, rows.groups_r)
    figure = f"the log loss that {packaged} adds"
    tolerance = package.tolerance_log_loss
    conditions.append(check_interval(figure, estimate, tolerance, len(added_losses_r)))
    return conditions + check_slices(candidate, trained, rows, tolerance)


def check_mean_differences(
    packaged: str, columns: Mapping[str, Column], tolerance: float
) -> list[Condition]:
    """Check the mean differences in probability between the models that must agree.

    The order matters: where several conditions fail, the user is shown the first one.
    """
    model_pairs = []

    # If the probabilities that training recorded are not those of the model as it is loaded now, a file
    # was exchanged since, and the other comparisons mean little. So this one comes first.
    has_record = "recorded" in columns
    if has_record:
        model_pairs.append(("recorded", "trained"))

    # The packaged model must agree with both.
    model_pairs.append((packaged, "trained"))
    if has_record:
        model_pairs.append((packaged, "recorded"))

    # A quantised model is made of the merged one, which must agree too: the errors of merging and of
    # rounding may cancel out on these rows, and not on others.
    if "merged" in columns and packaged.startswith(QUANTISED):
        model_pairs.append(("merged", "trained"))

    conditions = []
    for name, reference in model_pairs:
        figure = f"the mean difference in probability between {name} and {reference}"
        mean = difference(columns[name], columns[reference])["mean"]
        conditions.append(check_figure(figure, mean, tolerance, TOLERANCE_KEY))
    return conditions


def check_slices(
    candidate: Column, trained: Column, rows: ComparedRows, tolerance: float
) -> list[Condition]:
    """Check what packaging adds to the log loss in each slice of the rows: a language, a quarter of length.

    A slice has too few votes to tell a change of 0.01 from chance. So the log loss is not measured on
    votes here. It is the one expected if people voted with the trained model's probabilities.
    """
    if not rows.slices:
        return []

    # Bonferroni: the 5 % that may go wrong are shared out over the slices, 0.5 % each for ten of them.
    # So with 95 % confidence, no slice at all has its true value outside of its interval.
    risk_of_slice = (1 - CONFIDENCE) / len(rows.slices)
    confidence = 1 - risk_of_slice

    # If people vote with the trained model's probabilities q, a candidate that predicts p adds the
    # divergence of p from q to the expected log loss.
    added_losses_r = divergence(candidate.mean_rv(), trained.mean_rv())
    row_count = len(added_losses_r)
    conditions = []
    for slice_name, is_in_slice_r in rows.slices.items():
        slice_losses_r = added_losses_r[is_in_slice_r]
        slice_groups_r = rows.groups_r[is_in_slice_r]
        estimate = estimate_mean(slice_losses_r, slice_groups_r, confidence)
        name = f"the expected log loss that {candidate.name} adds in {slice_name}"

        # Where more rows would decide, that is told as a number of rows of all slices together.
        conditions.append(check_interval(name, estimate, tolerance, row_count))
    return conditions


def check_figure(name: str, value: float, bound: float, bound_name: str) -> Condition:
    """Check a figure that decides by itself; NaN never holds."""
    verdict = HOLDS if value <= bound else REFUSED
    return Condition(name, value, bound, bound_name, verdict)


def check_interval(name: str, estimate: Estimate, bound: float, row_count: int) -> Condition:
    """Check that a mean is below a bound, as far as some rows tell.

    For a bound of 0.01:

        interval 0.001 to 0.008    holds: all of it is below the bound
        interval 0.004 to 0.016    undecided: more rows would narrow it
        interval 0.012 to 0.020    refused: all of it is above the bound
    """
    rows_needed = None
    if estimate.high < bound:
        verdict = HOLDS
    elif estimate.low <= bound:
        verdict = UNDECIDED
        rows_needed = count_rows_needed(estimate, bound, row_count)
    else:
        # This is also the verdict on a NaN, for which both comparisons are false.
        verdict = REFUSED

    return Condition(name, estimate.value, bound, LOG_LOSS_KEY, verdict, estimate.high, rows_needed)


def count_rows_needed(estimate: Estimate, bound: float, row_count: int) -> int | None:
    """Estimate how many rows would decide whether a mean is below a bound.

    An interval narrows with the root of the number of rows. A mean of 0.004 ± 0.012 is 0.006 below a bound of
    0.01: its interval must become half as wide, which takes four times as many rows.

    Returns:
        The number of all rows, those compared included. None where it cannot be told: with one group of
        prompts the interval is infinite, and a mean on the bound is never decided.
    """
    half_width = estimate.high - estimate.value
    distance = abs(bound - estimate.value)
    if not math.isfinite(half_width) or distance == 0:
        return None

    # How many times narrower the interval must become, to end at the bound.
    narrowing = half_width / distance
    return math.ceil(row_count * narrowing**2)


def measure_spread(column: Column) -> float:
    """Measure how much the rows' probabilities differ: the root of the verdicts' summed variances."""
    variances_v = column.mean_rv().var(axis=0)
    return math.sqrt(float(variances_v.sum()))


def summarise(conditions: list[Condition]) -> str:
    """Give the verdict on a package: refused if one condition is, else undecided if one is, else holds."""
    condition_verdicts = {condition.verdict for condition in conditions}
    if REFUSED in condition_verdicts:
        return REFUSED
    if UNDECIDED in condition_verdicts:
        return UNDECIDED
    return HOLDS
