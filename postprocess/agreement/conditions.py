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

HOLDS = "holds"
REFUSED = "refused"
UNDECIDED = "undecided"
MOST_SPREAD_LOST = 0.5
RECORD_CONDITION = "the mean difference in probability between recorded and trained"


@dataclass(frozen=True)
class Condition:
    """A figure that must not be above its bound.

    Attributes:
        name: What is measured.
        value: The figure.
        bound: The largest value that is let through.
        bound_name: The recipe's key that sets the bound.
        verdict: holds, refused or undecided.
        high: The upper end of the figure's interval, which must be below the bound; None where the
            figure itself decides.
        rows_needed: About how many rows would decide; None where it is decided, or nobody can say.
    """

    name: str
    value: float
    bound: float
    bound_name: str
    verdict: str
    high: float | None = None
    rows_needed: int | None = None


def list_conditions(
    packaged: str, columns: Mapping[str, Column], rows: ComparedRows, package: PackageBlock
) -> list[Condition]:
    """Check every condition of a package.

    Args:
        packaged: The name of the candidate.
        columns: All columns by name. `recorded` and `merged` may be absent.
        rows: The rows that they are of.
        package: The recipe's tolerances.
    """
    trained = columns["trained"]
    candidate = columns[packaged]
    conditions = check_mean_differences(packaged, columns, package.tolerance)

    name = f"the share of verdicts that {packaged} changes"
    changed_share = float((verdicts(candidate) != verdicts(trained)).mean())
    bound = package.tolerance_verdicts
    conditions.append(
        check_figure(name, changed_share, bound, "pairwise.package.tolerance_verdicts")
    )

    # A model that gives one answer to all rows is close to one that was hardly trained.
    name = f"the share of the probabilities' spread that {packaged} loses"
    lost_share = measure_lost_spread(candidate, trained)
    conditions.append(check_figure(name, lost_share, MOST_SPREAD_LOST, "the bound"))

    return conditions + check_log_loss(candidate, trained, rows, package.tolerance_log_loss)


def check_mean_differences(
    packaged: str, columns: Mapping[str, Column], tolerance: float
) -> list[Condition]:
    """Check the mean differences in probability, those of the training's own record first."""
    compared = [(packaged, "trained")]
    if "recorded" in columns:
        compared = [("recorded", "trained"), *compared, (packaged, "recorded")]
    # What a quantised model was made of must agree too: two errors may cancel out on these rows.
    if "merged" in columns and packaged.startswith(QUANTISED):
        compared.append(("merged", "trained"))

    conditions = []
    for name, reference in compared:
        figure = f"the mean difference in probability between {name} and {reference}"
        mean = difference(columns[name], columns[reference])["mean"]
        conditions.append(check_figure(figure, mean, tolerance, "pairwise.package.tolerance"))
    return conditions


def check_log_loss(
    candidate: Column, trained: Column, rows: ComparedRows, tolerance: float
) -> list[Condition]:
    """Check what packaging adds to the log loss, on all rows and on each slice of them.

    On all rows the loss is against the human votes. In a slice there are too few of them to tell
    a change of 0.01 from chance, so that the trained model's probabilities stand in for them.
    """
    row_count = len(rows.labels_rv)
    added_losses_r = losses(candidate, rows.labels_rv) - losses(trained, rows.labels_rv)
    estimate = estimate_mean(added_losses_r, rows.groups_r)
    name = f"the log loss that {candidate.name} adds"
    conditions = [check_interval(name, estimate, tolerance, row_count)]

    # Bonferroni: with 95 % confidence the true value of no slice is outside its interval.
    confidence = 1 - (1 - CONFIDENCE) / max(1, len(rows.slices))
    expected_losses_r = divergence(candidate.mean_rv(), trained.mean_rv())
    for slice_name, is_in_slice_r in rows.slices.items():
        slice_losses_r = expected_losses_r[is_in_slice_r]
        slice_groups_r = rows.groups_r[is_in_slice_r]
        estimate = estimate_mean(slice_losses_r, slice_groups_r, confidence)
        name = f"the expected log loss that {candidate.name} adds in {slice_name}"
        conditions.append(check_interval(name, estimate, tolerance, row_count))
    return conditions


def check_figure(name: str, value: float, bound: float, bound_name: str) -> Condition:
    """Check a figure that decides by itself; NaN never holds."""
    verdict = HOLDS if value <= bound else REFUSED
    return Condition(name, value, bound, bound_name, verdict)


def check_interval(name: str, estimate: Estimate, bound: float, row_count: int) -> Condition:
    """Check that a mean is below a bound, as far as some rows tell.

    Args:
        name: What is measured.
        estimate: The mean with its interval.
        bound: The interval's upper end must be below it. Where its lower end is above it, the condition
            is refused; where the bound is between them, more rows would decide.
        row_count: How many rows were compared.
    """
    rows_needed = None
    if estimate.high < bound:
        verdict = HOLDS
    elif estimate.low <= bound:
        verdict = UNDECIDED
        rows_needed = count_rows_needed(estimate, bound, row_count)
    else:
        verdict = REFUSED

    bound_name = "pairwise.package.tolerance_log_loss"
    return Condition(name, estimate.mean, bound, bound_name, verdict, estimate.high, rows_needed)


def count_rows_needed(estimate: Estimate, bound: float, row_count: int) -> int | None:
    """Estimate how many rows would decide, as an interval narrows with the root of their number.

    Returns:
        None where one group of prompts, or a mean on the bound, gives no estimate.
    """
    half_width = estimate.high - estimate.mean
    distance = abs(bound - estimate.mean)
    if not math.isfinite(half_width) or distance == 0:
        return None
    return math.ceil(row_count * (half_width / distance) ** 2)


def measure_lost_spread(candidate: Column, trained: Column) -> float:
    """Measure which share of the spread of the trained model's probabilities a candidate loses.

    Returns:
        1 for a constant; below 0 where the candidate's spread is larger; NaN where there was none.
    """
    trained_spread = measure_spread(trained)
    if trained_spread == 0:
        return math.nan
    return 1 - measure_spread(candidate) / trained_spread


def measure_spread(column: Column) -> float:
    """Measure how much the rows' probabilities differ: the root of the verdicts' summed variances."""
    variances_v = column.mean_rv().var(axis=0)
    return math.sqrt(float(variances_v.sum()))


def summarise(conditions: list[Condition]) -> str:
    """Give the verdict on all conditions: refused if one is, else undecided if one is, else holds."""
    condition_verdicts = {condition.verdict for condition in conditions}
    for verdict in (REFUSED, UNDECIDED):
        if verdict in condition_verdicts:
            return verdict
    return HOLDS
