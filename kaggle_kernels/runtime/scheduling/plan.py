"""Shares out the seconds that are left: which rows get the second order, and which a further model.

schedule.plan_next_pass decides with it, after every pass, which pass comes next. A candidate is one
more pass of a package in an order. It changes a probability by some amount, of standard deviation
s. Its expected gain is that of the knowledge gradient (Frazier, Powell and Dayanik 2008):
2 (s φ(m/s) − m Φ(−m/s)), with m half the lead of the first verdict over the second. A row near the
line between two verdicts gains most, one far from it nothing. For log loss it is s² (1 − Σp²), for
the Brier score s² Σ p² (1 − 2p + Σp²), by the independent changes of a row's logits.

Rows are taken by their gain per second until the seconds are used. Which further models are worth
their loading is tried out.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

from kaggle_kernels.runtime.models.placement import weight_sizes
from kaggle_kernels.runtime.package import Package

# An assumption without a published source. A kernel's log says how long its loading took.
LOAD_BYTES_PER_SECOND = 3e8

# The change of a probability (sd) by a second order or model.
CHANGE_OF_ORDER = 0.06
CHANGE_OF_MODEL = 0.1

# Of a row while no speed is measured: gains are divided by it.
SHORTEST_SECONDS = 1e-9


@dataclass(frozen=True)
class CandidatePass:
    """A pass that could come next: a package scores rows in one order of their responses."""

    package: int  # its number in the spec
    order: str
    change: float  # standard deviation of what it changes in a probability
    seconds_per_token: float
    load_seconds: float = 0.0  # 0 where its model is loaded
    unscored: Sequence[str] = ()  # ids of the rows that it would score


@dataclass(frozen=True)
class CandidateRow:
    """One row of a candidate pass."""

    pass_place: int  # of the pass in the list of candidates
    row_id: str
    gain: float
    seconds: float


@dataclass
class PlannedPass:
    """A candidate pass with those of its rows that the time is enough for; perhaps none."""

    candidate: CandidatePass
    row_ids: list[str] = field(default_factory=list)
    seconds: float = 0.0  # for these rows, without loading


def plan_passes(
    candidates: Sequence[CandidatePass],
    probabilities: Mapping[str, Sequence[float]],
    tokens: Mapping[str, int],
    seconds: float,
    metric: str,
) -> list[PlannedPass]:
    """Plan what the seconds that are left are spent on: the rows of most expected gain per second.

    Args:
        candidates: The passes that could be made, those of the loaded model first.
        probabilities: What the passes so far say of a row, by id; absent where none has scored it.
        tokens: The rows' lengths, by id.
        seconds: What is left of the kernel's time.
        metric: The competition's: accuracy, log_loss or brier_score.

    Returns:
        A plan for each candidate, in their order.
    """
    rows = rank_rows(candidates, probabilities, tokens, metric)
    packages = list(dict.fromkeys(candidate.package for candidate in candidates))

    # A further model must be worth its loading. Plans with the first package alone, with the first
    # two, and so on are compared.
    best_gain = -1.0
    best_plan: list[PlannedPass] = []
    for count in range(1, len(packages) + 1):
        gain, plan = fill_seconds(packages[:count], candidates, rows, seconds)
        if gain > best_gain:
            best_gain, best_plan = gain, plan
    return best_plan


def rank_rows(
    candidates: Sequence[CandidatePass],
    probabilities: Mapping[str, Sequence[float]],
    tokens: Mapping[str, int],
    metric: str,
) -> list[CandidateRow]:
    """Sort the rows of all candidates by their expected gain per second (see `plan_passes`)."""
    rows = []
    for place, candidate in enumerate(candidates):
        for row_id in candidate.unscored:
            gain = expected_gain(probabilities.get(row_id), candidate.change, metric)
            seconds = max(tokens[row_id] * candidate.seconds_per_token, SHORTEST_SECONDS)
            rows.append(CandidateRow(place, row_id, gain, seconds))
    return sorted(rows, key=lambda row: row.gain / row.seconds, reverse=True)


def fill_seconds(
    packages: Collection[int],
    candidates: Sequence[CandidatePass],
    ranked_rows: Sequence[CandidateRow],
    seconds: float,
) -> tuple[float, list[PlannedPass]]:
    """Fill the time with the best rows of some packages, whose loading is counted first.

    Returns:
        The expected gain of all these rows, and a plan for each candidate.
    """
    # A package may have several candidates, but is loaded once.
    load_seconds = {}
    for candidate in candidates:
        if candidate.package in packages:
            load_seconds[candidate.package] = candidate.load_seconds
    seconds_left = seconds - sum(load_seconds.values())

    total_gain = 0.0
    plan = [PlannedPass(candidate) for candidate in candidates]
    for row in ranked_rows:
        planned = plan[row.pass_place]
        is_wanted = planned.candidate.package in packages

        # A row that is too long for what is left is skipped: shorter ones behind it may fit.
        if is_wanted and row.seconds <= seconds_left:
            seconds_left -= row.seconds
            total_gain += row.gain
            planned.row_ids.append(row.row_id)
            planned.seconds += row.seconds
    return total_gain, plan


def expected_gain(probabilities: Sequence[float] | None, change: float, metric: str) -> float:
    """Compute what another score of a row is expected to gain (the module says by which formula).

    Args:
        probabilities: The row's, of each verdict, so far; None: no model has scored it.
        change: Standard deviation of what the score changes in a probability.
        metric: In which the gain is counted: accuracy, log_loss (in nats) or brier_score.
    """
    # A first score is worth more than any further one.
    if probabilities is None:
        return 1.0

    # The expected drop of log loss or of the Brier score, to second order.
    sum_of_squares = sum(probability**2 for probability in probabilities)
    if metric == "log_loss":
        return change**2 * (1 - sum_of_squares)
    if metric == "brier_score":
        terms = [p**2 * (1 - 2 * p + sum_of_squares) for p in probabilities]
        return change**2 * sum(terms)

    # The verdict flips where the change exceeds half of the first verdict's lead over the second.
    second, first = sorted(probabilities)[-2:]
    margin = (first - second) / 2
    ratio = margin / change
    density = NormalDist().pdf(ratio)
    tail = math.erfc(ratio / math.sqrt(2)) / 2  # NormalDist.cdf is not exact so far out
    return 2 * (change * density - margin * tail)


def flop_per_token(package: Package) -> float:
    """Count the floating-point operations of a token: two for each parameter of its products."""
    sizes = weight_sizes(package.folder)
    multiplied_elements = 0
    for name, (_, elements) in sizes.items():
        if is_multiplied(name):
            multiplied_elements += elements
    return 2.0 * multiplied_elements


def loading_seconds(package: Package, copies: int) -> float:
    """Predict how long loading copies of a package takes: all devices load from the same disk."""
    weight_bytes = sum(size for size, _ in weight_sizes(package.folder).values())
    return copies * weight_bytes / LOAD_BYTES_PER_SECOND


def is_multiplied(name: str) -> bool:
    """Tell by its name whether a tensor is a matrix that every token is multiplied with.

    Embeddings are looked up, lm_head reads the last token only, and norms, biases and scales are no matrices.
    """
    is_matrix = name.endswith((".weight", ".qweight"))
    return is_matrix and not any(part in name.lower() for part in ("embed", "lm_head", "norm"))
