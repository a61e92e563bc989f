"""What to score next, and for several models where.

First comes the first order of every row by the first model. Then there are options: the second order, a further model, its
second order. An option changes a probability by some amount, whose standard deviation s is measured. The gain to be
expected is that of the knowledge gradient (Frazier, Powell and Dayanik 2008): 2 (s φ(m/s) − m Φ(−m/s)), with m half the
lead of the first verdict over the second. A row near the line gains most, one far from it nothing. For log loss it is s² (1
− Σp²). Divided by the seconds that the row takes, it says what to do first; as much as the clock allows is done. Which
further models are worth loading is tried out, with 0, 1, 2, … of them.

Several models on several GPUs go one after the other on all of them, or each on GPUs of its own, whichever should end sooner.

The cost model of that: a copy of a model is loaded at LOAD_BYTES_PER_SECOND, one copy after the other; then a device does
2 x parameters (the embedding's not counted) x tokens floating-point operations at FLOP_PER_SECOND.
One after the other loads every model on every device and keeps all devices busy until the end. Side by side loads each
model once for each of its devices, and the devices of the faster model wait for the slower one.
Side by side must also fit the clock SAFETY times over, else the first model, on half the devices, might not get round.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kaggle_kernels.runtime.models.placement import weight_sizes
from kaggle_kernels.runtime.models.scoring import make_requests, orders_of
from kaggle_kernels.runtime.package import Package

LOAD_BYTES_PER_SECOND = 3e8
FLOP_PER_SECOND = {"cuda": 1.5e13, "cpu": 5e10}  # a T4 in float16 at a quarter of its peak; one core
SAFETY = 2.0
SAMPLE_ROWS = 256
CHANGE_OF_ORDER = 0.06  # the change of a probability (sd) by a second order or model, until it is measured
CHANGE_OF_MODEL = 0.1


@dataclass(frozen=True)
class Option:
    """One more pass: a package (its number in the spec) in an order, for rows that it has not scored.

    `change` is the standard deviation of what it changes in a probability; `load_seconds` is 0 where its model is loaded.
    """

    package: int
    order: str
    change: float
    seconds_per_token: float
    load_seconds: float = 0.0


@dataclass(frozen=True)
class Share:
    """What an option gets of the clock: its rows with their gain per second, and the seconds for them, without loading."""

    option: Option
    worth: dict[str, float]
    seconds: float


def allocate(
    options: Sequence[Option],
    unscored: Sequence[Sequence[str]],
    probabilities: Mapping[str, Sequence[float]],
    tokens: Mapping[str, int],
    seconds: float,
    by_log_loss: bool,
) -> list[Share]:
    """Each option's share of `seconds`, in the options' order: rows of most gain per second first, until the seconds are used.

    `unscored` are each option's row ids, `probabilities` what is known of a row (absent: nothing), `tokens` a row's length.
    """
    tried = []
    for last in (-1, *sorted({option.package for option in options})):  # -1: only what is loaded
        considered = [option.package <= last or not option.load_seconds for option in options]
        tried.append(allocate_to(considered, options, unscored, probabilities, tokens, seconds, by_log_loss))
    return max(tried, key=lambda found: found[0])[1]


def allocate_to(
    considered: Sequence[bool],
    options: Sequence[Option],
    unscored: Sequence[Sequence[str]],
    probabilities: Mapping[str, Sequence[float]],
    tokens: Mapping[str, int],
    seconds: float,
    by_log_loss: bool,
) -> tuple[float, list[Share]]:
    """The gain of the `considered` options, and the shares of all."""
    loading = {option.package: option.load_seconds for option, taken in zip(options, considered, strict=True) if taken}
    left = seconds - sum(loading.values())
    offers = []
    for number, option in enumerate(options):
        for row_id in unscored[number] if considered[number] else ():
            cost = max(tokens[row_id] * option.seconds_per_token, 1e-9)
            gain = expected_gain(probabilities.get(row_id), option.change, by_log_loss)
            offers.append((gain / cost, -number, row_id, cost, gain))
    worth: list[dict[str, float]] = [{} for _ in options]
    spent, total = [0.0] * len(options), 0.0
    for value, number, row_id, cost, gain in sorted(offers, reverse=True):
        if cost > left:
            continue
        left -= cost
        spent[-number] += cost
        total += gain
        worth[-number][row_id] = value
    return total, [Share(*found) for found in zip(options, worth, spent, strict=True)]


def expected_gain(values: Sequence[float] | None, change: float, by_log_loss: bool) -> float:
    """What another opinion that changes a probability by `change` (sd) is expected to bring: accuracy, or nats of log loss."""
    if values is None:
        return 1.0
    if by_log_loss:
        return change**2 * (1 - sum(value**2 for value in values))
    second, first = sorted(values)[-2:]
    margin, change = (first - second) / 2, max(change, 1e-6)
    ratio = margin / change
    density = math.exp(-(ratio**2) / 2) / math.sqrt(2 * math.pi)
    return 2 * (change * density - margin * math.erfc(ratio / math.sqrt(2)) / 2)


def measured_change(before: Mapping[str, Sequence[float]], after: Mapping[str, Sequence[float]]) -> float | None:
    """The standard deviation of the first probability's change over the rows in both; None for fewer than 30 of them."""
    changes = [after[row_id][0] - values[0] for row_id, values in before.items() if row_id in after]
    return math.sqrt(sum(change**2 for change in changes) / len(changes)) if len(changes) >= 30 else None


