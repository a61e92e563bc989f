"""From packages and rows to scores: passes one after the other, each planned when the one before has ended.

The first order of the first model goes over all rows and may use the whole clock: a row with one score is worth more than a
second one. What comes then is up to plan.allocate, again after each pass, with what was measured so far.
"""

import os
import threading
import time
from array import array
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from kaggle_kernels.runtime.models.scoring import Request, make_requests, mean_of_orders, orders_of
from kaggle_kernels.runtime.package import Package, PackageError
from kaggle_kernels.runtime.scheduling.crew import Worker, start_workers, stop_workers
from kaggle_kernels.runtime.scheduling.engine import (
    Pass,
    make_pass,
    pass_record,
    run_pass,
    worker_record,
)
from kaggle_kernels.runtime.scheduling.plan import (
    CHANGE_OF_MODEL,
    CHANGE_OF_ORDER,
    Option,
    Share,
    allocate,
    flop_per_token,
    job_of,
    loading_seconds,
    make_plan,
    measured_change,
    share_devices,
)
from kaggle_kernels.runtime.settings import Clock, Settings, log
from kaggle_kernels.runtime.submission import soften, to_competition, weighted_mean

Scores = dict[str, dict[str, list[float]]]  # by id, then by order
PADDING = 1.03  # what batches compute beyond their rows' tokens, while nothing is measured
ENCODED_AT_ONCE = 1000


@dataclass
class Board:
    """All that is known while the kernel scores: scores of each package, what was tried, and what was measured."""

    settings: Settings
    packages: Sequence[Package]
    contracts: list  # the packages', with the spec's token budget
    rows: Sequence[Mapping]
    clock: Clock
    hidden_run: bool
    scores: list[Scores]
    devices: dict[int, str]  # by position; those that are gone leave
    threads: int
    tried: dict[tuple[int, str], set[str]] = field(default_factory=dict)
    proven: set[int] = field(default_factory=set)  # positions of devices that had a model
    given_up: dict[int, set[str]] = field(default_factory=dict)  # rows that a package's workers could not score in one order
    tokens: dict[str, int] = field(default_factory=dict)  # of the first sequence made of a row
    rates: dict[int, float] = field(default_factory=dict)  # tokens a second of a package's workers together
    changes: dict[tuple[int, str], float] = field(default_factory=dict)
    passes: list[dict] = field(default_factory=list)
    workers: list[dict] = field(default_factory=list)
    plans: list[str] = field(default_factory=list)
    before_seconds: float = 0.0  # passed before the first model was loaded

    def orders(self, number: int) -> tuple[str, ...]:
        """The orders worth scoring with a package."""
        return orders_of(self.contracts[number], self.settings.orders)

    def untouchable(self, key: tuple[int, str]) -> set[str]:
        """The rows that a package is not to score in an order any more."""
        return self.tried.get(key, set()) | self.given_up.get(key[0], set())

    def known(self, numbers: Sequence[int]) -> dict[str, list[float]]:
        """The probabilities by id that these packages give so far."""
        chosen = replace(self.settings, packages=tuple(self.settings.packages[number] for number in numbers))
        return combine(chosen, [self.packages[number] for number in numbers], [self.scores[number] for number in numbers])

    def by_run(self) -> dict[str, tuple[tuple[str, ...], Scores]]:
        """The verdicts of each run, in the order of its probabilities, and its scores."""
        return {
            chosen.run: (package.contract.verdicts, scores)
            for chosen, package, scores in zip(self.settings.packages, self.packages, self.scores, strict=True)
        }


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
    empty: list[Scores] = [{row["id"]: {} for row in rows} for _ in packages]
    return Board(settings, packages, contracts, rows, clock, hidden_run, empty, dict(enumerate(devices)), threads)


def serving_contract(package: Package, settings: Settings):
    """The package's contract, with the spec's token budget where it names one."""
    if settings.budget_tokens is None:
        return package.contract
    return replace(package.contract, budget_tokens=settings.budget_tokens)


def score_all(board: Board) -> None:
    """Score as much as the clock allows; several packages in turn or side by side, as planned, and in the end what was left."""
    numbers = list(range(len(board.packages)))
    board.before_seconds = board.clock.elapsed()
    if len(numbers) > 1 and len(board.devices) > 1:
        jobs = [
            job_of(package, contract, make_pairs(package, board.rows), board.settings.orders)
            for package, contract in zip(board.packages, board.contracts, strict=True)
        ]
        can_part = all(chosen.placement == "each" for chosen in board.settings.packages)
        plan = make_plan(jobs, can_part, list(board.devices.values()), board.clock.left())
        note_plan(board, plan.why)
        if plan.side_by_side:
            shares = [dict(share) for share in share_devices(list(board.devices.items()), len(numbers))]
            with ThreadPoolExecutor(len(numbers)) as pool:
                list(pool.map(lambda number: score_in_turn(board, [number], shares[number]), numbers))
    score_in_turn(board, numbers, dict(board.devices))


