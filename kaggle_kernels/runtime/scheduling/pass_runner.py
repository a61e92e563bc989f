"""One order of one package: batches dealt to workers until none is left or the deadline is near.

schedule.score_pass calls `make_pass` and `run_pass`. What can happen to a batch on its way:
    out of memory      its worker's token budget is halved, and the batch cut and tried again; a
                       row that was alone is tried again at the end (`try_alone`)
    its worker dies    the worker is started again, or given up with its device; its rows go back to
                       the queue, those that it was scoring one by one at the end, in case that one
                       of them killed it (`handle_worker_death`)
    its worker hangs   the worker is killed, which is a death like others (`kill_if_silent`)
    the clock ends     the batch stays in the queue (`next_batch`)
A row without a score is simply not in the result, and the caller decides what that means.
"""

import math
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait

from kaggle_kernels.runtime.models.scoring import BatchScores, Request, make_batches, padded_tokens
from kaggle_kernels.runtime.package import PackageError
from kaggle_kernels.runtime.scheduling.worker_handle import Worker
from kaggle_kernels.runtime.settings import Clock, log

GIVEN_UP_AFTER = 3  # tries of a row that ended its worker, or its memory
QUIET_SECONDS = 300.0  # many times what a batch takes on a T4: then a worker hangs
LOAD_PATIENCE_SECONDS = 1800.0
LOGGED_SHARE = 0.05  # of a pass's rows: progress is logged whenever so many more are scored


@dataclass
class Pass:
    """One order of one package over some rows: its queue of batches, its scores, its progress."""

    label: str
    queue: deque[list[Request]]
    deadline: float
    rows: int
    all_tokens: int = field(init=False)  # of the queue at the beginning, padding included
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
        self.all_tokens = sum(padded_tokens(batch) for batch in self.queue)

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
    """Make a pass over rows, whose batches fit the token budget of the most capable worker."""
    tokens_per_batch = max(worker.tokens_per_batch for worker in workers)
    batches = make_batches(requests, tokens_per_batch)
    return Pass(label, deque(batches), deadline, rows=len(requests))


def run_pass(work: Pass, workers: Sequence[Worker], clock: Clock) -> Pass:
    """Have the workers score the batches in the queue until it is empty or the deadline is near.

    Raises:
        PackageError: The last worker refuses the package.
    """
    batches = "1 batch" if len(work.queue) == 1 else f"{len(work.queue)} batches"
    log(clock, f"{work.label}: {work.rows} rows in {batches}")

    # A worker that died late in the pass before may not have been restarted.
    for worker in workers:
        if not worker.process and not worker.gone and time.monotonic() < work.deadline:
            worker.launch()

    while True:
        for worker in workers:
            feed(work, worker, workers)
        busy = list_busy(work, workers)
        if not busy:
            break

        # Wait for any message, but look after the workers every second.
        by_connection = {worker.connection: worker for worker in workers if worker.process}
        for connection in wait(list(by_connection), timeout=1.0):
            receive(work, by_connection[connection], workers, clock)
        for worker in busy:
            kill_if_silent(work, worker, clock)
        log_progress(work, workers, clock)

    log(clock, f"{work.label}: {progress_line(work, workers)}")
    return work


def list_busy(work: Pass, workers: Sequence[Worker]) -> list[Worker]:
    """List the workers that the pass must wait for: those that have a batch, or still load and could get one."""
    # A worker that still loads is needed while there is a batch that it could score in time.
    has_work_left = bool(work.queue) and time.monotonic() < work.deadline
    busy = []
    for worker in workers:
        is_needed = has_work_left and not worker.loaded
        if worker.process and (worker.outstanding or is_needed):
            busy.append(worker)
    return busy


def feed(work: Pass, worker: Worker, workers: Sequence[Worker]) -> None:
    """Give a worker the batches that it can score at once, and one more, so that it never waits for the next."""
    while worker.loaded and len(worker.outstanding) <= worker.batches_at_once:
        batch = next_batch(work, worker, workers)
        if batch is None:
            return

        # Loading is over: the pass's speed counts from here.
        if work.began is None:
            work.began = time.monotonic()
        worker.send(batch)


def next_batch(work: Pass, worker: Worker, workers: Sequence[Worker]) -> list[Request] | None:
    """Take the next batch for a worker from the queue.

    Returns:
        A batch within the worker's token budget; None where it could not score one in time.
    """
    seconds_left = work.deadline - time.monotonic()
    if not work.queue or seconds_left <= 0:
        return None

    # The longest rows stand first. Where the time is not enough for all rows, the shortest are
    # taken first: more rows get a score.
    is_time_short = work.seconds_left(workers) > seconds_left
    whole_batch = work.queue.pop() if is_time_short else work.queue.popleft()

    # The worker's token budget may have shrunk since the batch was made.
    parts = make_batches(whole_batch, worker.tokens_per_batch)
    batch = None
    if worker.seconds_until_scored(parts[0]) <= seconds_left:
        batch = parts.pop(0)

    # The other parts go back to where the batch was.
    if is_time_short:
        work.queue.extend(parts)
    else:
        work.queue.extendleft(reversed(parts))
    return batch


