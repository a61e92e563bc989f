"""Several models on several GPUs: one after the other on all of them, or each on GPUs of its own, whichever should end sooner.

The cost model: a copy of a model is loaded at LOAD_BYTES_PER_SECOND, one copy after the other; then a device does
2 x parameters (the embedding's not counted) x tokens floating-point operations at FLOP_PER_SECOND.
One after the other loads every model on every device and keeps all devices busy until the end. Side by side loads each
model once for each of its devices, and the devices of the faster model wait for the slower one.
Side by side must also fit the clock SAFETY times over, else the first model, on half the devices, might not get round.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from kaggle_kernels.runtime.package import Package
from kaggle_kernels.runtime.placement import weight_sizes
from kaggle_kernels.runtime.scoring import make_requests, orders_of

LOAD_BYTES_PER_SECOND = 3e8
FLOP_PER_SECOND = {"cuda": 1.5e13, "cpu": 5e10}  # a T4 in float16 at a quarter of its peak; one core
SAFETY = 2.0
SAMPLE_ROWS = 256


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
    sizes = weight_sizes(package.folder)
    multiplied = sum(elements for name, (_, elements) in sizes.items() if is_multiplied(name))
    sample = pairs[:: max(len(pairs) // SAMPLE_ROWS, 1)]
    requests = make_requests(package.model_input, package.tokenizer, contract, sample, ("as_given",))
    tokens = sum(request.tokens for request in requests) * len(pairs) / max(len(sample), 1) * len(orders_of(contract, orders))
    return Job(sum(size for size, _ in sizes.values()), 2 * multiplied * tokens)


def loading_seconds(package: Package, copies: int) -> float:
    """How long loading `copies` of a package should take, one after the other."""
    return copies * sum(size for size, _ in weight_sizes(package.folder).values()) / LOAD_BYTES_PER_SECOND


def is_multiplied(name: str) -> bool:
    """Whether every token is multiplied with a tensor: no embedding, no lm_head (last places only), no norm, bias or scale."""
    return name.endswith((".weight", ".qweight")) and not any(part in name.lower() for part in ("embed", "lm_head", "norm"))
