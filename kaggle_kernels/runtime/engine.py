"""One package over a list of devices: a thread and a copy of the model for each, batches dealt from one queue.

A model that one device cannot hold has one worker with several devices, its layers over all of them, and a thread for each.

What happens to a batch: out of memory halves that device's token budget and tries again; any other failure takes the
device out and gives the batch to the others; the clock may leave batches behind. A row without a score is simply not in
the result, and the caller decides what that means.
"""

import contextlib
import gc
import math
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from kaggle_kernels.runtime.model import load_model
from kaggle_kernels.runtime.package import Package, PackageError
from kaggle_kernels.runtime.pipeline import Stages, stage_starts
from kaggle_kernels.runtime.placement import split_over
from kaggle_kernels.runtime.scoring import (
    Request,
    make_batches,
    make_requests,
    mean_of_orders,
    orders_of,
    padded_tokens,
    score,
    score_batch,
)
from kaggle_kernels.runtime.settings import Clock, log

GOLDEN_TOLERANCE = 0.05  # float16 and 4-bit kernels differ between devices by up to 0.02; a wrong head by far more
LOG_SECONDS = 20.0
CERTAINTY_BLOCKS = 8  # a short clock takes the second order by eighths, the least certain first


@dataclass
class Worker:
    """A copy of the model, and what it has done so far (tokens are counted with their padding).

    Its inputs go to `device`; a model that is split also has parts on the `others`.
    """

    device: str
    model: torch.nn.Module
    tokens_per_batch: int
    tokens: int = 0
    seconds: float = 0.0
    failure: str | None = None
    others: tuple[str, ...] = ()
    stages: Stages | None = None

    @property
    def name(self) -> str:
        """Its devices, for the log."""
        return "+".join((self.device, *self.others))

    @property
    def batches_at_once(self) -> int:
        """How many batches are in flight: one for each stage of a split model."""
        return len(self.stages.locks) if self.stages else 1

    def seconds_for(self, tokens: int) -> float:
        """How long `tokens` should take, from what it has done; 0 before its first batch."""
        return tokens * self.seconds / self.tokens if self.tokens else 0.0


@dataclass
class Pass:
    """One order of one package: the queue of batches, and the probabilities by id. Its workers share it under `lock`."""

    label: str
    queue: deque[list[Request]]
    deadline: float
    may_reorder: bool  # a clock too short for the whole queue then takes short rows first: more rows a second
    rows: int
    began: float = field(default_factory=time.monotonic)
    lock: threading.Lock = field(default_factory=threading.Lock)
    scores: dict[str, list[float]] = field(default_factory=dict)
    real_tokens: int = 0
    padded_tokens: int = 0
    out_of_memory: int = 0
    not_finite: int = 0
    logged: float = field(default_factory=time.monotonic)


def load_workers(package: Package, placement: str, devices: Sequence[str], tokens_per_batch: int, clock: Clock) -> list[Worker]:
    """A copy of the model on `each` device, one after another, or one copy `split` over them all.

    Each is checked against the manifest's golden probabilities.
    """
    workers = []
    for group in [tuple(devices)] if placement == "split" else [(device,) for device in devices]:
        device, *others = group
        device_map = split_over(package.folder, group) if others else None
        model = load_model(package.folder, package.contract, device, device_map=device_map)
        stages = Stages(model, stage_starts(device_map), group) if others else None
        worker = Worker(device, model, tokens_per_batch, others=tuple(others), stages=stages)
        worst = check_golden_scores(package, model, device)
        workers.append(worker)
        log(
            clock,
            f"{package.folder.name} on {worker.name} in {model.dtype}: golden probabilities differ by at most {worst:.1e}",
        )
    return workers


def check_golden_scores(package: Package, model: torch.nn.Module, device: str) -> float:
    """The largest difference from the manifest's golden probabilities; over GOLDEN_TOLERANCE it is a PackageError."""
    pairs = [package.model_input.pair_from_row(row["pair"]) for row in package.contract.golden]
    contract = package.contract
    settings = {"orders": ("as_given",), "tokens_per_batch": contract.budget_tokens, "device": device}
    found = score(model, package.model_input, package.tokenizer, contract, pairs, **settings)
    worst = 0.0
    for golden in package.manifest["golden"]:
        values = found[golden["id"]]["as_given"]
        worst = max([worst, *(abs(f - e) for f, e in zip(values, golden["probabilities"], strict=True))])
        if worst > GOLDEN_TOLERANCE:
            raise PackageError(
                f"{package.folder}: golden row {golden['id']} scores {values} on {device}, the package recorded "
                f"{golden['probabilities']}; weights, head, pad id or attention are not those that were packaged"
            )
    return worst


