"""One order of one package: batches dealt to workers until none is left or the deadline is near.

schedule.make_next_pass calls `make_pass` and `run_pass`. What can happen to a batch on its way:
    out of memory      its worker's token budget is halved, and the batch cut and tried again
                       (`return_large_batch`)
    its worker dies    the worker is started again, or given up with its device; its rows go back to
                       the queue, those that it was scoring one by one at the end, in case that one
                       of them killed it (`handle_worker_death`)
    its worker hangs   the worker is killed, which is a death like others (`check_is_alive`)
    the clock ends     the batch stays in the queue (`next_batch`)
A row without a score is simply not in the result, and the caller decides what that means.
"""

import math
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait

from kaggle_kernels.runtime.models.scoring import (
    BatchScores,
    Request,
    make_batches,
    padded_tokens,
)
from kaggle_kernels.runtime.package import PackageError
from kaggle_kernels.runtime.scheduling.worker_handle import Worker
from kaggle_kernels.runtime.settings import Clock, log

GIVEN_UP_AFTER = 3  # deaths of the worker that was scoring a row, the last two with that row alone
PATIENCE = 20.0  # times what a batch should take, but at least QUIET_SECONDS: then a worker hangs
QUIET_SECONDS = 120.0
LOAD_PATIENCE_SECONDS = 1800.0
BLOCKS = 8  # where rows are scored by their gains, an eighth at a time is batched by length
LOGGED_SHARE = 0.2  # of a pass's rows: progress is logged whenever so many more are scored


@dataclass
class Pass:
    """The queue of batches and the probabilities by id, and what there is to tell of both."""

    label: str
    queue: deque[list[Request]]
    deadline: float
    may_reorder: bool  # a clock too short for the queue then takes short rows first: more of them
    rows: int
    began: float | None = None
    scores: dict[str, list[float]] = field(default_factory=dict)
    tokens: int = 0
    computed_tokens: int = 0
    out_of_memory: int = 0
    overflowed: int = 0  # rows that were computed again in float32
    not_finite: int = 0
    given_up: list[str] = field(default_factory=list)
    deaths: dict[str, int] = field(default_factory=dict)  # by worker
    suspected: Counter = field(default_factory=Counter)  # deaths by row
    # By row, alone in its batch: the workers that lack the memory for it.
    too_large: dict[str, set[str]] = field(default_factory=dict)
    logged_at: float = field(default_factory=time.monotonic)
    logged_rows: int = 0
    queued_tokens: int = 0  # of the queue, padding included

    def __post_init__(self):
        self.queued_tokens = sum(map(padded_tokens, self.queue))

    def take(self, from_end: bool) -> list[Request]:
        """Take the queue's first or last batch."""
        batch = self.queue.pop() if from_end else self.queue.popleft()
        self.queued_tokens -= padded_tokens(batch)
        return batch

    def put_first(self, batches: Sequence[list[Request]]) -> None:
        """Put batches before all others, in their order."""
        self.queue.extendleft(reversed(batches))
        self.queued_tokens += sum(map(padded_tokens, batches))

    def put_last(self, batches: Sequence[list[Request]]) -> None:
        """Put batches after all others, in their order."""
        self.queue.extend(batches)
        self.queued_tokens += sum(map(padded_tokens, batches))

    def seconds_left(self, workers: Sequence[Worker]) -> float:
        """Predict how long the living workers need for the queue; 0 before their first batch."""
        rate = sum(worker.rate() for worker in workers if not worker.gone)
        if not rate:
            return 0.0
        return self.queued_tokens / rate

    def seconds(self) -> float:
        """Return the seconds since its first batch was sent: loading a model does not count."""
        if self.began is None:
            return 1e-9
        return max(time.monotonic() - self.began, 1e-9)


