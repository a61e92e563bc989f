"""One order of one package: batches dealt to workers until none is left or the deadline is near.

schedule.make_next_pass calls `make_pass` and `run_pass`. What can happen to a batch on its way:
    out of memory      its worker's token budget is halved, and the batch cut and tried again; a
                       row that was alone is tried again at the end (`try_alone`)
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
from collections.abc import Sequence
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

GIVEN_UP_AFTER = 3  # tries of a row that ended its worker, or its memory
QUIET_SECONDS = 300.0  # many times what a batch takes on a T4: then a worker hangs
LOAD_PATIENCE_SECONDS = 1800.0
LOGGED_SHARE = 0.05  # of a pass's rows: progress is logged whenever so many more are scored


@dataclass
class Pass:
    """The queue of batches, the probabilities by id, and what there is to tell of both."""

    label: str
    queue: deque[list[Request]]
    deadline: float
    rows: int
    all_tokens: int = 0  # of the queue at the beginning, padding included
    began: float | None = None
    scores: dict[str, list[float]] = field(default_factory=dict)
    tokens: int = 0
    computed_tokens: int = 0  # padding included
    overflowed: int = 0  # rows that were computed again in float32
    not_finite: int = 0
    failed_tries: Counter = field(default_factory=Counter)  # by row
    given_up: list[str] = field(default_factory=list)
    logged_rows: int = 0

    def __post_init__(self):
        self.all_tokens = sum(map(padded_tokens, self.queue))

    def seconds_left(self, workers: Sequence[Worker]) -> float:
        """Predict how long the living workers need for the rest; 0 before their first batch."""
        rate = sum(worker.rate() for worker in workers if not worker.gone)
        if not rate:
            return 0.0
        return (self.all_tokens - self.computed_tokens) / rate

    def seconds(self) -> float:
        """Return the seconds since its first batch was sent: loading a model does not count."""
        if self.began is None:
            return 1e-9
        return max(time.monotonic() - self.began, 1e-9)


def make_pass(
    label: str, requests: Sequence[Request], deadline: float, workers: Sequence[Worker]
) -> Pass:
    """Make a pass over rows.

    Args:
        label: Names it in the log.
        requests: The rows.
        deadline: When its last batch must end, as time.monotonic gives seconds.
        workers: Those that will do it.
    """
    tokens_per_batch = max(worker.tokens_per_batch for worker in workers)
    batches = make_batches(requests, tokens_per_batch)
    return Pass(label, deque(batches), deadline, rows=len(requests))


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
    """Give a worker what it can score at once, and one batch more that lies ready in the pipe."""
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

    # Long rows stand first. Where time is short, they are left for the end: more rows get a score.
    short_rows_first = work.seconds_left(workers) > seconds_left
    whole_batch = work.queue.pop() if short_rows_first else work.queue.popleft()

    # The worker's budget may have shrunk since the batches were made.
    parts = make_batches(whole_batch, worker.tokens_per_batch)
    batch = None
    if worker.seconds_until_scored(parts[0]) <= seconds_left:
        batch = parts.pop(0)

    # What is not taken goes back to the same end.
    if short_rows_first:
        work.queue.extend(parts)
    else:
        work.queue.extendleft(reversed(parts))
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
        number, scores = message
        note_scores(work, worker.note_scored(number), scores)
    elif kind == "out of memory":
        batch = worker.note_out_of_memory(*message)
        log(clock, f"{worker.name}: out of memory: {worker.tokens_per_batch} tokens a batch now")
        # The budget is smaller than this batch, so next_batch cuts it in parts.
        if len(batch) > 1:
            work.queue.appendleft(batch)
        else:
            try_alone(work, batch, clock)
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


def try_alone(work: Pass, batch: list[Request], clock: Clock) -> None:
    """Put rows that failed at the end of the queue, each alone, or give them up."""
    for request in batch:
        work.failed_tries[request.id] += 1
        if work.failed_tries[request.id] < GIVEN_UP_AFTER:
            work.queue.append([request])
        else:
            work.given_up.append(request.id)
            log(clock, f"row {request.id} is given up")


def handle_worker_death(work: Pass, worker: Worker, why: str, clock: Clock) -> None:
    """Put a dead worker's rows back into the queue, and restart it or give its device up.

    No process is started that the clock has no time to load.
    """
    log(clock, f"{worker.name}: {why}")

    # Any of the rows that it was scoring may have killed it. What only lay ready has not.
    being_scored, ready = worker.note_death()
    work.queue.extendleft(reversed(ready))
    for batch in being_scored:
        try_alone(work, batch, clock)

    if worker.gone:
        outcome = f"gone after {worker.fruitless} deaths without a score in between"
    elif work.deadline - time.monotonic() <= worker.load_seconds:
        outcome = "not started again, the clock has no time to load it"
    else:
        worker.launch()
        outcome = f"started again, {worker.tokens_per_batch} tokens a batch"
    log(clock, f"{worker.name}: {outcome}")


def check_is_alive(work: Pass, worker: Worker, clock: Clock) -> None:
    """Kill a worker that has said nothing for far too long, or works on into the reserve."""
    if not worker.process:
        return

    patience = QUIET_SECONDS if worker.loaded else LOAD_PATIENCE_SECONDS
    # The reserve is for writing the submission.
    now = time.monotonic()
    if worker.outstanding and now > clock.deadline + clock.reserve_seconds / 3:
        patience = 0
    quiet_seconds = now - worker.last_event
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
    """Log the progress whenever LOGGED_SHARE more of the rows is scored."""
    if len(work.scores) - work.logged_rows >= LOGGED_SHARE * work.rows:
        work.logged_rows = len(work.scores)
        log(clock, f"{work.label}: {progress_line(work, workers)}")


def progress_line(work: Pass, workers: Sequence[Worker]) -> str:
    """Describe rows done, speed, time to go and overflows, for the log."""
    seconds = work.seconds()
    parts = [
        f"{len(work.scores)} of {work.rows} rows",
        f"{len(work.scores) / seconds:.1f} rows/s",
        f"{work.tokens / seconds:.0f} tokens/s",
    ]
    if work.queue:
        parts.append(f"{work.seconds_left(workers):.0f} s to go")
    if work.overflowed:
        parts.append(
            f"{work.overflowed} rows overflowed float16 and were computed again in float32, "
            f"{work.not_finite} of them in vain"
        )
    return ", ".join(parts)


def pass_record(work: Pass) -> dict:
    """Describe a finished pass for kernel.json."""
    return {
        "pass": work.label,
        "rows": work.rows,
        "scored": len(work.scores),
        "seconds": round(work.seconds(), 2),
        "tokens": work.tokens,
        "computed_tokens": work.computed_tokens,
        "overflowed": work.overflowed,
        "not_finite": work.not_finite,
        "given_up": work.given_up,
    }
