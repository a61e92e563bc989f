"""One order of one package over its workers: batches dealt from one queue until it is empty or the deadline is near.

schedule.make_next_pass calls `make_pass` and `run_pass`. What can happen to a batch on its way:
    out of memory      its worker's token budget is halved, and the batch cut and tried again (`cut`)
    its worker dies    the worker is started again, or given up with its device; its rows go back to the queue, those that it
                       was scoring one by one at the end, in case that one of them killed it (`handle_worker_death`)
    its worker hangs   the worker is killed, which is a death like others (`watch`)
    the clock ends     the batch stays in the queue (`next_batch`)
A row without a score is simply not in the result, and the caller decides what that means.
"""

import math
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait

from kaggle_kernels.runtime.models.scoring import BatchScores, Request, make_batches, padded_tokens
from kaggle_kernels.runtime.package import PackageError
from kaggle_kernels.runtime.scheduling.crew import Worker
from kaggle_kernels.runtime.settings import Clock, log

GIVEN_UP_AFTER = 3  # deaths of the worker that was scoring a row, the last two with that row alone
PATIENCE = 20.0  # times what a batch should take, but at least QUIET_SECONDS; then its worker is taken for hung
QUIET_SECONDS = 120.0
LOAD_PATIENCE_SECONDS = 1800.0
BLOCKS = 8  # where rows are scored by their worth, an eighth at a time is batched by length


@dataclass
class Pass:
    """The queue of batches and the probabilities by id, and what there is to tell of both."""

    label: str
    queue: deque[list[Request]]
    deadline: float
    may_reorder: bool  # a clock too short for the whole queue then takes short rows first: more rows a second
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
    too_large: dict[str, set[str]] = field(default_factory=dict)  # by row, alone in its batch: the workers that lack the memory
    logged: float = field(default_factory=time.monotonic)
    queued_tokens: int = 0  # of the queue, padding included

    def __post_init__(self):
        self.queued_tokens = sum(map(padded_tokens, self.queue))

    def take(self, last: bool) -> list[Request]:
        """The queue's first or last batch."""
        batch = self.queue.pop() if last else self.queue.popleft()
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
        """How long the queue will take on the workers that are alive, from what those have done; 0 where nothing is known."""
        rate = sum(worker.rate() for worker in workers if not worker.gone)
        return self.queued_tokens / rate if rate else 0.0

    def seconds(self) -> float:
        """Since its first batch was sent: loading a model does not count."""
        return max(time.monotonic() - self.began, 1e-9) if self.began else 1e-9


def make_pass(
    label: str,
    requests: Sequence[Request],
    deadline: float,
    workers: Sequence[Worker],
    worth: Mapping[str, float] | None = None,
) -> Pass:
    """A pass over `requests`: by length, or by blocks of those worth most first, where `worth` by id is given."""
    tokens_per_batch = max(worker.tokens_per_batch for worker in workers)
    if worth is None:
        batches = make_batches(requests, tokens_per_batch)
    else:
        by_worth = sorted(requests, key=lambda request: -worth[request.id])
        size = max(math.ceil(len(requests) / BLOCKS), 1)
        blocks = [by_worth[start : start + size] for start in range(0, len(by_worth), size)]
        batches = [batch for block in blocks for batch in make_batches(block, tokens_per_batch)]
    return Pass(label, deque(batches), deadline, worth is None, len(requests))


def run_pass(work: Pass, workers: Sequence[Worker], clock: Clock) -> Pass:
    """Work through the queue; raises PackageError where a worker refuses the package."""
    log(clock, f"{work.label}: {work.rows} rows in {len(work.queue)} batches")
    for worker in workers:
        if not worker.process and not worker.gone and time.monotonic() < work.deadline:
            worker.launch()
    while True:
        for worker in workers:
            feed(work, worker, workers)
        alive = [worker for worker in workers if worker.process]
        may_start = work.queue and time.monotonic() < work.deadline
        busy = [worker for worker in alive if worker.outstanding or (may_start and not worker.loaded)]
        if not busy:
            break
        by_connection = {worker.connection: worker for worker in alive}
        for connection in wait(list(by_connection), timeout=1.0):
            receive(work, by_connection[connection], workers, clock)
        for worker in busy:
            watch(work, worker, clock)
        if time.monotonic() - work.logged > max((clock.deadline - clock.began) / 300, 10):
            work.logged = time.monotonic()
            log(clock, f"{work.label}: {progress(work, workers)}")
    log(clock, f"{work.label}: {progress(work, workers)}")
    return work


def feed(work: Pass, worker: Worker, workers: Sequence[Worker]) -> None:
    """Give a worker what it can score at once, and one batch more that lies ready."""
    while worker.loaded and len(worker.outstanding) <= worker.batches_at_once:
        batch = next_batch(work, worker, workers)
        if batch is None:
            return
        work.began = work.began or time.monotonic()
        worker.send(batch)


def next_batch(work: Pass, worker: Worker, workers: Sequence[Worker]) -> list[Request] | None:
    """The next batch within the worker's budget that it can end before the deadline; None when there is none."""
    left = work.deadline - time.monotonic()
    if not work.queue or left <= 0:
        return None
    last = work.may_reorder and work.seconds_left(workers) > left
    put_back, put_off = (work.put_last, work.put_first) if last else (work.put_first, work.put_last)
    for _ in range(len(work.queue)):
        whole = work.take(last)
        if worker.name not in work.too_large.get(whole[0].id, ()):
            break
        put_off([whole])
    else:
        return None
    batch, *rest = make_batches(whole, worker.tokens_per_batch)
    ahead = sum(map(padded_tokens, worker.outstanding.values())) + padded_tokens(batch)
    if worker.rate() and ahead / worker.rate() > left:
        put_back([whole])
        return None
    put_back(rest)
    return batch