def make_pass(
    label: str,
    requests: Sequence[Request],
    deadline: float,
    workers: Sequence[Worker],
    gains: Mapping[str, float] | None = None,
) -> Pass:
    """Make a pass over rows.

    Args:
        label: Names it in the log.
        requests: The rows.
        deadline: When its last batch must end, as time.monotonic gives seconds.
        workers: Those that will do it.
        gains: By row: what matters most comes first. None: rows are taken by length.
    """
    tokens_per_batch = max(worker.tokens_per_batch for worker in workers)
    if gains is None:
        batches = make_batches(requests, tokens_per_batch)
        return Pass(label, deque(batches), deadline, may_reorder=True, rows=len(requests))

    # Batches of one length waste no padding, but rows of high gain must come early: a compromise.
    by_gain = sorted(requests, key=lambda request: -gains[request.id])
    block_size = max(math.ceil(len(requests) / BLOCKS), 1)
    batches = []
    for start in range(0, len(by_gain), block_size):
        block = by_gain[start : start + block_size]
        batches += make_batches(block, tokens_per_batch)
    return Pass(label, deque(batches), deadline, may_reorder=False, rows=len(requests))


def run_pass(work: Pass, workers: Sequence[Worker], clock: Clock) -> Pass:
    """Work through the queue; PackageError where the last worker refuses the package."""
    batches = "1 batch" if len(work.queue) == 1 else f"{len(work.queue)} batches"
    log(clock, f"{work.label}: {work.rows} rows in {batches}")

    # Workers that died late in the pass before may not have been restarted.
    for worker in workers:
        if not worker.process and not worker.gone and time.monotonic() < work.deadline:
            worker.launch()

    while True:
        for worker in workers:
            feed(work, worker, workers)

        # A worker that still loads is waited for while there is work for it.
        alive = [worker for worker in workers if worker.process]
        may_start = bool(work.queue) and time.monotonic() < work.deadline
        busy = []
        for worker in alive:
            if worker.outstanding or (may_start and not worker.loaded):
                busy.append(worker)
        if not busy:
            break

        # Wait for any message, but look after the workers every second.
        by_connection = {worker.connection: worker for worker in alive}
        for connection in wait(list(by_connection), timeout=1.0):
            receive(work, by_connection[connection], workers, clock)
        for worker in busy:
            check_is_alive(work, worker, clock)
        log_progress(work, workers, clock)

    log(clock, f"{work.label}: {progress_line(work, workers)}")
    return work


def feed(work: Pass, worker: Worker, workers: Sequence[Worker]) -> None:
    """Give a worker what it can score at once, and one batch more that lies ready."""
    while worker.loaded and len(worker.outstanding) <= worker.batches_at_once:
        batch = next_batch(work, worker, workers)
        if batch is None:
            return

        # Loading is over: the pass's speed counts from here.
        if work.began is None:
            work.began = time.monotonic()
        worker.send(batch)


def next_batch(work: Pass, worker: Worker, workers: Sequence[Worker]) -> list[Request] | None:
    """Take the next batch within the worker's token budget that it can end before the deadline."""
    seconds_left = work.deadline - time.monotonic()
    if not work.queue or seconds_left <= 0:
        return None

    # Long rows stand first. Where time is short, they are left for the end.
    from_end = work.may_reorder and work.seconds_left(workers) > seconds_left
    if from_end:
        put_back, put_off = work.put_last, work.put_first
    else:
        put_back, put_off = work.put_first, work.put_last

    # The first batch that this worker has not proven too small for.
    whole_batch = None
    for _ in range(len(work.queue)):
        batch = work.take(from_end)
        if worker.name not in work.too_large.get(batch[0].id, ()):
            whole_batch = batch
            break
        put_off([batch])
    if whole_batch is None:
        return None

    # The worker's budget may have shrunk since the batches were made.
    batch, *rest = make_batches(whole_batch, worker.tokens_per_batch)
    tokens_ahead = sum(map(padded_tokens, worker.outstanding.values())) + padded_tokens(batch)
    if worker.rate() and tokens_ahead / worker.rate() > seconds_left:
        put_back([whole_batch])
        return None
    put_back(rest)
    return batch