def receive(work: Pass, worker: Worker, workers: Sequence[Worker], clock: Clock) -> None:
    """Handle the next message of a worker, or its death. worker.py lists the messages."""
    try:
        message = worker.connection.recv()
    except (EOFError, OSError):
        # The pipe closes before the exit code is there.
        worker.process.join(timeout=5)
        exit_code = worker.process.exitcode
        handle_worker_death(work, worker, f"died (exit code {exit_code})", clock)
        return

    match message:
        case ("loaded", facts):
            worker.note_loaded(facts)
            log(
                clock,
                f"{worker.name}: loaded in {facts['seconds']:.0f} s in {facts['dtype']}; "
                f"golden probabilities differ by at most {facts['worst']:.1e}",
            )
        case ("scored", number, scores):
            batch = worker.note_scored(number)
            note_scores(work, batch, scores)
        case ("out of memory", number):
            batch = worker.note_out_of_memory(number)
            log(
                clock, f"{worker.name}: out of memory: {worker.tokens_per_batch} tokens a batch now"
            )
            # The token budget is smaller now, so that next_batch will cut the batch in parts.
            if len(batch) > 1:
                work.queue.appendleft(batch)
            else:
                try_alone(work, batch, clock)
        case ("refused", reason):
            # One device alone may be faulty. Where all others are gone, it is the package.
            if all(other.gone for other in workers if other is not worker):
                raise PackageError(reason)
            reason = f"refuses the package, which another device may not: {reason}"
            handle_worker_death(work, worker, reason, clock)
        case ("failed", traceback):
            handle_worker_death(work, worker, f"failed: {traceback.strip()}", clock)


def try_alone(work: Pass, batch: list[Request], clock: Clock) -> None:
    """Put rows that failed at the end of the queue, each alone; give up those that failed often."""
    for request in batch:
        work.failed_tries[request.id] += 1
        if work.failed_tries[request.id] < GIVEN_UP_AFTER:
            work.queue.append([request])
        else:
            work.given_up.append(request.id)
            log(clock, f"row {request.id} is given up")


def handle_worker_death(work: Pass, worker: Worker, reason: str, clock: Clock) -> None:
    """Put a dead worker's rows back into the queue, and restart it or give its device up."""
    log(clock, f"{worker.name}: {reason}")

    # Any of the rows that it was scoring may have killed it, so that each is tried alone. Batches
    # that lay ready in its pipe go back to where they came from.
    being_scored, ready = worker.note_death()
    work.queue.extendleft(reversed(ready))
    for batch in being_scored:
        try_alone(work, batch, clock)

    # A process that could not load before the deadline is not started.
    if worker.gone:
        outcome = f"gone after {worker.deaths_without_score} deaths without a score in between"
    elif work.deadline - time.monotonic() <= worker.load_seconds:
        outcome = "not started again, the clock has no time to load it"
    else:
        worker.launch()
        outcome = f"started again, {worker.tokens_per_batch} tokens a batch"
    log(clock, f"{worker.name}: {outcome}")


def kill_if_silent(work: Pass, worker: Worker, clock: Clock) -> None:
    """Kill a worker that hangs, or whose batch is not done when the submission must be written."""
    if not worker.process:
        return

    # After the deadline there is a reserve for writing. A third of it may pass.
    now = time.monotonic()
    is_too_late = now > clock.deadline + clock.reserve_seconds / 3
    if worker.outstanding and is_too_late:
        allowed_seconds = 0.0
    elif worker.loaded:
        allowed_seconds = QUIET_SECONDS
    else:
        allowed_seconds = LOAD_PATIENCE_SECONDS

    quiet_seconds = now - worker.last_event
    if quiet_seconds > allowed_seconds:
        reason = f"killed: it said nothing for {quiet_seconds:.0f} s"
        handle_worker_death(work, worker, reason, clock)


def note_scores(work: Pass, batch: list[Request], scores: BatchScores) -> None:
    """Keep a batch's probabilities by id, and count its tokens, overflows and rows without a score."""
    work.computed_tokens += padded_tokens(batch)
    work.tokens += sum(request.tokens for request in batch)
    work.overflowed += scores.overflowed
    for request, probabilities in zip(batch, scores.probabilities, strict=True):
        if all(math.isfinite(probability) for probability in probabilities):
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