def score_in_turn(board: Board, numbers: list[int], devices: Mapping[int, str]) -> None:
    """Pass after pass with the packages `numbers` on `devices`, until nothing is left or nothing more fits the clock.

    A package that its workers refuse raises PackageError; in the hidden run a further one is left out instead, since the first
    one's scores are there.
    """
    numbers, workers, loaded, encoder = list(numbers), [], None, Encoder(board)
    try:
        while share := next_share(board, numbers, loaded, workers):
            number = share.option.package
            if number != loaded:
                retire(board, workers)
                loaded, workers = number, start_team(board, number, devices)
            try:
                if not workers:
                    numbers.remove(number)
                else:
                    run_share(board, share, numbers, workers, encoder)
            except PackageError as error:
                if number == 0 or not board.hidden_run:
                    raise
                log(board.clock, f"{board.packages[number].folder.name}: left out: {error}")
                numbers.remove(number)
    finally:
        retire(board, workers)
        encoder.close()


def start_team(board: Board, number: int, devices: Mapping[int, str]) -> list[Worker]:
    """Workers for a package on the devices that are not gone."""
    left = {position: device for position, device in devices.items() if position in board.devices}
    placement = board.settings.packages[number].placement
    if not left or (placement == "split" and len(left) < len(devices)):
        log(board.clock, f"{board.packages[number].folder.name}: no device is left for it")
        return []
    tokens_per_batch = board.settings.tokens_per_batch
    return start_workers(board.packages[number], placement, left, tokens_per_batch, board.threads, board.clock)


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


def next_share(board: Board, numbers: Sequence[int], loaded: int | None, workers: Sequence[Worker]) -> Share | None:
    """What to do next: the first order of all rows, then the first share of a plan for what is left; None: nothing more."""
    if not numbers or (workers and all(worker.gone for worker in workers)):
        return None
    first = (numbers[0], board.orders(numbers[0])[0])
    if first not in board.tried:
        return Share(Option(*first, change=1.0, seconds_per_token=0.0), {}, 0.0)
    keys = [(n, order) for n in numbers for order in board.orders(n)]
    keys.sort(key=lambda key: key[0] != loaded)
    known, unscored, options = board.known(numbers), [], []
    for key in keys:
        left = [row["id"] for row in board.rows if row["id"] not in board.untouchable(key)]
        if left:
            unscored.append(left)
            options.append(make_option(board, key, numbers, loaded))
    seconds = board.clock.left()
    shares = allocate(options, unscored, known, board.tokens, seconds, len(board.settings.columns) > 1)
    chosen = [share for share in shares if share.worth]
    if options:
        note_plan(board, plan_sentence(board, shares, unscored, seconds))
    if not chosen:
        return None
    share, *later = chosen
    whole = len(share.worth) == len(unscored[shares.index(share)])
    loading = {each.option.package: each.option.load_seconds for each in later if each.option.package != share.option.package}
    slack = seconds - sum(each.seconds for each in later) - sum(loading.values())
    return Share(share.option, {} if whole else share.worth, slack)


def make_option(board: Board, key: tuple[int, str], numbers: Sequence[int], loaded: int | None) -> Option:
    """One more pass with what it should change and take, as measured or else as guessed."""
    number, order = key
    weights = [board.settings.packages[n].weight for n in numbers]
    weight = board.settings.packages[number].weight
    is_new = not any(board.tried.get((number, other)) for other in board.orders(number))
    guess = CHANGE_OF_MODEL * weight / sum(weights) * 2 if is_new else CHANGE_OF_ORDER * weight / sum(weights)
    known, rate = next(iter(board.rates.items()), (number, 0.0))
    rate = board.rates.get(number) or rate * flop_per_token(board.packages[known]) / flop_per_token(board.packages[number])
    copies = 1 if board.settings.packages[number].placement == "split" else len(board.devices)
    load = 0.0 if number == loaded else loading_seconds(board.packages[number], copies)
    return Option(number, order, board.changes.get(key, guess), PADDING / rate if rate else 0.0, load)


def plan_sentence(board: Board, shares: Sequence[Share], unscored: Sequence[Sequence[str]], seconds: float) -> str:
    """What the plan does with the seconds that are left, and what it leaves."""
    told = []
    for share, left in zip(shares, unscored, strict=True):
        name = f"{board.packages[share.option.package].folder.name} {share.option.order}"
        loading = f" and {share.option.load_seconds:.1f} s to load" if share.worth and share.option.load_seconds else ""
        told.append(f"{name} {len(share.worth)} of {len(left)} rows in {share.seconds:.1f} s{loading}")
    return f"{max(seconds, 0.0):.1f} s left: {'; '.join(told)}"


def note_plan(board: Board, sentence: str) -> None:
    """Log a plan and keep it for kernel.json."""
    board.plans.append(sentence)
    log(board.clock, f"plan: {sentence}")


