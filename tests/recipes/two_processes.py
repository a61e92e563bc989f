"""`axolotl train` with two processes on the CPU, as with two GPUs: by Axolotl's own launcher, or as two forks.

The forks (see tests/forked.py) have what torchrun would set, and take a third of the time.
"""

import os
import socket
import subprocess
from multiprocessing import Process
from pathlib import Path

from tests import forked
from tests.conftest import ROOT

PROCESSES = 2
ON_CPUS = {"ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu"}


def launch(recipe: Path) -> None:
    """Train a recipe to its end, started by torchrun, as a user starts it."""
    command = ["axolotl", "train", str(recipe), "--launcher", "torchrun", "--", "--nproc_per_node", str(PROCESSES)]
    environment = os.environ | ON_CPUS | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, cwd=ROOT, check=False)
    assert ended.returncode == 0, (ended.stdout + ended.stderr)[-3000:]


def start(recipe: Path, **options) -> list[Process]:
    """Begin to train a recipe with options such as auto_resume_from_checkpoints=True; return the processes by their rank.

    What the first prints goes into the recipe's .log, what the second prints into .1.log.
    """
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    everywhere = ON_CPUS | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    everywhere |= {"WORLD_SIZE": str(PROCESSES), "LOCAL_WORLD_SIZE": str(PROCESSES)}

    processes = []
    for rank in range(PROCESSES):
        environment = everywhere | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        log = recipe.with_suffix(".log" if rank == 0 else f".{rank}.log")
        processes.append(forked.start("train", recipe, environment, log, **options))
    return processes


def train(recipe: Path, **options) -> None:
    """Train a recipe to its end as two forks."""
    processes = start(recipe, **options)
    forked.wait(processes)
    codes = [process.exitcode for process in processes]
    assert codes == [0, 0], recipe.with_suffix(".log").read_text(errors="replace")[-3000:]