def score_package(
    package: Package,
    contract,
    workers: list[Worker],
    pairs: Sequence,
    orders: Iterable[str],
    deadlines: Sequence[float],
    clock: Clock,
) -> tuple[dict[str, dict[str, list[float]]], list[dict]]:
    """Scores by id and order (see scoring.score), and a record of each pass.

    `contract` is the package's, or one with another budget. `deadlines` are those of the orders, in time.monotonic's
    seconds. The second order takes its rows least certain first where the clock is too short for all of them.
    """
    scores: dict[str, dict[str, list[float]]] = {pair.id: {} for pair in pairs}
    records = []
    for order, deadline in zip(orders_of(contract, orders), deadlines, strict=False):
        requests = make_requests(package.model_input, package.tokenizer, contract, pairs, [order])
        batches = plan_batches(requests, mean_of_orders(scores), workers, deadline)
        label = f"{package.folder.name}, {order}"
        first = not records
        done = run_pass(Pass(label, deque(batches), deadline, first, len(pairs)), package, contract, workers, clock)
        for row_id, values in done.scores.items():
            scores[row_id][order] = values
        records.append(pass_record(done, workers))
    return scores, records


def plan_batches(
    requests: Sequence[Request], known: dict[str, list[float]], workers: Sequence[Worker], deadline: float
) -> list[list[Request]]:
    """Batches in the order in which to score them: by length, or where the clock is short the least certain rows first."""
    tokens_per_batch = max(worker.tokens_per_batch for worker in workers)
    batches = make_batches(requests, tokens_per_batch)
    left = deadline - time.monotonic()
    if not known or seconds_left(batches, workers) <= left:
        return batches
    by_certainty = sorted(requests, key=lambda request: margin(known.get(request.id)))
    size = math.ceil(len(requests) / CERTAINTY_BLOCKS)
    blocks = [by_certainty[start : start + size] for start in range(0, len(by_certainty), size)]
    return [batch for block in blocks for batch in make_batches(block, tokens_per_batch)]


def margin(values: Sequence[float] | None) -> float:
    """How sure a model is: the lead of its first verdict over its second; -1 for a row without a score."""
    if values is None:
        return -1.0
    second, first = sorted(values)[-2:]
    return first - second


def seconds_left(batches: Iterable[list[Request]], workers: Sequence[Worker]) -> float:
    """How long the batches will take on the workers that are alive, from what those have done; 0 where nothing is known."""
    at_work = [worker for worker in workers if worker.tokens and not worker.failure]
    rate = sum(worker.batches_at_once * worker.tokens / worker.seconds for worker in at_work)
    return sum(map(padded_tokens, batches)) / rate if rate else 0.0


def run_pass(work: Pass, package: Package, contract, workers: list[Worker], clock: Clock) -> Pass:
    """Work through the queue on every worker that is alive, until it is empty or the deadline is near.

    A batch that a worker gave back as it failed, after the others had ended, starts those again.
    """
    while alive := [worker for worker in workers if not worker.failure]:
        devices = ", ".join(worker.name for worker in alive)
        log(clock, f"{work.label}: {sum(map(len, work.queue))} rows in {len(work.queue)} batches on {devices}")
        serving = [worker for worker in alive for _ in range(worker.batches_at_once)]
        threads = [threading.Thread(target=serve, args=(work, worker, package, contract, workers, clock)) for worker in serving]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if not work.queue or not any(worker.failure for worker in alive):
            break
    log(clock, f"{work.label}: {progress(work, workers)}")
    return work


