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
    Request,
    make_requests,
    mean_of_orders,
    orders_of,
    spare_tokens_of,
)
from kaggle_kernels.runtime.package import Package, PackageError
from kaggle_kernels.runtime.scheduling.pass_runner import Pass, make_pass, pass_record, run_pass
from kaggle_kernels.runtime.scheduling.plan import (
    CHANGE_OF_MODEL,
    CHANGE_OF_ORDER,
    Option,
    Share,
    allocate,
    flop_per_token,
    loading_seconds,
)
from kaggle_kernels.runtime.scheduling.worker_handle import Worker, start_workers
from kaggle_kernels.runtime.settings import Clock, Settings, log
from kaggle_kernels.runtime.submission import soften, to_competition, weighted_mean

Scores = dict[str, dict[str, list[float]]]  # by id, then by order
Key = tuple[int, str]  # a package's number in the spec, and an order
PADDING = 1.03  # what batches compute beyond their rows' tokens, while nothing is measured
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
    hidden_run: bool


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
class Board:
    """The state of the run."""

    inputs: Inputs
    progress: Progress
    measured: Measurements

    def orders(self, number: int) -> tuple[str, ...]:
        """List the orders worth scoring with a package."""
        return orders_of(self.inputs.contracts[number], self.inputs.settings.orders)

    def unscored(self, key: Key, group: Sequence[str]) -> list[str]:
        """List those rows of a group that a pass has still to score."""
        tried = self.progress.tried.get(key, set())
        return [row_id for row_id in group if row_id not in tried]

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


