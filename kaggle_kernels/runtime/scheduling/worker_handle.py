"""The workers as the kernel's own process sees them: started, given batches, killed, restarted.

A worker that dies is started again with half its token budget, which stays halved. One that dies
often without a scored batch in between is given up: its device is gone, and the others go on
without it. pass_runner.handle_worker_death decides what becomes of its rows.
"""

import contextlib
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from kaggle_kernels.runtime.models.scoring import Request, padded_tokens
from kaggle_kernels.runtime.package import Package
from kaggle_kernels.runtime.scheduling.worker import Assignment, run_worker
from kaggle_kernels.runtime.settings import Clock, PackageSettings, log

MOST_DEATHS_WITHOUT_SCORE = 3
JOIN_SECONDS = 30.0  # a killed process may be stuck in a driver


@dataclass
class Worker:
    """One process and its history. Tokens are counted with their padding."""

    name: str  # for the log
    task: Assignment
    tokens_per_batch: int
    start: Callable[[Assignment], tuple]  # gives the process and the pipe to it
    positions: tuple[int, ...] = ()  # of its devices

    # The process.
    process: object = None
    connection: object = None
    loaded: dict | None = None  # what the worker said of its model
    gone: bool = False
    batches_sent: int = 0
    outstanding: dict[int, list[Request]] = field(default_factory=dict)  # by number, as sent
    last_event: float = 0.0  # began to load, got its first batch, or gave one back

    # The history, over all of its processes.
    tokens: int = 0
    seconds: float = 0.0  # in which it had work
    load_seconds: float = 0.0
    deaths_without_score: int = 0  # since the last scored batch

    @property
    def batches_at_once(self) -> int:
        """How many batches it scores at the same time: one for each stage of a split model."""
        return self.loaded["batches_at_once"] if self.loaded else 1

    def rate(self) -> float:
        """Return tokens a second, from what it has done; 0 before its first batch."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def seconds_until_scored(self, batch: list[Request]) -> float:
        """Predict when a batch would be scored, after those that it has; 0 before its first one."""
        if not self.rate():
            return 0.0
        tokens = padded_tokens(batch)
        for outstanding_batch in self.outstanding.values():
            tokens += padded_tokens(outstanding_batch)
        return tokens / self.rate()

    def launch(self) -> None:
        """Start the process, which loads the model."""
        self.loaded = None
        self.last_event = time.monotonic()
        self.process, self.connection = self.start(self.task)

    def send(self, batch: list[Request]) -> None:
        """Send it a batch. If it has died meanwhile, pass_runner.receive will notice."""
        # The time in which it had nothing to do counts neither as work nor as silence.
        if not self.outstanding:
            self.last_event = time.monotonic()
        self.batches_sent += 1
        self.outstanding[self.batches_sent] = batch
        with contextlib.suppress(OSError):
            self.connection.send((self.batches_sent, batch))

    def note_loaded(self, facts: dict) -> None:
        """Note what it said of its model; from now on it can be given batches."""
        self.loaded = facts
        self.load_seconds = facts["seconds"]
        self.last_event = time.monotonic()

    def note_scored(self, number: int) -> list[Request]:
        """Count a batch that was scored, and return it."""
        batch = self.outstanding.pop(number)
        now = time.monotonic()
        self.tokens += padded_tokens(batch)
        self.seconds += now - self.last_event
        self.last_event = now
        self.deaths_without_score = 0
        return batch

    def note_out_of_memory(self, number: int) -> list[Request]:
        """Lower the token budget to half the tokens of a batch that was too large, and return the batch."""
        batch = self.outstanding.pop(number)
        self.last_event = time.monotonic()

        self.tokens_per_batch = max(min(self.tokens_per_batch, padded_tokens(batch) // 2), 1)
        return batch

    def note_death(self) -> tuple[list[list[Request]], list[list[Request]]]:
        """Count a death; return the batches that it was scoring, and those that lay ready."""
        # Batches are scored in the order in which they were sent.
        batches = list(self.outstanding.values())
        being_scored = batches[: self.batches_at_once]
        ready = batches[self.batches_at_once :]
        self.outstanding.clear()
        self.stop()

        # It may have died of a lack of memory that was never reported.
        self.tokens_per_batch = max(self.tokens_per_batch // 2, 1)

        # Where it scored single rows only, one of them may kill workers, and will be given up soon.
        # Such a death does not count against the worker.
        had_single_rows = bool(being_scored) and all(len(batch) == 1 for batch in being_scored)
        if not had_single_rows:
            self.deaths_without_score += 1
        self.gone = self.deaths_without_score >= MOST_DEATHS_WITHOUT_SCORE
        return being_scored, ready

    def stop(self) -> None:
        """End the process, whatever it is doing; its device is free afterwards."""
        if self.process:
            self.connection.close()
            self.process.kill()
            self.process.join(JOIN_SECONDS)
        self.process = None
        self.loaded = None


def start_process(task: Assignment) -> tuple:
    """Start a process for a task; return it and the pipe to it."""
    # CUDA does not survive a fork.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=run_worker, args=(theirs, task), daemon=True)
    process.start()

    # With the process's own end alone open, its death closes the pipe.
    theirs.close()
    return process, ours


def start_workers(
    package: Package,
    package_settings: PackageSettings,
    devices: Mapping[int, str],
    tokens_per_batch: int,
    threads: int,
    clock: Clock,
) -> list[Worker]:
    """Start the workers of a package, which load it by themselves.

    Args:
        package: What they load.
        package_settings: Its placement: `each` starts a worker with a copy of the model for each
            device, `split` one worker with the model's layers over all of them.
        devices: PyTorch's names by position.
        tokens_per_batch: Their token budget, until memory runs out.
        threads: Of the CPU, for each worker.
        clock: For the log.
    """
    # The positions of each worker's devices.
    position_groups = [(position,) for position in devices]
    if package_settings.placement == "split":
        position_groups = [tuple(devices)]

    workers = []
    for positions in position_groups:
        device_names = tuple(devices[position] for position in positions)
        task = Assignment(
            str(package.folder),
            device_names,
            positions[0],
            threads,
            package_settings.weight_bytes_limit,
        )
        # Two workers may stand on one CPU.
        name = f"worker {positions[0]} on {'+'.join(device_names)}"
        worker = Worker(name, task, tokens_per_batch, start_process, positions)
        worker.launch()
        workers.append(worker)

    names = ", ".join(worker.name for worker in workers)
    log(clock, f"{package.folder.name}: loading in {names}")
    return workers


def leave() -> None:
    """End this process at once where a worker's is stuck: it would be waited for for ever."""
    if multiprocessing.active_children():
        sys.stdout.flush()
        os._exit(0)