def serve(work: Pass, worker: Worker, package: Package, contract, workers: list[Worker], clock: Clock) -> None:
    """One worker's thread, or one of its threads where its model is split."""
    while not worker.failure and (batch := next_batch(work, worker, workers)):
        began = time.monotonic()
        try:
            with worker.stages.batch() if worker.stages else contextlib.nullcontext():
                values = score_batch(worker.model, package.model_input, contract, batch, worker.device)
        except torch.OutOfMemoryError:
            values = None
        except Exception as error:
            with work.lock:
                work.queue.append(batch)
                worker.failure = f"{type(error).__name__}: {error}"
            log(clock, f"{work.label}: {worker.name} is out of work: {traceback.format_exc()}")
            return
        if values is None:
            after_out_of_memory(work, worker, batch, clock)
            continue
        with work.lock:
            note_scores(work, worker, batch, values, time.monotonic() - began)
            if time.monotonic() - work.logged > LOG_SECONDS:
                work.logged = time.monotonic()
                log(clock, f"{work.label}: {progress(work, workers)}")


def next_batch(work: Pass, worker: Worker, workers: Sequence[Worker]) -> list[Request] | None:
    """The next batch within the worker's budget that it can end before the deadline; None when there is none."""
    with work.lock:
        left = work.deadline - time.monotonic()
        if not work.queue or left <= 0:
            return None
        from_right = work.may_reorder and seconds_left(work.queue, workers) > left
        batch = work.queue.pop() if from_right else work.queue.popleft()
        batch, *rest = make_batches(batch, worker.tokens_per_batch)
        if worker.seconds_for(padded_tokens(batch)) > left:
            work.queue.appendleft([request for part in (batch, *rest) for request in part])
            return None
        if rest:
            work.queue.extendleft(reversed(rest))
        return batch


def after_out_of_memory(work: Pass, worker: Worker, batch: list[Request], clock: Clock) -> None:
    """Halve the worker's budget and give its batch back; a batch of one row is given up."""
    gc.collect()
    if worker.device.startswith("cuda"):
        with contextlib.suppress(RuntimeError):  # a broken device raises its error again; the next batch then takes it out
            torch.cuda.empty_cache()
    with work.lock:
        work.out_of_memory += 1
        worker.tokens_per_batch = max(min(worker.tokens_per_batch, padded_tokens(batch)) // 2, 1)
        if len(batch) > 1:
            work.queue.appendleft(batch)
    given_up = "" if len(batch) > 1 else f", row {batch[0].id} is given up"
    log(clock, f"{work.label}: {worker.name} is out of memory: {worker.tokens_per_batch} tokens a batch from now on{given_up}")


def note_scores(work: Pass, worker: Worker, batch: list[Request], values: list[list[float]], seconds: float) -> None:
    """Keep a batch's probabilities by id; those that are not finite count as not scored."""
    worker.tokens += padded_tokens(batch)
    worker.seconds += seconds
    work.padded_tokens += padded_tokens(batch)
    work.real_tokens += sum(request.tokens for request in batch)
    for request, probabilities in zip(batch, values, strict=True):
        if all(map(math.isfinite, probabilities)):
            work.scores[request.id] = probabilities
        else:
            work.not_finite += 1


def progress(work: Pass, workers: Sequence[Worker]) -> str:
    """Rows done, speed and the predicted finish, for the log."""
    seconds = max(time.monotonic() - work.began, 1e-9)
    rest = f", {seconds_left(work.queue, workers):.0f} s to go" if work.queue else ""
    return (
        f"{len(work.scores)} of {work.rows} rows, {len(work.scores) / seconds:.1f} rows/s, "
        f"{work.real_tokens / seconds:.0f} tokens/s{rest}"
    )


def pass_record(work: Pass, workers: Sequence[Worker]) -> dict:
    """A finished pass for kernel.json."""
    seconds = time.monotonic() - work.began
    return {
        "pass": work.label,
        "rows": work.rows,
        "scored": len(work.scores),
        "seconds": round(seconds, 2),
        "rows_per_second": round(len(work.scores) / seconds, 2),
        "tokens_per_second": round(work.real_tokens / seconds, 1),
        "padding": round(1 - work.real_tokens / work.padded_tokens, 4) if work.padded_tokens else 0.0,
        "out_of_memory": work.out_of_memory,
        "not_finite": work.not_finite,
        "failures": {worker.name: worker.failure for worker in workers if worker.failure},
    }
