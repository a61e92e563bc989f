"""`axolotl train` in forks of one process that has imported Axolotl: seconds a run where a fresh start takes twenty.

The forks come from a server process that has imported but never computed, so that no thread pool is inherited.
"""

import importlib
import multiprocessing
import os
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.forked_imports"])


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit code and everything that it printed."""

    code: int
    output: str


def axolotl(command: str, recipe: Path, environment: dict[str, str] | None = None, **options) -> Ended:
    """Run `axolotl COMMAND RECIPE` with options such as base_model=… in a fork."""
    process = start(command, recipe, environment, **options)
    wait([process])
    return Ended(process.exitcode, recipe.with_suffix(".log").read_text(errors="replace"))


def train(recipe: Path, environment: dict[str, str] | None = None, **options) -> str:
    """Train a recipe to its end in a fork, and return what it printed."""
    ended = axolotl("train", recipe, environment, **options)
    assert ended.code == 0, ended.output[-3000:]
    return ended.output


def wait(processes: list[multiprocessing.Process]) -> None:
    """Wait for runs to end; those that still run after nine minutes are killed."""
    deadline = time.monotonic() + 540
    for process in processes:
        process.join(timeout=max(deadline - time.monotonic(), 0))
    for process in processes:
        process.kill()
        process.join()


def start(
    command: str, recipe: Path, environment: dict[str, str] | None = None, log: Path | None = None, **options
) -> multiprocessing.Process:
    """Begin such a run; what it prints goes into `log`, by default the recipe's .log."""
    log = log or recipe.with_suffix(".log")
    process = SERVER.Process(target=_run, args=(command, str(recipe), str(log), environment or {}, options))
    process.start()
    return process


def _run(command: str, recipe: str, log: str, environment: dict[str, str], options: dict) -> None:
    # One thread is set below. This variable would say that accelerate's launcher chose it, which training overrules.
    os.environ.pop("OMP_NUM_THREADS", None)
    os.environ |= environment
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    sys.argv = ["axolotl", command, recipe]
    # A fork server's children would start the data loader's workers from fork servers of their own, five seconds each.
    multiprocessing.set_start_method("fork", force=True)
    import torch

    torch.set_num_threads(1)
    try:
        module = importlib.import_module(f"axolotl.cli.{command.replace('-', '_')}")
        if command == "quantize":
            module.do_quantize(recipe, {})
        else:
            module.do_cli(config=recipe, **options)
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        raise SystemExit(1) from None
