"""The workers as the kernel's own process sees them: started, given batches, killed, started again.

A worker that dies is started again with half its token budget, which stays halved. One that dies FRUITLESS_DEATHS times in a
row without having loaded its model or scored a batch is given up: its device is gone, and the others go on without it. What
becomes of the rows that it had is decided by engine.handle_worker_death.
"""

import contextlib
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from kaggle_kernels.runtime.models.scoring import Request, padded_tokens
from kaggle_kernels.runtime.package import Package
from kaggle_kernels.runtime.scheduling.worker import Assignment, run_worker
from kaggle_kernels.runtime.settings import Clock, PackageSettings, log

FRUITLESS_DEATHS = 3
JOIN_SECONDS = 30.0  # a killed process may be stuck in a driver


@dataclass
class Worker:
    """One process and its history. Tokens are counted with their padding; `seconds` are those in which it had work."""

    name: str  # its devices, for the log
    task: Assignment
    tokens_per_batch: int
    start: Callable[[Assignment], tuple]  # gives the process and the pipe to it
    positions: tuple[int, ...] = ()  # of its devices
    process: object = None
    connection: object = None
    loaded: dict | None = None  # what the worker said of its model
    gone: bool = False
    outstanding: dict[int, list[Request]] = field(default_factory=dict)
    tokens: int = 0
    seconds: float = 0.0
    load_seconds: float = 0.0
    memory_bytes: list[int] = field(default_factory=list)
    deaths: int = 0
    fruitless: int = 0
    last_event: float = 0.0  # began to load, got its first batch, or gave one back
    numbers: int = 0

    @property
    def batches_at_once(self) -> int:
        """How many batches it scores at the same time: one for each stage of a split model."""
        return self.loaded["batches_at_once"] if self.loaded else 1

    def rate(self) -> float:
        """Tokens a second, from what it has done; 0 before its first batch."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def launch(self) -> None:
        """Start the process, which loads the model."""
        self.loaded = None
        self.last_event = time.monotonic()
        self.process, self.connection = self.start(self.task)

    def send(self, batch: list[Request]) -> None:
        """Give it a batch; one that has died in the meantime is noticed by whoever reads from it."""
        if not self.outstanding:
            self.last_event = time.monotonic()
        self.numbers += 1
        self.outstanding[self.numbers] = batch
        with contextlib.suppress(OSError):
            self.connection.send((self.numbers, batch))

    def note_scored(self, number: int, memory: list[int]) -> list[Request]:
        """Count a batch that was scored, and give it back."""
        batch, now = self.outstanding.pop(number), time.monotonic()
        self.tokens += padded_tokens(batch)
        self.seconds += now - self.last_event
        self.last_event, self.memory_bytes = now, memory
        self.fruitless = 0
        return batch

    def note_out_of_memory(self, number: int) -> list[Request]:
        """Give back a batch that was too large; from now on none is larger than half of it, or than a row that was alone."""
        batch = self.outstanding.pop(number)
        self.last_event = time.monotonic()
        fits = padded_tokens(batch) // 2 if len(batch) > 1 else padded_tokens(batch) - 1
        self.tokens_per_batch = max(min(self.tokens_per_batch, fits), 1)
        return batch

    def note_death(self) -> tuple[list[list[Request]], list[list[Request]]]:
        """Count a death, and give back the batches that it was scoring and those that lay ready."""
        batches = list(self.outstanding.values())
        at_work = batches[: self.batches_at_once]
        self.outstanding.clear()
        self.stop()
        self.deaths += 1
        self.tokens_per_batch = max(self.tokens_per_batch // 2, 1)
        if not (at_work and all(len(batch) == 1 for batch in at_work)):  # a row that kills is given up, not its worker
            self.fruitless += 1
        self.gone = self.fruitless >= FRUITLESS_DEATHS
        return at_work, batches[len(at_work) :]

    def stop(self) -> None:
        """End the process, whatever it is doing; its device is free afterwards."""
        if self.process:
            self.connection.close()
            self.process.kill()
            self.process.join(JOIN_SECONDS)
        self.process, self.loaded = None, None


def start_process(task: Assignment) -> tuple:
    """A new process for `task`, and the pipe to it. Spawned, since CUDA does not survive a fork."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=run_worker, args=(theirs, task), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def start_workers(
    package: Package, served: PackageSettings, devices: Mapping[int, str], tokens_per_batch: int, threads: int, clock: Clock
) -> list[Worker]:
    """A worker with a copy of the model for `each` device, or one with the model `split` over them; they load by themselves.

    `devices` are by position. `threads` are those of the CPU for each worker.
    """
    groups = [tuple(devices)] if served.placement == "split" else [(position,) for position in devices]
    workers = []
    for group in groups:
        names = [devices[position] for position in group]
        name = "+".join(n if n != "cpu" else f"cpu #{position}" for n, position in zip(names, group, strict=True))
        task = Assignment(str(package.folder), tuple(names), group[0], threads, served.weight_bytes_limit)
        workers.append(Worker(name, task, tokens_per_batch, start_process, group))
        workers[-1].launch()
    log(clock, f"{package.folder.name}: loading on {', '.join(worker.name for worker in workers)}")
    return workers


def stop_workers(workers: Sequence[Worker]) -> None:
    """End all the processes."""
    for worker in workers:
        worker.stop()


def leave() -> None:
    """End this process at once where a worker's is stuck: multiprocessing would wait for it for ever."""
    if multiprocessing.active_children():
        sys.stdout.flush()
        os._exit(0)
