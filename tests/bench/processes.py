"""Fresh processes for what is measured: nothing that ran before, neither memory nor threads, counts in a figure.

Besides, the commands that `make compare` and `make ladder` run.
"""

import multiprocessing
import os
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor

from preprocess.core.errors import UserError


def fresh_process(imports: Sequence[str] = ()) -> ProcessPoolExecutor:
    """One process that has imported nothing but the module of what it runs, and prints nothing.

    With `imports`, modules that take long, it is a fork of a server that has imported them and computed nothing.
    """
    context = multiprocessing.get_context("spawn")
    if imports:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(imports))
    return ProcessPoolExecutor(1, context, initializer=silence)


def silence() -> None:
    """Drop what this process, its libraries and its children print."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def in_process(function: Callable, *arguments, imports: Sequence[str] = ()):
    """Return what `function` returns in a fresh process; its exceptions are raised here."""
    with fresh_process(imports) as process:
        return process.submit(function, *arguments).result()


def run_command(*command: str, **environment: str) -> None:
    """Run a command with some variables of the environment, and raise UserError where it fails."""
    variables = os.environ | {"AXOLOTL_DO_NOT_TRACK": "1"} | environment
    exit_code = subprocess.run(command, env=variables, check=False).returncode
    if exit_code:
        words = " ".join(command)
        raise UserError(f"`{words}` ended with exit code {exit_code}; run this again to go on from here")
