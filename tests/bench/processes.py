"""Fresh processes for what is measured: nothing that ran before, neither memory nor threads, counts in a figure."""

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor


def fresh_process() -> ProcessPoolExecutor:
    """One process that has imported nothing but the module of what it runs, and prints nothing."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=silence)


def silence() -> None:
    """Drop what this process, its libraries and its children print."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def in_process(function: Callable, *arguments):
    """Return what `function` returns in a fresh process; its exceptions are raised here."""
    with fresh_process() as process:
        return process.submit(function, *arguments).result()
