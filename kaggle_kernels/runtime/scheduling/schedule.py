"""From packages and rows to scores: one pass after another, each planned when the one before ended.

main.run_kernel calls `score_all`. Models run one after the other, each on all devices. The first
order of the first model goes over all rows and may use the whole clock: a row with one score is
worth more than a second one. What comes then, the second order and further models, is decided by
`plan_next_pass`, with what was measured so far: see plan.py. Rows that count on the current
leaderboard go through all of this alone; the others get what time is left.
"""

import os
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from kaggle_kernels.runtime.models.scoring import (
    DEFAULT_PADDING_LIMIT,
    PADDING_LIMITS,
    Request,
    make_requests,
    mean_of_orders,
    orders_of,
)
from kaggle_kernels.runtime.package import Package, PackageError
from kaggle_kernels.runtime.scheduling.pass_runner import Pass, make_pass, pass_record, run_pass
from kaggle_kernels.runtime.scheduling.plan import (
    CHANGE_OF_MODEL,
    CHANGE_OF_ORDER,
    CandidatePass,
    PlannedPass,
    flop_per_token,
    loading_seconds,
    plan_passes,
)
from kaggle_kernels.runtime.scheduling.worker_handle import Worker, start_workers
from kaggle_kernels.runtime.settings import Clock, Settings, is_hidden_run, log
from kaggle_kernels.runtime.submission import soften, to_competition, weighted_mean

Scores = dict[str, dict[str, list[float]]]  # by id, then by order
Key = tuple[int, str]  # a package's number in the spec, and an order
PADDING_FACTOR = 1.03  # by which batches, padded, have more tokens than their rows
ENCODED_AT_ONCE = 1000


class LoadError(RuntimeError):
    """No device could load a package."""


@dataclass(frozen=True)
class Inputs:
    """What is to be scored, by which packages, on which devices (by position) and until when."""

    settings: Settings
    packages: Sequence[Package]
    contracts: Sequence  # the packages', with the spec's token budget
    rows: Sequence[Mapping]
    row_groups: Sequence[Sequence[str]]  # ids of the rows that count, then of the others
    devices: Mapping[int, str]
    threads: int  # of the CPU, for each worker
    clock: Clock


@dataclass
class Progress:
    """How far the run is, and the records of it for kernel.json."""

    scores: list[Scores]  # of each package
    packages: list[int]  # numbers of those that are not left out
    devices: dict[int, str]  # those of the inputs that are not gone
    tried: dict[Key, set[str]] = field(default_factory=dict)  # rows that need no further try
    passes: list[dict] = field(default_factory=list)


@dataclass
class Measurements:
    """What plans are made of."""

    tokens: dict[str, int] = field(default_factory=dict)  # of a row, as the first pass encoded it
    rates: dict[int, float] = field(default_factory=dict)  # tokens a second, by package


@dataclass(frozen=True)
class ScoringJob:
    """The kernel's job: what to score, how far that is, and what was measured on the way."""

    inputs: Inputs
    progress: Progress
    measured: Measurements

    def orders(self, number: int) -> tuple[str, ...]:
        """List the orders worth scoring with a package."""
        return orders_of(self.inputs.contracts[number], self.inputs.settings.orders)

    def probabilities(self) -> dict[str, list[float]]:
        """Combine what all packages have given so far, by id."""
        return combine(self.inputs.settings, self.inputs.packages, self.progress.scores)

    def model_columns(self) -> dict[str, dict[str, float]]:
        """Collect each model's own probabilities: RUN_p_VERDICT_ORDER, then by id."""
        columns: dict[str, dict[str, float]] = {}
        for number, package_settings in enumerate(self.inputs.settings.packages):
            verdicts = self.inputs.packages[number].contract.verdicts
            for row_id, by_order in self.progress.scores[number].items():
                for order, values in by_order.items():
                    for verdict, value in zip(verdicts, values, strict=True):
                        name = f"{package_settings.run}_p_{verdict}_{order}"
                        columns.setdefault(name, {})[row_id] = value
        return columns


@dataclass(frozen=True)
class NextPass:
    """A pass to be made now."""

    package: int  # its number in the spec
    order: str
    row_ids: frozenset[str]
    deadline: float  # as time.monotonic gives seconds


