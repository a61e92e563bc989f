"""Fault injection: workers of the running kernel are killed, or its clock comes to its end early.

sandbox.py runs the kernel inside `inject_faults`; rehearse.py calls `check_faults` before the run
and `check_happened` after it. Every kill is printed, and written to rehearsal.json. A clock is ended
by a signal, upon which sitecustomize.py puts the kernel's time far ahead: so a test may count on
rows, and not on how fast a machine is.

A worker is a descendant of the kernel's process that is named "worker N", where N is the number of
its device. Linux only.
"""

import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from kaggle_kernels.rehearsal.scenario import Scenario
from preprocess.core.errors import UserError

PROC = Path("/proc")
POLL_SECONDS = 0.05

# A line of the kernel's log: "demo, as_given: 120 of 300 rows, 41.3 rows/s".
PROGRESS = re.compile(r": (\d+) of (\d+) rows, .* rows/s")
WORKER_NAME = re.compile(r"worker (\d+)")


@dataclass(frozen=True)
class Kill:
    """A worker that was killed, so many seconds after the kernel began."""

    worker: int
    pid: int
    seconds: float


def kills_workers(scenario: Scenario) -> bool:
    """Whether workers are killed."""
    return scenario.kill_every is not None or scenario.lose_all_at is not None


def check_faults(scenario: Scenario) -> None:
    """Raise UserError if workers are to be killed on a system where they cannot be found."""
    if kills_workers(scenario) and not PROC.is_dir():
        raise UserError(
            f"--kill-every, --lose-all-at: workers are found in {PROC}, which this system lacks; "
            "rehearse these faults on Linux"
        )


def check_happened(
    scenario: Scenario, kills: Sequence[Kill], clock_ended: bool, seconds: float
) -> None:
    """Raise UserError where a fault that the scenario asks for did not happen: such a run proves nothing.

    The kernel ran for `seconds`; `kills` and `clock_ended` are the faults that happened.
    """
    if scenario.end_clock_at is not None and not clock_ended:
        raise UserError(
            f"--end-clock-at: the log never said that {scenario.end_clock_at} rows were scored while "
            "the kernel ran; give a smaller number, or more --rows"
        )
    if scenario.lose_all_at is not None and not kills:
        raise UserError(
            "--lose-all-at: no worker was alive when the log said that so many rows were scored; "
            "give a smaller share, or more --rows"
        )
    if scenario.kill_every is not None and not kills:
        raise UserError(
            f"--kill-every: the kernel ended after {seconds:.0f} s and no worker was killed; "
            "give fewer seconds, or more --rows"
        )


@dataclass
class Injection:
    """What happens while a kernel runs: its faults so far, and how far its log says that it is."""

    kills: list[Kill] = field(default_factory=list)
    clock_ended: bool = False
    scored_share: float = 0.0  # of a pass's rows
    rows_of_pass: int = 0
    rows_of_earlier_passes: int = 0
    stop: threading.Event = field(default_factory=threading.Event)

    def read_log_line(self, line: str) -> None:
        """Note how many rows are scored, where a line of the kernel's log says so."""
        match = PROGRESS.search(line)
        if not match:
            return
        scored = int(match[1])
        self.scored_share = max(self.scored_share, scored / int(match[2]))

        # A new pass begins with few rows again.
        if scored < self.rows_of_pass:
            self.rows_of_earlier_passes += self.rows_of_pass
        self.rows_of_pass = scored

    def end_clock_if_due(self, kernel_pid: int, end_clock_at: int | None) -> None:
        """Put the kernel's clock to its end, once `end_clock_at` rows are scored; None: never."""
        rows_scored = self.rows_of_earlier_passes + self.rows_of_pass
        if end_clock_at is None or self.clock_ended or rows_scored < end_clock_at:
            return

        self.clock_ended = True
        print("[rehearsal] the kernel's clock is put to its end", flush=True)
        with contextlib.suppress(ProcessLookupError):
            os.kill(kernel_pid, signal.SIGUSR1)


@contextlib.contextmanager
def inject_faults(kernel_pid: int, scenario: Scenario) -> Iterator[Injection]:
    """Inject faults into a kernel while the block runs; yield what happens."""
    injection = Injection()
    if not kills_workers(scenario) and scenario.end_clock_at is None:
        yield injection
        return

    injector = threading.Thread(target=inject_until_stopped, args=(kernel_pid, scenario, injection))
    injector.start()
    try:
        yield injection
    finally:
        injection.stop.set()
        injector.join()


def inject_until_stopped(kernel_pid: int, scenario: Scenario, injection: Injection) -> None:
    """Look every POLL_SECONDS which fault is due, until the kernel has ended."""
    kills = injection.kills
    began = time.monotonic()
    next_kill_at = None  # seconds after `began`; None until the first worker has appeared

    while not injection.stop.wait(POLL_SECONDS):
        seconds = time.monotonic() - began
        injection.end_clock_if_due(kernel_pid, scenario.end_clock_at)
        workers = find_workers(kernel_pid)

        # A killed process is still listed for a moment.
        for kill in kills:
            if workers.get(kill.worker) == kill.pid:
                del workers[kill.worker]

        # Once the devices are lost, every worker is killed as soon as it appears.
        if scenario.lose_all_at is not None and injection.scored_share >= scenario.lose_all_at:
            for worker, pid in workers.items():
                kill_worker(worker, pid, seconds, kills)
            continue

        # Regular kills begin `kill_every` seconds after the first worker has appeared.
        if scenario.kill_every is None or not workers:
            continue
        if next_kill_at is None:
            next_kill_at = seconds + scenario.kill_every
        if seconds >= next_kill_at:
            # The workers take turns: the number of kills so far says whose turn it is.
            victim = sorted(workers)[len(kills) % len(workers)]
            kill_worker(victim, workers[victim], seconds, kills)
            next_kill_at += scenario.kill_every


def kill_worker(worker: int, pid: int, seconds: float, kills: list[Kill]) -> None:
    """Kill a worker, print that and add it to `kills`, unless it has just ended by itself."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        kills.append(Kill(worker, pid, round(seconds, 1)))
        print(f"[rehearsal] killed worker {worker} (pid {pid}) after {seconds:.1f} s", flush=True)


def find_workers(kernel_pid: int) -> dict[int, int]:
    """Find the kernel's living workers: their process ids, by the numbers of their devices."""
    # Only descendants: other kernels on this machine have workers of the same names.
    workers = {}
    with contextlib.suppress(psutil.NoSuchProcess):  # the kernel may have ended
        for process in psutil.Process(kernel_pid).children(recursive=True):
            number = read_worker_number(process)
            if number is not None:
                workers[number] = process.pid
    return workers


def read_worker_number(process: psutil.Process) -> int | None:
    """Read the number of a worker's device from its name; None for other and for dead processes."""
    try:
        name = process.name()
        is_dead = process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return None

    match = WORKER_NAME.fullmatch(name)
    if match is None or is_dead:
        return None
    return int(match[1])