def make_board(
    settings: Settings,
    packages: Sequence[Package],
    rows: Sequence[Mapping],
    devices: Sequence[str],
    clock: Clock,
    hidden_run: bool,
) -> Board:
    """Make a board on which nothing is scored yet. The devices share the CPU's cores evenly."""
    counting: list[str] = []
    others: list[str] = []
    for row in rows:
        group = counting if row["counts"] else others
        group.append(row["id"])

    # A spec may have another token budget than training.
    contracts = [package.contract for package in packages]
    if settings.budget_tokens is not None:
        budget_tokens = settings.budget_tokens
        contracts = [replace(contract, budget_tokens=budget_tokens) for contract in contracts]

    threads = max(len(os.sched_getaffinity(0)) // len(devices), 1)
    inputs = Inputs(
        settings=settings,
        packages=packages,
        contracts=contracts,
        rows=rows,
        row_groups=[group for group in (counting, others) if group],
        devices=dict(enumerate(devices)),
        threads=threads,
        clock=clock,
        hidden_run=hidden_run,
    )

    progress = Progress(
        scores=[{row["id"]: {} for row in rows} for _ in packages],
        packages=list(range(len(packages))),
        devices=dict(inputs.devices),
    )
    return Board(inputs, progress, Measurements())


def score_all(board: Board) -> None:
    """Make pass after pass until nothing is left or nothing more fits the clock.

    In the hidden run a package that fails is left out while another one works.

    Raises:
        PackageError: The workers refuse a package: it scores other than when it was packaged.
        LoadError: No device could load a package.
    """
    loaded: int | None = None
    workers: list[Worker] = []
    try:
        while next_pass := plan_next_pass(board, loaded, workers):
            try:
                # Two models do not fit one GPU: the old one goes before the new one comes.
                if next_pass.package != loaded:
                    retire(board, workers)
                    workers = start_team(board, next_pass.package)
                    loaded = next_pass.package
                score_pass(board, next_pass, workers)
            except (PackageError, LoadError) as error:
                retire(board, workers)
                loaded = None
                leave_out(board, next_pass.package, error)
    finally:
        retire(board, workers)


def leave_out(board: Board, number: int, error: Exception) -> None:
    """Go on without a package; in the visible run, or where no package has worked, raise its error."""
    board.progress.packages.remove(number)
    another_works = bool(board.progress.packages or board.progress.passes)
    if not board.inputs.hidden_run or not another_works:
        raise error
    log(board.inputs.clock, f"{board.inputs.packages[number].folder.name}: left out: {error}")


def plan_next_pass(board: Board, loaded: int | None, workers: Sequence[Worker]) -> NextPass | None:
    """Decide what to do next: rows that count come first, the others get what time is left.

    Args:
        board: The state of the run.
        loaded: The number of the package that the workers have; None: none.
        workers: The workers of that package.

    Returns:
        None where nothing is left, nothing more fits the clock, or no worker is alive.
    """
    # Workers are gone for good once they died too often; no plan brings them back.
    all_gone = bool(workers) and all(worker.gone for worker in workers)
    if all_gone:
        log(board.inputs.clock, "no device is left; rows without a score get the prior")
    if all_gone or not board.progress.packages or board.inputs.clock.left() <= 0:
        return None

    # Nothing of the others before all of those that count.
    for group in board.inputs.row_groups:
        # The first pass measures the tokens of all its rows: one row shows whether it was made.
        if group[0] in board.measured.tokens:
            next_pass = plan_further_pass(board, group, loaded)
        else:
            next_pass = plan_first_pass(board, group, loaded)
        if next_pass is not None:
            return next_pass
    return None


def plan_first_pass(board: Board, group: Sequence[str], loaded: int | None) -> NextPass:
    """Plan one order of all rows of a group, with the model that is there or the spec's first."""
    packages = board.progress.packages
    number = loaded if loaded in packages else packages[0]
    order = board.orders(number)[0]
    return NextPass(number, order, frozenset(group), board.inputs.clock.deadline)


def plan_further_pass(board: Board, group: Sequence[str], loaded: int | None) -> NextPass | None:
    """Share the time that is left among all passes that a group could still have; take the first.

    Returns:
        None where no row is left, or the clock allows none.
    """
    options = make_options(board, group, loaded)
    if not options:
        return None
    clock, metric = board.inputs.clock, board.inputs.settings.metric
    tokens = board.measured.tokens
    shares = allocate(options, board.probabilities(), tokens, clock.left(), metric)
    log_plan(board, shares)

    # An option without rows gets no time.
    planned = [share for share in shares if share.row_ids]
    if not planned:
        return None
    first, *later = planned

    # The pass must leave the time for those planned after it.
    package = first.option.package
    deadline = clock.deadline - count_seconds(later, package)
    return NextPass(package, first.option.order, frozenset(first.row_ids), deadline)


def count_seconds(shares: Sequence[Share], loaded: int) -> float:
    """Count the seconds of shares: their scoring, and loading each package but the loaded one once."""
    seconds = 0.0
    loaded_packages = {loaded}
    for share in shares:
        seconds += share.seconds
        if share.option.package not in loaded_packages:
            loaded_packages.add(share.option.package)
            seconds += share.option.load_seconds
    return seconds


def make_options(board: Board, group: Sequence[str], loaded: int | None) -> list[Option]:
    """List every pass that has rows of the group left, those of the loaded model first."""
    # Loading takes long: the model that is there comes first.
    packages = sorted(board.progress.packages, key=lambda number: number != loaded)
    options = []
    for number in packages:
        for order in board.orders(number):
            unscored = board.unscored((number, order), group)
            if unscored:
                option = make_option(board, (number, order), unscored, is_loaded=number == loaded)
                options.append(option)
    return options


def make_option(board: Board, key: Key, unscored: list[str], is_loaded: bool) -> Option:
    """Describe a pass by what it should change, and by the seconds that it should take."""
    number, order = key
    settings, packages = board.inputs.settings, board.inputs.packages
    progress, measured = board.progress, board.measured

    # What it should change. CHANGE_OF_MODEL is that of one of two models of equal weight.
    total_weight = sum(settings.packages[other].weight for other in progress.packages)
    relative_weight = settings.packages[number].weight / total_weight
    is_new_model = not any(progress.tried.get((number, other)) for other in board.orders(number))
    typical_change = 2 * CHANGE_OF_MODEL if is_new_model else CHANGE_OF_ORDER
    change = typical_change * relative_weight

    # Before a package has run, its speed follows from another one's and the parameters of both.
    rate = measured.rates.get(number, 0.0)
    if measured.rates and not rate:
        other, other_rate = next(iter(measured.rates.items()))
        rate = other_rate * flop_per_token(packages[other]) / flop_per_token(packages[number])
    seconds_per_token = PADDING / rate if rate else 0.0

    # All devices load from one disk, so that further copies take time as well.
    copies = len(progress.devices)
    if settings.packages[number].placement == "split":
        copies = 1
    load_seconds = 0.0
    if not is_loaded:
        load_seconds = loading_seconds(packages[number], copies)
    return Option(number, order, change, seconds_per_token, load_seconds, unscored)


def log_plan(board: Board, shares: Sequence[Share]) -> None:
    """Log what a plan does with the seconds that are left."""
    parts = []
    for share in shares:
        name = f"{board.inputs.packages[share.option.package].folder.name} {share.option.order}"
        rows = f"{len(share.row_ids)} of {len(share.option.unscored)} rows"
        parts.append(f"{name} {rows} in {share.seconds:.1f} s")
    clock = board.inputs.clock
    log(clock, f"plan: {clock.left():.1f} s left: {'; '.join(parts)}")


def start_team(board: Board, number: int) -> list[Worker]:
    """Start workers for a package on the devices that are not gone.

    Raises:
        LoadError: No device is left, or a model that is split would lack one of them.
    """
    inputs, devices = board.inputs, board.progress.devices
    package, settings = inputs.packages[number], inputs.settings
    package_settings = settings.packages[number]

    # The layers of a split model were placed for all of the devices.
    is_incomplete = package_settings.placement == "split" and len(devices) < len(inputs.devices)
    if not devices or is_incomplete:
        raise LoadError(f"{package.folder}: no device is left for it")
    return start_workers(
        package, package_settings, devices, settings.tokens_per_batch, inputs.threads, inputs.clock
    )


def retire(board: Board, workers: list[Worker]) -> None:
    """End the workers; devices that are gone leave the board.

    Where no worker could load the package, that is the package's fault and the devices stay.
    """
    any_loaded = any(worker.load_seconds for worker in workers)
    for worker in workers:
        worker.stop()
        if worker.gone and any_loaded:
            for position in worker.positions:
                board.progress.devices.pop(position, None)
    workers.clear()


def score_pass(board: Board, next_pass: NextPass, workers: Sequence[Worker]) -> None:
    """Score the rows of a pass and note the result on the board.

    Raises:
        PackageError: The last worker that is left refuses the package.
        LoadError: No worker could load it.
    """
    number, order = next_pass.package, next_pass.order
    package, clock = board.inputs.packages[number], board.inputs.clock
    label = f"{package.folder.name}, {order}"

    # The rows of the first pass are encoded here while the workers load.
    requests = encode_rows(board.inputs, next_pass)
    tokens = sum(request.tokens for request in requests)
    log(clock, f"{label}: {len(requests)} rows encoded, {tokens} tokens")

    work = make_pass(label, requests, next_pass.deadline, workers)
    work = run_pass(work, workers, clock)
    if all(worker.gone and not worker.load_seconds for worker in workers):
        raise LoadError(f"{package.folder}: no device could load it")
    note_pass(board, (number, order), work, requests, workers)


def encode_rows(inputs: Inputs, next_pass: NextPass) -> list[Request]:
    """Encode the rows of a pass by the package's own model_input."""
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
            spare_tokens_of(package.manifest),
        )

        # Four bytes for each token id, since there are millions of them.
        for request in requests:
            sequences = tuple(array("i", ids) for ids in request.sequences)
            encoded.append(replace(request, sequences=sequences))
    return encoded


