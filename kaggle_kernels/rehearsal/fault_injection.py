"""Fault injection: workers of the running kernel are killed, as a GPU that fails would end them.

sandbox.py runs the kernel inside `inject_faults`; rehearse.py calls `check_faults` before the run
and `check_kills` after it. Every kill is printed, and written to rehearsal.json.

A worker is a descendant of the kernel's process that is named "worker N", where N is the number of
its device. Linux only.
"""

import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from preprocess.core.errors import UserError

PROC = Path("/proc")
POLL_SECONDS = 0.05
WORKER_NAME = re.compile(r"worker (\d+)")

# In /proc/PID/stat: a zombie, which its parent has not waited for yet, and a dead process.
DEAD_STATES = ("Z", "X")


@dataclass(frozen=True)
class Faults:
    """What happens to the kernel's workers; by default nothing.

    Attributes:
        kill_every: Kill one worker every so many seconds, in turn, counted from when the first
            worker appears.
        lose_device: Kill every worker of this device as soon as it appears.
        seed: Decides which worker is killed first.
    """

    kill_every: float | None = None
    lose_device: int | None = None
    seed: int = 0

    @property
    def kills_workers(self) -> bool:
        """Whether anything happens at all."""
        return self.kill_every is not None or self.lose_device is not None


@dataclass(frozen=True)
class Kill:
    """A worker that was killed, so many seconds after the kernel began."""

    worker: int
    pid: int
    seconds: float


@dataclass(frozen=True)
class Process:
    """A living process of this machine."""

    pid: int
    parent: int
    name: str


def check_faults(faults: Faults, devices: int | None) -> None:
    """Raise UserError if the faults cannot happen on so many CPU workers.

    `devices` is None for the kernel's own choice, which is at least one device.
    """
    if faults.kills_workers and not PROC.is_dir():
        raise UserError(
            f"--kill-every, --lose-device: no {PROC}, in which workers are found; "
            "rehearse faults on Linux"
        )

    certain_devices = 1 if devices is None else devices
    lost = faults.lose_device
    if lost is not None and lost >= certain_devices:
        raise UserError(
            f"--lose-device: there is no device {lost} of {certain_devices}; "
            f"give --devices {lost + 1} or more"
        )


def check_kills(faults: Faults, kills: Sequence[Kill], seconds: float) -> None:
    """Raise UserError if a fault did not happen in a run of `seconds`: it would prove nothing."""
    killed_workers = {kill.worker for kill in kills}
    if faults.lose_device is not None and faults.lose_device not in killed_workers:
        raise UserError(
            f"--lose-device: no process named worker {faults.lose_device} appeared; "
            "nothing was killed"
        )
    if faults.kill_every is not None and not kills:
        raise UserError(
            f"--kill-every: the kernel ended after {seconds:.0f} s and no worker was killed; "
            "give fewer seconds, or more --rows"
        )


@contextlib.contextmanager
def inject_faults(kernel_pid: int, faults: Faults) -> Iterator[list[Kill]]:
    """Kill workers of a kernel while the block runs.

    Args:
        kernel_pid: The process id of the kernel.
        faults: What happens to its workers.

    Returns:
        A list that grows with every kill.
    """
    kills: list[Kill] = []
    if not faults.kills_workers:
        yield kills
        return

    stop = threading.Event()
    killer = threading.Thread(target=kill_until_stopped, args=(kernel_pid, faults, kills, stop))
    killer.start()
    try:
        yield kills
    finally:
        stop.set()
        killer.join()


def kill_until_stopped(
    kernel_pid: int, faults: Faults, kills: list[Kill], stop: threading.Event
) -> None:
    """Look for workers every POLL_SECONDS, and kill those whose turn it is, until `stop` is set."""
    began = time.monotonic()
    next_kill_at = None  # seconds after `began`, once the first worker has appeared
    last_victim = None

    while not stop.wait(POLL_SECONDS):
        seconds = time.monotonic() - began
        workers = find_workers(kernel_pid)

        # A killed process stays in /proc for a moment.
        for kill in kills:
            if workers.get(kill.worker) == kill.pid:
                del workers[kill.worker]

        # The lost device: its worker never lives for long.
        if faults.lose_device in workers:
            pid = workers.pop(faults.lose_device)
            kill_worker(faults.lose_device, pid, seconds, kills)

        # The regular kills: the first one is due `kill_every` seconds after a worker was seen.
        if faults.kill_every is None or not workers:
            continue
        if next_kill_at is None:
            next_kill_at = seconds + faults.kill_every
        if seconds >= next_kill_at:
            last_victim = choose_victim(sorted(workers), last_victim, faults.seed)
            kill_worker(last_victim, workers[last_victim], seconds, kills)
            next_kill_at += faults.kill_every


def choose_victim(workers: Sequence[int], last_victim: int | None, seed: int) -> int:
    """Choose the next worker to kill: the workers, in ascending order, take turns.

    The seed decides the first victim, when there is no `last_victim` yet.
    """
    if last_victim is None:
        return workers[seed % len(workers)]

    for worker in workers:
        if worker > last_victim:
            return worker
    return workers[0]


def kill_worker(worker: int, pid: int, seconds: float, kills: list[Kill]) -> None:
    """Kill a worker, print that and add it to `kills`, unless it has just ended by itself."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        kills.append(Kill(worker, pid, round(seconds, 1)))
        print(f"[rehearsal] killed worker {worker} (pid {pid}) after {seconds:.1f} s", flush=True)


def find_workers(kernel_pid: int) -> dict[int, int]:
    """Find the kernel's living workers: their process ids, by the numbers of their devices."""
    # Other kernels on this machine have workers of the same names.
    processes = list_processes()
    workers = {}
    for process in processes.values():
        match = WORKER_NAME.fullmatch(process.name)
        if match and is_descendant(process, kernel_pid, processes):
            workers[int(match[1])] = process.pid
    return workers


def is_descendant(process: Process, ancestor: int, processes: Mapping[int, Process]) -> bool:
    """Follow parents upwards, and tell whether `ancestor` is the process itself or one of them."""
    pid = process.pid
    while pid in processes and pid != ancestor:
        pid = processes[pid].parent
    return pid == ancestor


def list_processes() -> dict[int, Process]:
    """List this machine's living processes by their ids."""
    processes = {}
    for folder in PROC.glob("[0-9]*"):
        process = read_process(folder)
        if process is not None:
            processes[process.pid] = process
    return processes


def read_process(folder: Path) -> Process | None:
    """Read /proc/PID/stat, "PID (NAME) STATE PARENT …"; None where the process has ended."""
    try:
        stat = (folder / "stat").read_text(errors="replace")
    except OSError:
        return None

    # The name may contain spaces and parentheses itself: its end is the last one.
    pid_and_name, _, rest = stat.rpartition(")")
    pid, _, name = pid_and_name.partition(" (")
    state, parent = rest.split()[:2]
    if state in DEAD_STATES:
        return None
    return Process(int(pid), int(parent), name)
