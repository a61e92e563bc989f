"""A process for each device: it loads a model, then scores the batches that come through its pipe.

A model that one device cannot hold has one process with several devices, its layers over all of
them, and a thread for each. A process, because a CUDA error takes a whole process with it, and
because two threads share one Python. What the kernel's own process does when one dies:
pass_runner.handle_worker_death.

To the worker: (number, requests). From it:
    ("loaded", facts)                         dtype, batches_at_once, seconds, worst difference
    ("scored", number, BatchScores)
    ("out of memory", number)                 it lives on; the batch is to be cut
    ("refused", sentence)                     the package is not what was packaged
    ("failed", traceback)                     and its end
"""

import contextlib
import gc
import os
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from kaggle_kernels.runtime.models.model import load_model
from kaggle_kernels.runtime.models.pipeline import Stages, stage_starts
from kaggle_kernels.runtime.models.placement import split_over
from kaggle_kernels.runtime.models.scoring import BatchScores, Request, score, score_batch
from kaggle_kernels.runtime.package import Package, PackageError, open_package

# float16 and 4-bit kernels differ between devices by up to 0.02; a wrong head by far more.
GOLDEN_TOLERANCE = 0.05
MEMORY_WORDS = (
    "CUDA error: out of memory",
    "_ALLOC_FAILED",
    "DefaultCPUAllocator: can't allocate memory",
)


@dataclass(frozen=True)
class Assignment:
    """What a worker is to load, and where."""

    folder: str  # of the package
    devices: tuple[str, ...]  # several: the model's layers over them
    position: int  # of the first device
    threads: int  # of the CPU
    weight_bytes_limit: int | None = None  # of each device, for a model that is split


def run_worker(connection, task: Assignment) -> None:
    """Run the process until the pipe closes; leave at once then, whatever its threads are at."""
    with contextlib.suppress(OSError):
        name = f"worker {task.position}"  # as top and ps show it
        Path("/proc/self/comm").write_text(name, encoding="utf-8")

    # Several workers write to one log, where progress bars would run into each other.
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(task.threads)
    work(connection, task)
    os._exit(0)


def work(connection, task: Assignment) -> None:
    """Load a package's model, then score the batches that come until the pipe is closed."""
    began = time.monotonic()
    first_device = task.devices[0]
    try:
        # Libraries that name no device would take memory of the first GPU.
        if first_device.startswith("cuda"):
            torch.cuda.set_device(first_device)
        package = open_package(Path(task.folder))
        model, stages = load_on(package, task.devices, task.weight_bytes_limit)
        worst_difference = check_golden_scores(package, model, first_device)
    except (PackageError, FloatingPointError) as error:
        return send_message(connection, "refused", f"{type(error).__name__}: {error}")
    except Exception:
        return send_message(connection, "failed", traceback.format_exc())

    # Each stage of a split model works on a batch of its own.
    batches_at_once = len(stages.locks) if stages else 1
    facts = {
        "dtype": str(model.dtype),
        "batches_at_once": batches_at_once,
        "worst": worst_difference,
        "seconds": time.monotonic() - began,
    }
    send_message(connection, "loaded", facts)

    def score_requests(requests: list[Request]) -> BatchScores:
        pass_context = stages.forward_pass if stages else contextlib.nullcontext
        # Each thread has a current device of its own.
        if first_device.startswith("cuda"):
            torch.cuda.set_device(first_device)
        return score_batch(
            model, package.model_input, package.contract, requests, first_device, pass_context
        )

    serve(connection, score_requests, batches_at_once)


def load_on(
    package: Package, devices: tuple[str, ...], weight_bytes_limit: int | None = None
) -> tuple[torch.nn.Module, Stages | None]:
    """Load a package's model on its device, or split over several of them.

    Returns:
        The model; and the stages of a split one, through which batches go one behind the other, else None.
    """
    if len(devices) == 1:
        return load_model(package.folder, package.contract, devices[0]), None

    # The first device gets the inputs, and each a stretch of the layers.
    device_map = split_over(package.folder, devices, weight_bytes_limit)
    model = load_model(package.folder, package.contract, devices[0], device_map=device_map)
    return model, Stages(model, stage_starts(device_map), devices)


