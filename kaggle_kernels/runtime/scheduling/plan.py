"""Shares out the seconds that are left: which rows get the second order, and which a further model.

schedule.plan_next_pass decides with it, after every pass, which pass comes next. An option is one
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
from dataclasses import dataclass
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
class Option:
    """One more pass that could be made: a package in an order."""

    package: int  # its number in the spec
    order: str
    change: float  # standard deviation of what it changes in a probability
    seconds_per_token: float
    load_seconds: float = 0.0  # 0 where its model is loaded
    unscored: Sequence[str] = ()  # ids of the rows that it would score


@dataclass(frozen=True)
class Offer:
    """One row of an option, which is named by its place."""

    option_place: int
    row_id: str
    gain: float
    seconds: float


@dataclass(frozen=True)
class Share:
    """What an option gets of the clock."""

    option: Option
    row_ids: list[str]
    seconds: float  # for these rows, without loading


def allocate(
    options: Sequence[Option],
    probabilities: Mapping[str, Sequence[float]],
    tokens: Mapping[str, int],
    seconds: float,
    metric: str,
) -> list[Share]:
    """Share the seconds that are left out among options: rows of most gain per second first.

    Args:
        options: The passes that could be made, those of the loaded model first.
        probabilities: What the passes so far say of a row, by id; absent: nothing.
        tokens: The rows' lengths, by id.
        seconds: What is left of the clock.
        metric: The competition's: accuracy, log_loss or brier_score.

    Returns:
        A share for each option, in their order; one without rows where it gets no time.
    """
    offers = make_offers(options, probabilities, tokens, metric)
    packages = list(dict.fromkeys(option.package for option in options))

    # A further model must be worth its loading: with the first package, with the first two, …
    best_gain = -1.0
    best_shares: list[Share] = []
    for count in range(1, len(packages) + 1):
        gain, shares = allocate_to(packages[:count], options, offers, seconds)
        if gain > best_gain:
            best_gain, best_shares = gain, shares
    return best_shares


def make_offers(
    options: Sequence[Option],
    probabilities: Mapping[str, Sequence[float]],
    tokens: Mapping[str, int],
    metric: str,
) -> list[Offer]:
    """List every unscored row of every option, by gain per second; equal ones keep their order."""
    offers = []
    for place, option in enumerate(options):
        for row_id in option.unscored:
            gain = expected_gain(probabilities.get(row_id), option.change, metric)
            seconds = max(tokens[row_id] * option.seconds_per_token, SHORTEST_SECONDS)
            offers.append(Offer(place, row_id, gain, seconds))
    return sorted(offers, key=lambda offer: offer.gain / offer.seconds, reverse=True)


def allocate_to(
    packages: Collection[int], options: Sequence[Option], offers: Sequence[Offer], seconds: float
) -> tuple[float, list[Share]]:
    """Take the best offers of these packages that fit the seconds left after loading.

    Returns:
        Their gain, and a share for each option.
    """
    # A package has several options, but is loaded once.
    load_seconds = {}
    for option in options:
        if option.package in packages:
            load_seconds[option.package] = option.load_seconds
    seconds_left = seconds - sum(load_seconds.values())

    total_gain = 0.0
    row_ids: list[list[str]] = [[] for _ in options]
    seconds_used = [0.0] * len(options)
    for offer in offers:
        place = offer.option_place
        # A row too long for what is left does not keep shorter ones behind it out.
        if options[place].package not in packages or offer.seconds > seconds_left:
            continue
        seconds_left -= offer.seconds
        seconds_used[place] += offer.seconds
        total_gain += offer.gain
        row_ids[place].append(offer.row_id)

    shares = []
    for place, option in enumerate(options):
        shares.append(Share(option, row_ids[place], seconds_used[place]))
    return total_gain, shares


def expected_gain(values: Sequence[float] | None, change: float, metric: str) -> float:
    """Compute what one more opinion on a row is expected to bring.

    Args:
        values: Its probabilities so far; None: no model has scored it.
        change: Standard deviation of what the opinion changes in a probability.
        metric: In which the gain is counted: accuracy, log_loss or brier_score.
    """
    # A first score is worth more than any second opinion.
    if values is None:
        return 1.0

    # The expected drop of log loss or of the Brier score, to second order.
    sum_of_squares = sum(value**2 for value in values)
    if metric == "log_loss":
        return change**2 * (1 - sum_of_squares)
    if metric == "brier_score":
        return change**2 * sum(value**2 * (1 - 2 * value + sum_of_squares) for value in values)

    # The verdict flips where the change exceeds half of its lead.
    second, first = sorted(values)[-2:]
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
    """Predict how long loading copies of a package takes, one after the other."""
    weight_bytes = sum(size for size, _ in weight_sizes(package.folder).values())
    return copies * weight_bytes / LOAD_BYTES_PER_SECOND


def is_multiplied(name: str) -> bool:
    """Tell whether every token is multiplied with a tensor.

    That is no embedding, no lm_head (last places only), no norm, bias or scale.
    """
    is_matrix = name.endswith((".weight", ".qweight"))
    return is_matrix and not any(part in name.lower() for part in ("embed", "lm_head", "norm"))
