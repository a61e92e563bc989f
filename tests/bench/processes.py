"""Fresh processes for what is measured: nothing that ran before, neither memory nor threads, counts in a figure."""

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor


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