def check_golden_scores(package: Package, model: torch.nn.Module, device: str) -> float:
    """Score the golden rows, twenty awkward pairs, and compare with the probabilities that packaging wrote down.

    Returns:
        The largest difference.

    Raises:
        PackageError: It is over GOLDEN_TOLERANCE.
    """
    contract = package.contract

    # By the same code as any other row.
    pairs = [package.model_input.pair_from_row(row["pair"]) for row in contract.golden]
    scores = score(
        model,
        package.model_input,
        package.tokenizer,
        contract,
        pairs,
        orders=("as_given",),
        tokens_per_batch=contract.budget_tokens,
        device=device,
    )

    # The largest difference is logged even where it is within the tolerance.
    worst_difference = 0.0
    for golden in package.manifest["golden"]:
        values = scores[golden["id"]]["as_given"]
        for value, expected in zip(values, golden["probabilities"], strict=True):
            worst_difference = max(worst_difference, abs(value - expected))
        if worst_difference > GOLDEN_TOLERANCE:
            raise PackageError(
                f"{package.folder}: golden row {golden['id']} scores {values} on {device}, the "
                f"package recorded {golden['probabilities']}; weights, head, pad id or attention "
                "are not those that were packaged"
            )
    return worst_difference


def serve(connection, score_requests: Callable, batches_at_once: int) -> None:
    """Score the batches that come through the pipe until it is closed, or until something fails.

    `batches_at_once` of them are scored at the same time, each in a thread of its own.
    """
    receiving = threading.Lock()
    sending = threading.Lock()
    arguments = (connection, receiving, sending, score_requests)

    threads = []
    for _ in range(batches_at_once):
        thread = threading.Thread(target=score_until_closed, args=arguments, daemon=True)
        thread.start()
        threads.append(thread)
    for thread in threads:
        thread.join()


def score_until_closed(
    connection, receiving: threading.Lock, sending: threading.Lock, score_requests: Callable
) -> None:
    """Receive a batch, score it and send the answer, until the pipe is closed or a batch fails.

    The locks let one thread at a time read from the pipe, and one write to it.
    """
    while True:
        try:
            with receiving:
                number, requests = connection.recv()
        except (EOFError, OSError):
            return

        kind, *content = answer_batch(number, requests, score_requests)
        with sending:
            send_message(connection, kind, *content)

        # A CUDA error stays with its process. The kernel's own process will start a new one.
        if kind == "failed":
            return


def answer_batch(number: int, requests: list[Request], score_requests) -> tuple:
    """Score a batch; return the message to the kernel's own process."""
    try:
        return ("scored", number, score_requests(requests))
    except Exception as error:
        if not lacks_memory(error, len(requests)):
            return ("failed", traceback.format_exc())
    free_memory()
    return ("out of memory", number)


def lacks_memory(error: Exception, rows: int) -> bool:
    """Tell whether an error means that a batch of so many rows was too large for memory."""
    # PyTorch has a class for that.
    if isinstance(error, torch.OutOfMemoryError):
        return True

    # Other libraries raise MemoryError, or say so only in words. That counts for a batch of several
    # rows, which can be cut. One row cannot, and a new process may have more memory for it.
    has_words = any(words in str(error) for words in MEMORY_WORDS)
    return rows > 1 and (has_words or isinstance(error, MemoryError))


def send_message(connection, *message) -> None:
    """Send a message, unless nobody listens any more."""
    with contextlib.suppress(OSError):
        connection.send(message)


def free_memory() -> None:
    """Give the memory of a batch that failed back to its device."""
    gc.collect()
    if torch.cuda.is_initialized():
        # A broken device raises its error again; the next batch then ends the worker.
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()
