"""`axolotl train` with two processes on the CPU, started by Axolotl's own launcher, as several GPUs are."""

import os
import subprocess
from pathlib import Path

from tests.conftest import ROOT

TWO_PROCESSES = ("--launcher", "torchrun", "--", "--nproc_per_node", "2")
ON_CPUS = {"ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def start(recipe: Path, *options: str) -> subprocess.Popen:
    """Begin to train a recipe; what the processes print goes into the recipe's .log."""
    with recipe.with_suffix(".log").open("wb") as log:
        command = ["axolotl", "train", str(recipe), *options, *TWO_PROCESSES]
        return subprocess.Popen(command, env=os.environ | ON_CPUS, stdout=log, stderr=log, cwd=ROOT)


def train(recipe: Path, *options: str) -> None:
    """Train a recipe to its end."""
    process = start(recipe, *options)
    try:
        code = process.wait(timeout=400)
    finally:
        process.kill()
    assert code == 0, recipe.with_suffix(".log").read_text(errors="replace")[-3000:]
