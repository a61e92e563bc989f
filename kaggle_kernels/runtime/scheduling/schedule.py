"""From packages and rows to scores: one pass after another, each planned when the one before has ended.

main.run_kernel calls `score_all`. Models run one after the other, each on all devices. The first order of the first model
goes over all rows and may use the whole clock: a row with one score is worth more than a second one. What comes then, the
second order and further models, is decided by `plan_next_pass`, with what was measured so far: see plan.py.
"""

import os
import threading
import time
from array import array
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from kaggle_kernels.runtime.models.scoring import Request, make_requests, mean_of_orders, orders_of, spare_tokens_of
from kaggle_kernels.runtime.package import Package, PackageError
from kaggle_kernels.runtime.scheduling.crew import Worker, start_workers, stop_workers
from kaggle_kernels.runtime.scheduling.engine import Pass, make_pass, pass_record, run_pass, worker_record
from kaggle_kernels.runtime.scheduling.plan import (
    CHANGE_OF_MODEL,
    CHANGE_OF_ORDER,
    Option,
    Share,
    allocate,
    flop_per_token,
    loading_seconds,
    measured_change,
)
from kaggle_kernels.runtime.settings import Clock, Settings, log
from kaggle_kernels.runtime.submission import soften, to_competition, weighted_mean

Scores = dict[str, dict[str, list[float]]]  # by id, then by order
Key = tuple[int, str]  # a package's number in the spec, and an order
PADDING = 1.03  # what batches compute beyond their rows' tokens, while nothing is measured
ENCODED_AT_ONCE = 1000


@dataclass(frozen=True)
class Inputs:
    """What is to be scored, by which packages, on which devices (by position) and until when."""

    settings: Settings
    packages: Sequence[Package]
    contracts: Sequence  # the packages', with the spec's token budget
    rows: Sequence[Mapping]
    devices: Mapping[int, str]
    threads: int  # of the CPU, for each worker
    clock: Clock
    hidden_run: bool


@dataclass
class Measurements:
    """What plans are made of."""

    tokens: dict[str, int] = field(default_factory=dict)  # of the first sequence made of a row
    rates: dict[int, float] = field(default_factory=dict)  # tokens a second of a package's workers together
    changes: dict[Key, float] = field(default_factory=dict)  # of a probability (sd), by a pass


@dataclass
class Board:
    """The state of the run: its inputs, how far it is, what was measured, and the records for kernel.json."""

    inputs: Inputs
    scores: list[Scores]  # of each package
    devices: dict[int, str]  # those of the inputs that are not gone
    tried: dict[Key, set[str]] = field(default_factory=dict)  # rows that need not be asked for again, by pass
    given_up: dict[int, set[str]] = field(default_factory=dict)  # rows that a package's workers could not score in one order
    proven: set[int] = field(default_factory=set)  # positions of devices that had a model
    measured: Measurements = field(default_factory=Measurements)
    passes: list[dict] = field(default_factory=list)
    workers: list[dict] = field(default_factory=list)
    plans: list[str] = field(default_factory=list)
    before_seconds: float = 0.0  # passed before the first model was loaded

    def orders(self, number: int) -> tuple[str, ...]:
        """The orders worth scoring with a package."""
        return orders_of(self.inputs.contracts[number], self.inputs.settings.orders)

    def unscored(self, key: Key) -> list[str]:
        """The ids of the rows that a pass has still to score."""
        number, _ = key
        finished = self.tried.get(key, set()) | self.given_up.get(number, set())
        return [row["id"] for row in self.inputs.rows if row["id"] not in finished]

    def probabilities(self, numbers: Sequence[int]) -> dict[str, list[float]]:
        """The probabilities by id that these packages give so far."""
        settings = self.inputs.settings
        of_these = replace(settings, packages=tuple(settings.packages[number] for number in numbers))
        packages = [self.inputs.packages[number] for number in numbers]
        return combine(of_these, packages, [self.scores[number] for number in numbers])

    def by_run(self) -> dict[str, tuple[tuple[str, ...], Scores]]:
        """The verdicts of each run, in the order of its probabilities, and its scores."""
        runs = [served.run for served in self.inputs.settings.packages]
        verdicts = [package.contract.verdicts for package in self.inputs.packages]
        return dict(zip(runs, zip(verdicts, self.scores, strict=True), strict=True))


