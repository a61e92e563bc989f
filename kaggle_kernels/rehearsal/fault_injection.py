"""Workers of a running kernel are killed, as a GPU that breaks would end them. What was done is printed and kept.

A worker is a descendant of the kernel's process that is named "worker N", N being the place of its device. Linux only.
"""

import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from preprocess.core.errors import UserError

PROC = Path("/proc")
POLL_SECONDS = 0.05
NAME = re.compile(r"worker (\d+)")


@dataclass(frozen=True)
class Faults:
    """What is done to a kernel.

    From when the first worker appears, one is killed every `kill_every` seconds, the workers in turn. Every worker of the
    device `lose_device` is killed as soon as it appears.
    """

    kill_every: float | None = None
    lose_device: int | None = None
    seed: int = 0  # decides which worker is killed first


@dataclass(frozen=True)
class Kill:
    """A worker that was killed, so many seconds after the kernel began."""

    worker: int
    pid: int
    seconds: float


def check_faults(faults: Faults, devices: int | None) -> None:
    """Raise UserError where the faults cannot be brought about on so many CPU workers (None: the kernel's own devices)."""
    if (faults.kill_every or faults.lose_device is not None) and not PROC.is_dir():
        raise UserError(
            f"--kill-every, --lose-device: no {PROC}, in which workers are found; rehearse faults on Linux"
        )
    if faults.lose_device is not None and faults.lose_device >= (devices or 1):
        raise UserError(
            f"--lose-device: there is no device {faults.lose_device} of {devices or 1}; give --devices "
            f"{faults.lose_device + 1} or more"
        )


def check_kills(faults: Faults, kills: tuple[Kill, ...], seconds: float) -> None:
    """Raise UserError where a fault that was asked for did not happen: the rehearsal would prove nothing."""
    if faults.lose_device is not None and not any(
        kill.worker == faults.lose_device for kill in kills
    ):
        raise UserError(
            f"--lose-device: no process named worker {faults.lose_device} appeared; nothing was killed"
        )
    if faults.kill_every and not kills:
        raise UserError(
            f"--kill-every: the kernel ended after {seconds:.0f} s and no worker was killed; give fewer seconds, or more --rows"
        )


@contextlib.contextmanager
def sabotaged(kernel: int, faults: Faults | None) -> Iterator[list[Kill]]:
    """Bring the faults about while the block runs, to the kernel of that process id; the list grows with what was done."""
    kills: list[Kill] = []
    stop = threading.Event()
    saboteur = threading.Thread(target=sabotage, args=(kernel, faults or Faults(), kills, stop))
    saboteur.start()
    try:
        yield kills
    finally:
        stop.set()
        saboteur.join()


def sabotage(kernel: int, faults: Faults, kills: list[Kill], stop: threading.Event) -> None:
    """Kill workers until told to stop."""
    if not faults.kill_every and faults.lose_device is None:
        return
    began = time.monotonic()
    due, last = None, None
    while not stop.wait(POLL_SECONDS):
        dying = {kill.pid for kill in kills}
        workers = {worker: pid for worker, pid in find_workers(kernel).items() if pid not in dying}
        after = time.monotonic() - began
        if faults.lose_device in workers:
            kill(workers.pop(faults.lose_device), faults.lose_device, after, kills)
        if faults.kill_every and workers:
            due = due or after + faults.kill_every
            if after >= due:
                last = next_victim(sorted(workers), last, faults.seed)
                kill(workers[last], last, after, kills)
                due += faults.kill_every


def next_victim(workers: list[int], last: int | None, seed: int) -> int:
    """The worker after the `last` one that was killed, in turn; the seed says which is the first."""
    if last is None:
        return workers[seed % len(workers)]
    return next((worker for worker in workers if worker > last), workers[0])


def kill(pid: int, worker: int, after: float, kills: list[Kill]) -> None:
    """End a worker at once, if it is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        kills.append(Kill(worker, pid, round(after, 1)))
        print(f"[rehearsal] killed worker {worker} (pid {pid}) after {after:.1f} s", flush=True)


def find_workers(kernel: int) -> dict[int, int]:
    """The process ids of the kernel's workers that live, by their numbers."""
    names, parents = {}, {}
    for folder in PROC.glob("[0-9]*"):
        try:
            before, _, after = (folder / "stat").read_text(errors="replace").rpartition(")")
        except OSError:
            continue  # it has ended meanwhile
        state, parent = after.split()[:2]
        if state not in "ZX":
            pid, _, name = before.partition(" (")
            names[int(pid)], parents[int(pid)] = name, int(parent)
    found = {}
    for pid, name in names.items():
        above = pid
        while above in parents and above != kernel:
            above = parents[above]
        if (number := NAME.fullmatch(name)) and above == kernel:
            found[int(number[1])] = pid
    return found