def run_share(board: Board, share: Share, numbers: Sequence[int], workers: list[Worker], encoder: "Encoder") -> None:
    """One pass: its rows encoded while the workers load or the pass before runs, scored, and noted on the board."""
    number, order = key = share.option.package, share.option.order
    clock = board.clock
    deadline = min(time.monotonic() + share.seconds, clock.deadline) if share.seconds else clock.deadline
    done = board.untouchable(key)
    rows = [row for row in board.rows if (row["id"] in share.worth if share.worth else row["id"] not in done)]
    requests = encoder.requests(number, order, rows)
    if not board.tokens:
        board.tokens = {request.id: request.tokens for request in requests}
    for other in board.orders(number):
        if (number, other) not in board.tried and other != order:
            encoder.begin(number, other, rows)
    label = f"{board.packages[number].folder.name}, {order}"
    before = board.known(numbers)
    work = run_pass(make_pass(label, requests, deadline, workers, share.worth or None), workers, clock)
    note_pass(board, key, work, requests, workers)
    if all(worker.gone and not worker.load_seconds and board.proven.issuperset(worker.positions) for worker in workers):
        raise PackageError(f"{board.packages[number].folder}: no device could load it, and another model ran on all of them")
    if change := measured_change(before, board.known(numbers)):
        board.changes[key] = change


def note_pass(board: Board, key: tuple[int, str], done: Pass, requests: Sequence[Request], workers: Sequence[Worker]) -> None:
    """Put a pass's scores on the board, and what was measured."""
    number, order = key
    board.given_up.setdefault(number, set()).update(done.given_up)
    for row_id, values in done.scores.items():
        board.scores[number][row_id][order] = values
    in_queue = {request.id for batch in done.queue for request in batch}
    asked = {request.id for request in requests}
    may_go_on = done.scores or all(worker.gone for worker in workers)  # else the same rows would be asked for again and again
    board.tried.setdefault(key, set()).update(asked - in_queue if may_go_on else asked)
    if rate := sum(worker.rate() for worker in workers if not worker.gone):
        board.rates[number] = rate
    board.passes.append({"run": board.settings.packages[number].run, "order": order, **pass_record(done)})


class Encoder:
    """Rows made into requests, what is needed next in a thread of its own while the workers score.

    A tokenizer is for one thread at a time: model_input switches its control tokens off while it encodes what users wrote,
    and another thread would then encode the template as plain text.
    """

    def __init__(self, board: Board):
        self.board, self.pool, self.closing = board, ThreadPoolExecutor(1), threading.Event()
        self.ahead: dict[tuple[int, str], Future] = {}
        self.tokenizers = [threading.Lock() for _ in board.packages]

    def begin(self, number: int, order: str, rows: Sequence[Mapping]) -> None:
        """Encode rows that are likely to be asked for."""
        if (number, order) not in self.ahead:
            self.ahead[number, order] = self.pool.submit(self.encode, number, order, rows)

    def requests(self, number: int, order: str, rows: Sequence[Mapping]) -> list[Request]:
        """The rows' requests, in the rows' order."""
        begun = self.ahead.get((number, order))
        found = {request.id: request for request in (begun.result() if begun else ())}
        missing = [row for row in rows if row["id"] not in found]
        found |= {request.id: request for request in (self.encode(number, order, missing) if missing else ())}
        return [found[row["id"]] for row in rows]

    def encode(self, number: int, order: str, rows: Sequence[Mapping]) -> list[Request]:
        """By the package's own model_input; token ids in four bytes each, since there are millions of them."""
        board, began, made = self.board, time.monotonic(), []
        package = board.packages[number]
        for start in range(0, len(rows), ENCODED_AT_ONCE):
            if self.closing.is_set():
                return made
            pairs = make_pairs(package, rows[start : start + ENCODED_AT_ONCE])
            with self.tokenizers[number]:
                found = make_requests(package.model_input, package.tokenizer, board.contracts[number], pairs, (order,))
            made += [replace(request, sequences=tuple(array("i", ids) for ids in request.sequences)) for request in found]
        tokens, seconds = sum(request.tokens for request in made), time.monotonic() - began
        log(board.clock, f"{package.folder.name}, {order}: {len(made)} rows encoded, {tokens} tokens in {seconds:.1f} s")
        return made

    def close(self) -> None:
        """Stop, after the rows that are being encoded: ENCODED_AT_ONCE at most."""
        self.closing.set()
        self.pool.shutdown(cancel_futures=True)


def make_pairs(package: Package, rows: Iterable[Mapping]) -> list:
    """The rows as pairs of the package's own model_input."""
    return [package.model_input.pair_from_row(row) for row in rows]


def combine(settings: Settings, packages: Sequence[Package], per_package: Sequence[Scores]) -> dict[str, list[float]]:
    """Probabilities of the competition's verdicts by id: orders averaged, then packages by weight, then the temperature."""
    by_id: dict[str, list[tuple[float, list[float]]]] = {}
    for chosen, package, scores in zip(settings.packages, packages, per_package, strict=True):
        for row_id, values in mean_of_orders(scores).items():
            told = to_competition(values, package.contract.verdicts, settings.verdicts)
            by_id.setdefault(row_id, []).append((chosen.weight, told))
    return {
        row_id: soften(weighted_mean([values for _, values in found], [weight for weight, _ in found]), settings.temperature)
        for row_id, found in by_id.items()
    }