@dataclass(frozen=True)
class NextPass:
    """A pass to be made now; for None every row is scored that is left, or the pass may last until the clock's deadline."""

    package: int  # its number in the spec
    order: str
    worth: Mapping[str, float] | None = None  # the rows to be scored, with their gain per second
    seconds: float | None = None


def make_board(
    settings: Settings,
    packages: Sequence[Package],
    rows: Sequence[Mapping],
    devices: Sequence[str],
    clock: Clock,
    hidden_run: bool,
) -> Board:
    """A board on which nothing is scored yet. The CPU's cores are shared by as many workers as there are devices."""
    threads = max(len(os.sched_getaffinity(0)) // len(devices), 1)
    contracts = [serving_contract(package, settings) for package in packages]
    inputs = Inputs(settings, packages, contracts, rows, dict(enumerate(devices)), threads, clock, hidden_run)

    no_scores: list[Scores] = [{row["id"]: {} for row in rows} for _ in packages]
    return Board(inputs, no_scores, dict(inputs.devices))


def serving_contract(package: Package, settings: Settings):
    """The package's contract, with the spec's token budget where it names one."""
    if settings.budget_tokens is None:
        return package.contract
    return replace(package.contract, budget_tokens=settings.budget_tokens)


def score_all(board: Board) -> None:
    """Make pass after pass until nothing is left or nothing more fits the clock.

    Raises PackageError where the workers refuse a package. In the hidden run a further package is left out instead, since the
    first one's scores are there.
    """
    clock = board.inputs.clock
    board.before_seconds = clock.elapsed()
    numbers = list(range(len(board.inputs.packages)))
    loaded: int | None = None
    workers: list[Worker] = []
    encoder = Encoder(board.inputs)
    try:
        while next_pass := plan_next_pass(board, numbers, loaded, workers):
            number = next_pass.package
            if number != loaded:
                retire(board, workers)
                workers = start_team(board, number)
                loaded = number
            try:
                if not workers:
                    numbers.remove(number)
                else:
                    make_next_pass(board, next_pass, numbers, workers, encoder)
            except PackageError as error:
                if number == 0 or not board.inputs.hidden_run:
                    raise
                log(clock, f"{board.inputs.packages[number].folder.name}: left out: {error}")
                numbers.remove(number)
    finally:
        retire(board, workers)
        encoder.close()


def plan_next_pass(board: Board, numbers: Sequence[int], loaded: int | None, workers: Sequence[Worker]) -> NextPass | None:
    """Decide what to do next: the first order of all rows, then what a new plan for the seconds that are left begins with.

    `numbers` are the packages that are not left out, `loaded` is the one that the workers have. None where nothing is left,
    nothing more fits the clock, or no worker is alive.
    """
    if not numbers or (workers and all(worker.gone for worker in workers)):
        return None

    first_package = numbers[0]
    first_order = board.orders(first_package)[0]
    if (first_package, first_order) not in board.tried:
        return NextPass(first_package, first_order)

    options = make_options(board, numbers, loaded)
    if not options:
        return None
    seconds_left = board.inputs.clock.left()
    by_log_loss = len(board.inputs.settings.columns) > 1
    shares = allocate(options, board.probabilities(numbers), board.measured.tokens, seconds_left, by_log_loss)
    note_plan(board, shares, seconds_left)

    planned = [share for share in shares if share.worth]
    if not planned:
        return None
    first, *later = planned

    # The pass may last until what is planned after it must begin to load.
    loading = {share.option.package: share.option.load_seconds for share in later}
    loading.pop(first.option.package, None)
    seconds = seconds_left - sum(share.seconds for share in later) - sum(loading.values())

    has_every_row = len(first.worth) == len(first.option.unscored)
    worth = None if has_every_row else first.worth
    return NextPass(first.option.package, first.option.order, worth, seconds)


def make_options(board: Board, numbers: Sequence[int], loaded: int | None) -> list[Option]:
    """Every pass that has rows left, those of the loaded model first."""
    options = []
    for number in sorted(numbers, key=lambda number: number != loaded):
        for order in board.orders(number):
            unscored = board.unscored((number, order))
            if unscored:
                options.append(make_option(board, (number, order), unscored, numbers, is_loaded=number == loaded))
    return options


def make_option(board: Board, key: Key, unscored: list[str], numbers: Sequence[int], is_loaded: bool) -> Option:
    """One more pass with what it should change and take, as measured or else as guessed."""
    number, order = key
    settings, packages, rates = board.inputs.settings, board.inputs.packages, board.measured.rates

    # What it should change. CHANGE_OF_MODEL is that of one of two models of equal weight.
    relative_weight = settings.packages[number].weight / sum(settings.packages[other].weight for other in numbers)
    is_new_model = not any(board.tried.get((number, other)) for other in board.orders(number))
    typical_change = 2 * CHANGE_OF_MODEL if is_new_model else CHANGE_OF_ORDER
    change = board.measured.changes.get(key, typical_change * relative_weight)

    # Before a package has run, its speed follows from that of another one and from the parameters of both.
    rate = rates.get(number, 0.0)
    if rates and not rate:
        measured_number = next(iter(rates))
        rate = rates[measured_number] * flop_per_token(packages[measured_number]) / flop_per_token(packages[number])
    seconds_per_token = PADDING / rate if rate else 0.0

    copies = 1 if settings.packages[number].placement == "split" else len(board.devices)
    load_seconds = 0.0 if is_loaded else loading_seconds(packages[number], copies)
    return Option(number, order, change, seconds_per_token, load_seconds, unscored)


def note_plan(board: Board, shares: Sequence[Share], seconds_left: float) -> None:
    """Log what the plan does with the seconds that are left, and what it leaves; keep the line for kernel.json."""
    parts = []
    for share in shares:
        option = share.option
        name = f"{board.inputs.packages[option.package].folder.name} {option.order}"
        part = f"{name} {len(share.worth)} of {len(option.unscored)} rows in {share.seconds:.1f} s"
        if share.worth and option.load_seconds:
            part += f" and {option.load_seconds:.1f} s to load"
        parts.append(part)
    line = f"{max(seconds_left, 0.0):.1f} s left: {'; '.join(parts)}"
    board.plans.append(line)
    log(board.inputs.clock, f"plan: {line}")


def start_team(board: Board, number: int) -> list[Worker]:
    """Workers for a package on the devices that are not gone; none where a model that is split would lack one of them."""
    inputs = board.inputs
    package = inputs.packages[number]
    served = inputs.settings.packages[number]
    if not board.devices or (served.placement == "split" and len(board.devices) < len(inputs.devices)):
        log(inputs.clock, f"{package.folder.name}: no device is left for it")
        return []
    return start_workers(package, served, board.devices, inputs.settings.tokens_per_batch, inputs.threads, inputs.clock)


def retire(board: Board, workers: list[Worker]) -> None:
    """End the workers and note what they did; devices that are gone leave the board.

    A device that had a model before stays where a worker could not load another one: that may be the package's fault.
    """
    stop_workers(workers)
    for worker in workers:
        if worker.gone and (worker.load_seconds or not board.proven.issuperset(worker.positions)):
            for position in worker.positions:
                board.devices.pop(position, None)
        elif worker.load_seconds:
            board.proven.update(worker.positions)
        board.workers.append(worker_record(worker))
    workers.clear()


def make_next_pass(
    board: Board, next_pass: NextPass, numbers: Sequence[int], workers: list[Worker], encoder: "Encoder"
) -> None:
    """Score the pass's rows, encoded while the workers load or the pass before runs, and note the result on the board."""
    number, order = next_pass.package, next_pass.order
    key = (number, order)
    package, clock = board.inputs.packages[number], board.inputs.clock
    deadline = clock.deadline
    if next_pass.seconds is not None:
        deadline = min(time.monotonic() + next_pass.seconds, deadline)

    ids = set(board.unscored(key) if next_pass.worth is None else next_pass.worth)
    rows = [row for row in board.inputs.rows if row["id"] in ids]
    requests = encoder.requests(number, order, rows)
    if not board.measured.tokens:
        board.measured.tokens = {request.id: request.tokens for request in requests}
    for other in board.orders(number):
        if (number, other) not in board.tried and other != order:
            encoder.begin(number, other, rows)

    before = board.probabilities(numbers)
    work = make_pass(f"{package.folder.name}, {order}", requests, deadline, workers, next_pass.worth)
    work = run_pass(work, workers, clock)
    note_pass(board, key, work, requests, workers)

    # Devices that had a model before are not to blame where this one could not be loaded on any.
    if all(worker.gone and not worker.load_seconds and board.proven.issuperset(worker.positions) for worker in workers):
        raise PackageError(f"{package.folder}: no device could load it, and another model ran on all of them")
    if change := measured_change(before, board.probabilities(numbers)):
        board.measured.changes[key] = change


def note_pass(board: Board, key: Key, work: Pass, requests: Sequence[Request], workers: Sequence[Worker]) -> None:
    """Put a pass's scores on the board, and what was measured."""
    number, order = key
    board.given_up.setdefault(number, set()).update(work.given_up)
    for row_id, values in work.scores.items():
        board.scores[number][row_id][order] = values

    # Rows that the pass left are tried again, but not where nothing came of any: they would be asked for for ever.
    finished = {request.id for request in requests}
    if work.scores or all(worker.gone for worker in workers):
        finished -= {request.id for batch in work.queue for request in batch}
    board.tried.setdefault(key, set()).update(finished)

    if rate := sum(worker.rate() for worker in workers if not worker.gone):
        board.measured.rates[number] = rate
    board.passes.append({"run": board.inputs.settings.packages[number].run, "order": order, **pass_record(work)})


class Encoder:
    """Rows made into requests, what is needed next in a thread of its own while the workers score.

    A tokenizer is for one thread at a time: model_input switches its control tokens off while it encodes what users wrote,
    and another thread would then encode the template as plain text.
    """

    def __init__(self, inputs: Inputs):
        self.inputs, self.pool, self.closing = inputs, ThreadPoolExecutor(1), threading.Event()
        self.ahead: dict[Key, Future] = {}
        self.tokenizers = [threading.Lock() for _ in inputs.packages]

    def begin(self, number: int, order: str, rows: Sequence[Mapping]) -> None:
        """Encode rows that are likely to be asked for."""
        if (number, order) not in self.ahead:
            self.ahead[number, order] = self.pool.submit(self.encode, number, order, rows)

    def requests(self, number: int, order: str, rows: Sequence[Mapping]) -> list[Request]:
        """The rows' requests, in the rows' order."""
        begun = self.ahead.get((number, order))
        by_id = {request.id: request for request in (begun.result() if begun else ())}
        missing = [row for row in rows if row["id"] not in by_id]
        if missing:
            by_id |= {request.id: request for request in self.encode(number, order, missing)}
        return [by_id[row["id"]] for row in rows]

    def encode(self, number: int, order: str, rows: Sequence[Mapping]) -> list[Request]:
        """By the package's own model_input; token ids in four bytes each, since there are millions of them."""
        began, encoded = time.monotonic(), []
        package, contract = self.inputs.packages[number], self.inputs.contracts[number]
        for start in range(0, len(rows), ENCODED_AT_ONCE):
            if self.closing.is_set():
                return encoded
            pairs = [package.model_input.pair_from_row(row) for row in rows[start : start + ENCODED_AT_ONCE]]
            with self.tokenizers[number]:
                requests = make_requests(
                    package.model_input, package.tokenizer, contract, pairs, (order,), spare_tokens_of(package.manifest)
                )
            for request in requests:
                encoded.append(replace(request, sequences=tuple(array("i", ids) for ids in request.sequences)))
        tokens, seconds = sum(request.tokens for request in encoded), time.monotonic() - began
        name = f"{package.folder.name}, {order}"
        log(self.inputs.clock, f"{name}: {len(encoded)} rows encoded, {tokens} tokens in {seconds:.1f} s")
        return encoded

    def close(self) -> None:
        """Stop, after the rows that are being encoded: ENCODED_AT_ONCE at most."""
        self.closing.set()
        self.pool.shutdown(cancel_futures=True)


def combine(settings: Settings, packages: Sequence[Package], per_package: Sequence[Scores]) -> dict[str, list[float]]:
    """Probabilities of the competition's verdicts by id: orders averaged, then packages by weight, then the temperature."""
    opinions: dict[str, list[list[float]]] = {}
    weights: dict[str, list[float]] = {}
    for served, package, scores in zip(settings.packages, packages, per_package, strict=True):
        for row_id, values in mean_of_orders(scores).items():
            opinion = to_competition(values, package.contract.verdicts, settings.verdicts)
            opinions.setdefault(row_id, []).append(opinion)
            weights.setdefault(row_id, []).append(served.weight)
    return {row_id: soften(weighted_mean(values, weights[row_id]), settings.temperature) for row_id, values in opinions.items()}