def receive(work: Pass, worker: Worker, workers: Sequence[Worker], clock: Clock) -> None:
    """Read one message of a worker (worker.py lists them), or notice its death."""
    try:
        kind, *message = worker.connection.recv()
    except (EOFError, OSError):
        # The pipe closes before the exit code is there.
        worker.process.join(timeout=5)
        exit_code = worker.process.exitcode
        return handle_worker_death(work, worker, f"died (exit code {exit_code})", clock)

    if kind == "loaded":
        worker.note_loaded(*message)
        log(
            clock,
            f"{worker.name}: loaded in {worker.load_seconds:.0f} s in {worker.loaded['dtype']}; "
            f"golden probabilities differ by at most {worker.loaded['worst']:.1e}",
        )
    elif kind == "scored":
        number, scores, memory_bytes = message
        note_scores(work, worker.note_scored(number, memory_bytes), scores)
    elif kind == "out of memory":
        batch = worker.note_out_of_memory(*message)
        outcome = return_large_batch(work, worker, batch, workers)
        budget = f"{worker.tokens_per_batch} tokens a batch from now on"
        log(clock, f"{worker.name}: out of memory: {budget}{outcome}")
    elif kind == "refused":
        # One device alone may be faulty; the last one has nobody to contradict it.
        [reason] = message
        if all(other.gone for other in workers if other is not worker):
            raise PackageError(reason)
        reason = f"refuses the package, which another device may not: {reason}"
        handle_worker_death(work, worker, reason, clock)
    else:
        [reason] = message
        handle_worker_death(work, worker, f"failed: {reason.strip()}", clock)


def return_large_batch(
    work: Pass, worker: Worker, batch: list[Request], workers: Sequence[Worker]
) -> str:
    """Put a batch back that a worker lacks the memory for.

    A row that was alone in it is left to the other workers, or given up.

    Returns:
        What became of such a row, for the log.
    """
    # The worker's budget is smaller now, so next_batch cuts the batch in parts.
    work.out_of_memory += 1
    if len(batch) > 1:
        work.put_first([batch])
        return ""

    [request] = batch
    lacking_workers = work.too_large.setdefault(request.id, set())
    lacking_workers.add(worker.name)
    if all(other.name in lacking_workers for other in workers if not other.gone):
        return give_up(work, request)
    work.put_last([batch])
    return f"; row {request.id} is left to the others"


def handle_worker_death(work: Pass, worker: Worker, why: str, clock: Clock) -> None:
    """Put a dead worker's rows back into the queue, and restart it or give its device up.

    A row that was being scored at GIVEN_UP_AFTER deaths is given up. No process is started that the
    clock has no time to load.
    """
    # What only lay ready is not suspected.
    being_scored, ready = worker.note_death()
    work.deaths[worker.name] = work.deaths.get(worker.name, 0) + 1
    work.put_first(ready)

    # Any of the rows that it was scoring may have killed it: each is tried again alone, at the end.
    rows_given_up = ""
    for batch in being_scored:
        for request in batch:
            work.suspected[request.id] += 1
            if work.suspected[request.id] >= GIVEN_UP_AFTER:
                rows_given_up += give_up(work, request)
            else:
                work.put_last([[request]])

    log(clock, f"{worker.name}: {why}")
    if worker.gone:
        outcome = f"gone after {worker.fruitless} deaths without a score in between"
    elif work.deadline - time.monotonic() <= worker.load_seconds:
        outcome = "not started again, the clock has no time to load it"
    else:
        worker.launch()
        outcome = f"started again, {worker.tokens_per_batch} tokens a batch"
    log(clock, f"{worker.name}: {outcome}{rows_given_up}")


def give_up(work: Pass, request: Request) -> str:
    """Leave a row without a score; return a note for the log."""
    work.given_up.append(request.id)
    return f"; row {request.id} is given up"