def make_job(
    settings: Settings,
    packages: Sequence[Package],
    rows: Sequence[Mapping],
    devices: Sequence[str],
    clock: Clock,
) -> ScoringJob:
    """Make a job of which nothing is scored yet. The devices share the CPU's cores evenly."""
    # Rows that count on the leaderboard will be scored before the others.
    counting_ids = [row["id"] for row in rows if row["counts"]]
    other_ids = [row["id"] for row in rows if not row["counts"]]
    row_groups = [group for group in (counting_ids, other_ids) if group]

    # A spec may have another token budget than training.
    contracts = [package.contract for package in packages]
    if settings.budget_tokens is not None:
        budget_tokens = settings.budget_tokens
        contracts = [replace(contract, budget_tokens=budget_tokens) for contract in contracts]

    cores = len(os.sched_getaffinity(0))
    inputs = Inputs(
        settings=settings,
        packages=packages,
        contracts=contracts,
        rows=rows,
        row_groups=row_groups,
        devices=dict(enumerate(devices)),
        threads=max(cores // len(devices), 1),
        clock=clock,
    )
    progress = Progress(
        scores=[{row["id"]: {} for row in rows} for _ in packages],
        packages=list(range(len(packages))),
        devices=dict(inputs.devices),
    )
    return ScoringJob(inputs, progress, Measurements())


def score_all(job: ScoringJob) -> None:
    """Make pass after pass until nothing is left or nothing more fits the clock.

    In the hidden run a package that fails is left out while another one works.

    Raises:
        PackageError: The workers refuse a package: it scores other than when it was packaged.
        LoadError: No device could load a package.
    """
    loaded: int | None = None  # the number of the package that the workers have
    workers: list[Worker] = []
    try:
        while next_pass := plan_next_pass(job, loaded, workers):
            try:
                # Two models do not fit one GPU: the old one goes before the new one comes.
                if next_pass.package != loaded:
                    stop_workers(job, workers)
                    workers = load_package(job, next_pass.package)
                    loaded = next_pass.package
                score_pass(job, next_pass, workers)
            except (PackageError, LoadError) as error:
                stop_workers(job, workers)
                loaded = None
                leave_out(job, next_pass.package, error)
    finally:
        stop_workers(job, workers)


def leave_out(job: ScoringJob, number: int, error: Exception) -> None:
    """Leave out the package that failed with `error`, in the hidden run and while another one works; else raise it."""
    job.progress.packages.remove(number)
    another_works = bool(job.progress.packages or job.progress.passes)
    if not is_hidden_run() or not another_works:
        raise error
    log(job.inputs.clock, f"{job.inputs.packages[number].folder.name}: left out: {error}")


def plan_next_pass(
    job: ScoringJob, loaded: int | None, workers: Sequence[Worker]
) -> NextPass | None:
    """Plan the next pass: rows that count come first, the others get what time is left.

    Args:
        job: What is to be scored, and has been.
        loaded: The number of the package that the workers have loaded; None: none.
        workers: The workers of that package.

    Returns:
        None where nothing is left to score, nothing more fits the time, or no worker is alive.
    """
    # Workers are gone for good once they died too often; no plan brings them back.
    all_gone = bool(workers) and all(worker.gone for worker in workers)
    if all_gone:
        log(job.inputs.clock, "no device is left; rows without a score get the prior")
    if all_gone or not job.progress.packages or job.inputs.clock.left() <= 0:
        return None

    packages = job.progress.packages
    for group in job.inputs.row_groups:
        # A group begins with one order of all its rows, by the loaded model or else the spec's
        # first. That measures the tokens of all rows, so that any row shows whether it was made.
        if group[0] not in job.measured.tokens:
            number = loaded if loaded in packages else packages[0]
            first_order = job.orders(number)[0]
            return NextPass(number, first_order, frozenset(group), job.inputs.clock.deadline)

        # The rows that do not count wait until nothing is left to do for those that do.
        next_pass = plan_further_pass(job, group, loaded)
        if next_pass is not None:
            return next_pass
    return None


def plan_further_pass(job: ScoringJob, group: Sequence[str], loaded: int | None) -> NextPass | None:
    """Plan all further passes over a group of rows, and return the one to begin with.

    Returns:
        None where no row is left, or no time for one.
    """
    candidates = list_candidates(job, group, loaded)
    if not candidates:
        return None

    clock = job.inputs.clock
    metric = job.inputs.settings.metric
    plan = plan_passes(candidates, job.probabilities(), job.measured.tokens, clock.left(), metric)
    log_plan(job, plan)

    # Where a pass has no rows, there was no time for it.
    plan_with_rows = [planned for planned in plan if planned.row_ids]
    if not plan_with_rows:
        return None

    # The first pass must leave the time that is planned for the others.
    first, *later = plan_with_rows
    package = first.candidate.package
    deadline = clock.deadline - count_seconds(later, package)
    return NextPass(package, first.candidate.order, frozenset(first.row_ids), deadline)


def count_seconds(plan: Sequence[PlannedPass], loaded: int) -> float:
    """Count the seconds of planned passes. Each package but the loaded one is loaded once."""
    seconds = 0.0
    loaded_packages = {loaded}
    for planned in plan:
        seconds += planned.seconds
        if planned.candidate.package not in loaded_packages:
            loaded_packages.add(planned.candidate.package)
            seconds += planned.candidate.load_seconds
    return seconds


def list_candidates(
    job: ScoringJob, group: Sequence[str], loaded: int | None
) -> list[CandidatePass]:
    """List every pass that has rows of the group left to score, those of the loaded model first."""
    packages = sorted(job.progress.packages, key=lambda number: number != loaded)
    candidates = []
    for number in packages:
        rate = predict_rate(job, number)
        load_seconds = 0.0
        if number != loaded:
            is_split = job.inputs.settings.packages[number].placement == "split"
            copies = 1 if is_split else len(job.progress.devices)
            load_seconds = loading_seconds(job.inputs.packages[number], copies)

        # An order of which every row was tried needs no further pass.
        for order in job.orders(number):
            tried = job.progress.tried.get((number, order), set())
            unscored = [row_id for row_id in group if row_id not in tried]
            if unscored:
                candidate = CandidatePass(
                    package=number,
                    order=order,
                    change=predict_change(job, number),
                    seconds_per_token=PADDING_FACTOR / rate if rate else 0.0,
                    load_seconds=load_seconds,
                    unscored=unscored,
                )
                candidates.append(candidate)
    return candidates


def predict_change(job: ScoringJob, number: int) -> float:
    """Predict how much another score by a package changes a probability (standard deviation)."""
    packages = job.inputs.settings.packages
    total_weight = sum(packages[other].weight for other in job.progress.packages)
    relative_weight = packages[number].weight / total_weight

    # The second order of a model says less than the first score of a model.
    has_scored = any(job.progress.tried.get((number, order)) for order in job.orders(number))
    if has_scored:
        return CHANGE_OF_ORDER * relative_weight
    return CHANGE_OF_MODEL * 2 * relative_weight  # measured with two models of equal weight


def predict_rate(job: ScoringJob, number: int) -> float:
    """Predict how many tokens of a package all devices score in a second; 0 before any pass was measured."""
    rates = job.measured.rates
    if not rates:
        return 0.0
    if number in rates:
        return rates[number]

    # The devices do as many operations a second as for a package that has run, but a token takes
    # more of them, or fewer.
    packages = job.inputs.packages
    measured_number, *_others = rates
    operations_per_second = rates[measured_number] * flop_per_token(packages[measured_number])
    return operations_per_second / flop_per_token(packages[number])


def log_plan(job: ScoringJob, plan: Sequence[PlannedPass]) -> None:
    """Log what a plan does with the seconds that are left."""
    parts = []
    for planned in plan:
        candidate = planned.candidate
        name = f"{job.inputs.packages[candidate.package].folder.name} {candidate.order}"
        rows = f"{len(planned.row_ids)} of {len(candidate.unscored)} rows"
        parts.append(f"{name} {rows} in {planned.seconds:.1f} s")
    clock = job.inputs.clock
    log(clock, f"plan: {clock.left():.1f} s left: {'; '.join(parts)}")


def load_package(job: ScoringJob, number: int) -> list[Worker]:
    """Start workers on the devices that still work, which load a package.

    Raises:
        LoadError: No device is left, or a model that is split would lack one of them.
    """
    inputs, devices = job.inputs, job.progress.devices
    package, settings = inputs.packages[number], inputs.settings
    package_settings = settings.packages[number]

    # The layers of a split model were placed for all of the devices.
    is_incomplete = package_settings.placement == "split" and len(devices) < len(inputs.devices)
    if not devices or is_incomplete:
        raise LoadError(f"{package.folder}: no device is left for it")
    return start_workers(
        package, package_settings, devices, settings.tokens_per_batch, inputs.threads, inputs.clock
    )


def stop_workers(job: ScoringJob, workers: list[Worker]) -> None:
    """Stop the workers and empty the list. A device that has failed for good leaves the job."""
    # Where no worker could load the package, that is the package's fault and the devices stay.
    any_has_loaded = any(worker.load_seconds for worker in workers)
    for worker in workers:
        worker.stop()
        if worker.gone and any_has_loaded:
            for position in worker.positions:
                job.progress.devices.pop(position, None)
    workers.clear()


def score_pass(job: ScoringJob, next_pass: NextPass, workers: Sequence[Worker]) -> None:
    """Score the rows of a pass, and note the result.

    Raises:
        PackageError: The last worker that is left refuses the package.
        LoadError: No worker could load it.
    """
    number, order = next_pass.package, next_pass.order
    package, clock = job.inputs.packages[number], job.inputs.clock
    label = f"{package.folder.name}, {order}"

    # The rows of the first pass are encoded here while the workers load.
    requests = encode_rows(job.inputs, next_pass)
    tokens = sum(request.tokens for request in requests)
    log(clock, f"{label}: {len(requests)} rows encoded, {tokens} tokens")

    work = make_pass(label, requests, next_pass.deadline, workers)
    work = run_pass(work, workers, clock)
    if all(worker.gone and not worker.load_seconds for worker in workers):
        raise LoadError(f"{package.folder}: no device could load it")
    record_pass(job, (number, order), work, requests, workers)


def encode_rows(inputs: Inputs, next_pass: NextPass) -> list[Request]:
    """Encode the rows of a pass to token ids, by the package's own model_input.py."""
    package = inputs.packages[next_pass.package]
    pairs = []
    for row in inputs.rows:
        if row["id"] in next_pass.row_ids:
            pairs.append(package.model_input.pair_from_row(row))

    encoded: list[Request] = []
    for start in range(0, len(pairs), ENCODED_AT_ONCE):
        requests = make_requests(
            package.model_input,
            package.tokenizer,
            inputs.contracts[next_pass.package],
            pairs[start : start + ENCODED_AT_ONCE],
            (next_pass.order,),
            PADDING_LIMITS.get(package.manifest["quantize"], DEFAULT_PADDING_LIMIT),
        )

        # Four bytes for each token id, since there are millions of them.
        for request in requests:
            sequences = tuple(array("i", ids) for ids in request.sequences)
            encoded.append(replace(request, sequences=sequences))
    return encoded


def record_pass(
    job: ScoringJob, key: Key, work: Pass, requests: Sequence[Request], workers: Sequence[Worker]
) -> None:
    """Note what a finished pass gave: its scores, the rows that it tried, what it measured."""
    number, order = key
    progress = job.progress
    for row_id, probabilities in work.scores.items():
        progress.scores[number][row_id][order] = probabilities

    progress.tried.setdefault(key, set()).update(list_tried_rows(work, requests, workers))

    # A row that ended its workers in one order would do so in the other: it is tried in none again.
    for any_order in job.orders(number):
        progress.tried.setdefault((number, any_order), set()).update(work.given_up)

    # What later plans need: the rows' lengths, and the speed of the workers that still live.
    for request in requests:
        job.measured.tokens.setdefault(request.id, request.tokens)
    rate = sum(worker.rate() for worker in workers if not worker.gone)
    if rate:
        job.measured.rates[number] = rate

    # kernel.json keeps a record of every pass.
    run = job.inputs.settings.packages[number].run
    progress.passes.append({"run": run, "order": order, **pass_record(work)})


def list_tried_rows(work: Pass, requests: Sequence[Request], workers: Sequence[Worker]) -> set[str]:
    """List the rows of a finished pass that no later pass should try: all but those that are still in its queue."""
    tried_ids = {request.id for request in requests}

    # Workers that live and scored nothing would not do better another time, and the kernel would try
    # for ever: then no row is left for later.
    can_be_repeated = work.scores or all(worker.gone for worker in workers)
    if can_be_repeated:
        for batch in work.queue:
            tried_ids.difference_update(request.id for request in batch)
    return tried_ids


def combine(
    settings: Settings, packages: Sequence[Package], scores: Iterable[Scores]
) -> dict[str, list[float]]:
    """Combine the packages' scores to probabilities of the competition's verdicts, by id.

    Orders are averaged, then packages by weight, then the temperature is applied. `packages` and
    `scores` are in the order of the settings.
    """
    # For each row, a list of probabilities from every package that scored it, and these packages' weights.
    opinions: dict[str, list[list[float]]] = {}
    weights: dict[str, list[float]] = {}
    for package_settings, package, package_scores in zip(
        settings.packages, packages, scores, strict=True
    ):
        for row_id, values in mean_of_orders(package_scores).items():
            opinion = to_competition(values, package.contract.verdicts, settings.verdicts)
            opinions.setdefault(row_id, []).append(opinion)
            weights.setdefault(row_id, []).append(package_settings.weight)

    combined = {}
    for row_id, values in opinions.items():
        mean = weighted_mean(values, weights[row_id])
        combined[row_id] = soften(mean, settings.temperature)
    return combined