@dataclass(frozen=True)
class Job:
    """One model's work: bytes to load for each copy, floating-point operations for all rows in all orders."""

    load_bytes: float
    flop: float


@dataclass(frozen=True)
class Plan:
    """What was chosen, both estimates in seconds (side by side: None where it cannot be), and the sentence for the log."""

    side_by_side: bool
    in_turn_seconds: float
    side_by_side_seconds: float | None
    why: str


def make_plan(jobs: Sequence[Job], can_part: bool, devices: Sequence[str], seconds_left: float) -> Plan:
    """The plan for models of which each fits one device; `can_part` is False where one of them is split."""
    in_turn = seconds_in_turn(jobs, devices)
    if not can_part or not 2 <= len(jobs) <= len(devices):
        why = "a model is split over the devices" if not can_part else f"{len(jobs)} models, {len(devices)} devices"
        return Plan(False, in_turn, None, f"in turn, estimated at {in_turn:.0f} s ({why})")
    beside = seconds_side_by_side(jobs, devices)
    chosen = beside < in_turn and beside * SAFETY <= seconds_left
    estimates = f"in turn {in_turn:.0f} s, side by side {beside:.0f} s, {seconds_left:.0f} s left"
    return Plan(chosen, in_turn, beside, f"{'side by side' if chosen else 'in turn'} (estimates: {estimates})")


def seconds_in_turn(jobs: Sequence[Job], devices: Sequence[str]) -> float:
    """How long the models take one after the other, each on all devices."""
    return sum(job.load_bytes * len(devices) / LOAD_BYTES_PER_SECOND + job.flop / rate_of(devices) for job in jobs)


def seconds_side_by_side(jobs: Sequence[Job], devices: Sequence[str]) -> float:
    """How long the models take at the same time, each on its share of the devices; all are loaded before the first row."""
    shares = share_devices(devices, len(jobs))
    loading = sum(job.load_bytes * len(share) for job, share in zip(jobs, shares, strict=True)) / LOAD_BYTES_PER_SECOND
    return loading + max(job.flop / rate_of(share) for job, share in zip(jobs, shares, strict=True))


def share_devices(devices: Sequence[str], models: int) -> list[tuple[str, ...]]:
    """Each model's devices where they work side by side."""
    return [tuple(devices[number::models]) for number in range(models)]


def rate_of(devices: Sequence[str]) -> float:
    """Floating-point operations a second of all the devices."""
    return sum(FLOP_PER_SECOND[device.split(":")[0]] for device in devices)


def job_of(package: Package, contract, pairs: Sequence, orders: Sequence[str]) -> Job:
    """A package's work on `pairs`, with their tokens guessed from SAMPLE_ROWS of them, evenly spread."""
    sample = pairs[:: max(len(pairs) // SAMPLE_ROWS, 1)]
    requests = make_requests(package.model_input, package.tokenizer, contract, sample, ("as_given",))
    tokens = sum(request.tokens for request in requests) * len(pairs) / max(len(sample), 1) * len(orders_of(contract, orders))
    return Job(sum(size for size, _ in weight_sizes(package.folder).values()), flop_per_token(package) * tokens)


def flop_per_token(package: Package) -> float:
    """Floating-point operations that a token costs: two for each parameter that it is multiplied with."""
    return 2.0 * sum(elements for name, (_, elements) in weight_sizes(package.folder).items() if is_multiplied(name))


def loading_seconds(package: Package, copies: int) -> float:
    """How long loading `copies` of a package should take, one after the other."""
    return copies * sum(size for size, _ in weight_sizes(package.folder).values()) / LOAD_BYTES_PER_SECOND


def is_multiplied(name: str) -> bool:
    """Whether every token is multiplied with a tensor: no embedding, no lm_head (last places only), no norm, bias or scale."""
    return name.endswith((".weight", ".qweight")) and not any(part in name.lower() for part in ("embed", "lm_head", "norm"))