def receive(work: Pass, worker: Worker, workers: Sequence[Worker], clock: Clock) -> None:
    """Read one message of a worker, or its death."""
    try:
        kind, *message = worker.connection.recv()
    except (EOFError, OSError):
        return handle_worker_death(work, worker, f"died (exit code {exit_code(worker)})", clock)
    if kind == "loaded":
        [worker.loaded] = message
        worker.load_seconds, worker.last_event = worker.loaded["seconds"], time.monotonic()
        log(
            clock,
            f"{worker.name}: loaded in {worker.load_seconds:.0f} s in {worker.loaded['dtype']}; "
            f"golden probabilities differ by at most {worker.loaded['worst']:.1e}",
        )
    elif kind == "scored":
        number, scores, memory = message
        note_scores(work, worker.note_scored(number, memory), scores)
    elif kind == "out of memory":
        told = cut(work, worker, worker.note_out_of_memory(message[0]), workers)
        log(clock, f"{worker.name}: out of memory: {worker.tokens_per_batch} tokens a batch from now on{told}")
    elif kind == "refused":
        if all(other.gone for other in workers if other is not worker):
            raise PackageError(message[0])
        handle_worker_death(work, worker, f"refuses the package, which another device may not: {message[0]}", clock)
    else:
        handle_worker_death(work, worker, f"failed: {message[0].strip()}", clock)


def cut(work: Pass, worker: Worker, batch: list[Request], workers: Sequence[Worker]) -> str:
    """Put a batch that was too large back; a row that was alone in it is for the other workers, or given up."""
    work.out_of_memory += 1
    if len(batch) > 1:
        work.put_first([batch])
        return ""
    lacking = work.too_large.setdefault(batch[0].id, set())
    lacking.add(worker.name)
    if all(other.name in lacking for other in workers if not other.gone):
        return give_up(work, batch)
    work.put_last([batch])
    return f"; row {batch[0].id} is left to the others"


def exit_code(worker: Worker) -> int | None:
    """How a process that closed its pipe ended."""
    worker.process.join(timeout=5)
    return worker.process.exitcode


def handle_worker_death(work: Pass, worker: Worker, why: str, clock: Clock) -> None:
    """Put a dead worker's rows back into the queue, and start a new process in its place or give its device up.

    A row that was being scored at GIVEN_UP_AFTER deaths is given up. No process is started that the clock has no time to load.
    """
    at_work, ready = worker.note_death()
    work.deaths[worker.name] = work.deaths.get(worker.name, 0) + 1
    work.put_first(ready)

    # Any of the rows that it was scoring may have killed it: each is tried again alone, after all others.
    rows_given_up = ""
    for batch in at_work:
        for request in batch:
            work.suspected[request.id] += 1
            if work.suspected[request.id] >= GIVEN_UP_AFTER:
                rows_given_up += give_up(work, [request])
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


def give_up(work: Pass, batch: list[Request]) -> str:
    """Leave a row without a score."""
    work.given_up.append(batch[0].id)
    return f"; row {batch[0].id} is given up"


def watch(work: Pass, worker: Worker, clock: Clock) -> None:
    """Kill a worker that has said nothing for far too long, or that goes on after the deadline into the clock's reserve."""
    if not worker.process:
        return
    now = time.monotonic()
    quiet = now - worker.last_event
    if not worker.loaded:
        patience = LOAD_PATIENCE_SECONDS
    else:
        first = next(iter(worker.outstanding.values()), [])
        expected = padded_tokens(first) / worker.rate() if first and worker.rate() else 0.0
        patience = max(PATIENCE * expected, QUIET_SECONDS)
    if worker.outstanding and now > clock.deadline + clock.reserve_seconds / 3:
        patience = 0
    if quiet > patience:
        handle_worker_death(work, worker, f"killed: it said nothing for {quiet:.0f} s", clock)


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


def progress(work: Pass, workers: Sequence[Worker]) -> str:
    """Rows done, speed, memory and the predicted finish, for the log."""
    seconds = work.seconds()
    rest = f", {work.seconds_left(workers):.0f} s to go" if work.queue else ""
    memory = " + ".join(f"{size / 2**30:.1f}" for worker in workers for size in worker.memory_bytes)
    return (
        f"{len(work.scores)} of {work.rows} rows, {len(work.scores) / seconds:.1f} rows/s, "
        f"{work.tokens / seconds:.0f} tokens/s{rest}{f', {memory} GiB' if memory else ''}{overflow_report(work)}"
    )


def overflow_report(work: Pass) -> str:
    """How many rows overflowed, for the log; empty where none did."""
    if not work.overflowed:
        return ""
    return f"; {work.overflowed} rows overflowed float16 and were computed again in float32, {work.not_finite} of them in vain"


def pass_record(work: Pass) -> dict:
    """A finished pass for kernel.json."""
    seconds = work.seconds()
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
        "padding": round(1 - work.tokens / work.computed_tokens, 4) if work.computed_tokens else 0.0,
        "out_of_memory": work.out_of_memory,
        "overflowed": work.overflowed,
        "not_finite": work.not_finite,
        "given_up": work.given_up,
        "deaths": work.deaths,
    }


def worker_record(worker: Worker) -> dict:
    """A worker for kernel.json."""
    return {
        "device": worker.name,
        "package": worker.task.folder.rpartition("/")[2],
        "load_seconds": round(worker.load_seconds, 1),
        "computed_tokens": worker.tokens,
        "busy_seconds": round(worker.seconds, 1),
        "tokens_per_batch": worker.tokens_per_batch,
        "memory_bytes": worker.memory_bytes,
        "deaths": worker.deaths,
        "gone": worker.gone,
    }