def note_pass(
    board: Board, key: Key, work: Pass, requests: Sequence[Request], workers: Sequence[Worker]
) -> None:
    """Put a pass's scores on the board, and what was measured."""
    number, order = key
    progress, measured = board.progress, board.measured
    for row_id, values in work.scores.items():
        progress.scores[number][row_id][order] = values

    # Rows that the pass left are tried again, unless nothing came of any: that would never end.
    finished = {request.id for request in requests}
    if work.scores or all(worker.gone for worker in workers):
        for batch in work.queue:
            finished.difference_update(request.id for request in batch)
    progress.tried.setdefault(key, set()).update(finished)

    # What ends workers in one order would do so in the other.
    for any_order in board.orders(number):
        progress.tried.setdefault((number, any_order), set()).update(work.given_up)

    for request in requests:
        measured.tokens.setdefault(request.id, request.tokens)
    rate = sum(worker.rate() for worker in workers if not worker.gone)
    if rate:
        measured.rates[number] = rate

    # kernel.json keeps a record of every pass.
    run = board.inputs.settings.packages[number].run
    progress.passes.append({"run": run, "order": order, **pass_record(work)})


def combine(
    settings: Settings, packages: Sequence[Package], scores: Iterable[Scores]
) -> dict[str, list[float]]:
    """Combine the packages' scores to probabilities of the competition's verdicts, by id.

    Orders are averaged, then packages by weight, then the temperature is applied.

    Args:
        settings: Has the packages' weights and the temperature.
        packages: In the order of the settings.
        scores: Of each package.
    """
    # A row has as many opinions as packages have scored it.
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