def check_is_alive(work: Pass, worker: Worker, clock: Clock) -> None:
    """Kill a worker that has said nothing for far too long, or works on into the reserve."""
    if not worker.process:
        return

    now = time.monotonic()
    quiet_seconds = now - worker.last_event

    # How long a batch takes is known only once the worker has scored one.
    if not worker.loaded:
        patience = LOAD_PATIENCE_SECONDS
    else:
        expected_seconds = 0.0
        if worker.outstanding and worker.rate():
            first_batch = next(iter(worker.outstanding.values()))
            expected_seconds = padded_tokens(first_batch) / worker.rate()
        patience = max(PATIENCE * expected_seconds, QUIET_SECONDS)

    # The reserve is for writing the submission.
    if worker.outstanding and now > clock.deadline + clock.reserve_seconds / 3:
        patience = 0
    if quiet_seconds > patience:
        reason = f"killed: it said nothing for {quiet_seconds:.0f} s"
        handle_worker_death(work, worker, reason, clock)


def note_scores(work: Pass, batch: list[Request], scores: BatchScores) -> None:
    """Keep a batch's probabilities by id; those that are not finite count as not scored."""
    work.computed_tokens += padded_tokens(batch)
    work.tokens += sum(request.tokens for request in batch)
    work.overflowed += scores.overflowed
    for request, probabilities in zip(batch, scores.probabilities, strict=True):
        if all(map(math.isfinite, probabilities)):
            work.scores[request.id] = probabilities
        else:
            work.not_finite += 1


def log_progress(work: Pass, workers: Sequence[Worker], clock: Clock) -> None:
    """Log the progress from time to time, and whenever LOGGED_SHARE more of the rows is scored."""
    now = time.monotonic()
    seconds_between = max((clock.deadline - clock.began) / 300, 10)
    is_time = now - work.logged_at > seconds_between
    is_far = len(work.scores) - work.logged_rows >= LOGGED_SHARE * work.rows
    if is_time or is_far:
        work.logged_at = now
        work.logged_rows = len(work.scores)
        log(clock, f"{work.label}: {progress_line(work, workers)}")


def progress_line(work: Pass, workers: Sequence[Worker]) -> str:
    """Describe rows done, speed, time to go and memory, for the log."""
    seconds = work.seconds()
    parts = [
        f"{len(work.scores)} of {work.rows} rows",
        f"{len(work.scores) / seconds:.1f} rows/s",
        f"{work.tokens / seconds:.0f} tokens/s",
    ]
    if work.queue:
        parts.append(f"{work.seconds_left(workers):.0f} s to go")
    sizes = []
    for worker in workers:
        for memory_bytes in worker.memory_bytes:
            sizes.append(f"{memory_bytes / 2**30:.1f}")
    if sizes:
        parts.append(f"{' + '.join(sizes)} GiB")
    if work.overflowed:
        parts.append(
            f"{work.overflowed} rows overflowed float16 and were computed again in float32, "
            f"{work.not_finite} of them in vain"
        )
    return ", ".join(parts)


def pass_record(work: Pass) -> dict:
    """Describe a finished pass for kernel.json."""
    seconds = work.seconds()
    padding = 0.0
    if work.computed_tokens:
        padding = 1 - work.tokens / work.computed_tokens
    return {
        "pass": work.label,
        "rows": work.rows,
        "scored": len(work.scores),
        "left": sum(map(len, work.queue)),
        "seconds": round(seconds, 2),
        "rows_per_second": round(len(work.scores) / seconds, 2),
        "tokens_per_second": round(work.tokens / seconds, 1),
        "tokens": work.tokens,
        "computed_tokens": work.computed_tokens,
        "padding": round(padding, 4),
        "out_of_memory": work.out_of_memory,
        "overflowed": work.overflowed,
        "not_finite": work.not_finite,
        "given_up": work.given_up,
        "deaths": work.deaths,
    }
