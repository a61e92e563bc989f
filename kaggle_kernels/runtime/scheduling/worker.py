"""A process for each device: it loads a model, then scores the batches that come through its pipe until the pipe closes.

A model that one device cannot hold has one process with several devices, its layers over all of them, and a thread for each.
A process, because a CUDA error takes a whole process with it, and because two threads share one Python. What the kernel's own
process does when one dies: engine.handle_worker_death.

To the worker: (number, requests). From it:
    ("loaded", facts)                             dtype, batches_at_once, seconds, worst golden difference
    ("scored", number, BatchScores, bytes)        bytes: the most memory used so far, one number for each device
    ("out of memory", number)                     it lives on; the batch is to be cut
    ("refused", sentence)                         the package is not what was packaged: nothing would mend that
    ("failed", traceback)                         and its end
"""

import contextlib
import gc
import json
import os
import queue
import resource
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from kaggle_kernels.runtime.models.model import load_model
from kaggle_kernels.runtime.models.pipeline import Stages, stage_starts
from kaggle_kernels.runtime.models.placement import split_over
from kaggle_kernels.runtime.models.scoring import score, score_batch
from kaggle_kernels.runtime.package import Package, PackageError, execute_model_input, read_tokenizer

GOLDEN_TOLERANCE = 0.05  # float16 and 4-bit kernels differ between devices by up to 0.02; a wrong head by far more
MEMORY_WORDS = ("CUDA error: out of memory", "_ALLOC_FAILED", "DefaultCPUAllocator: can't allocate memory")


@dataclass(frozen=True)
class Assignment:
    """What a worker is to load: the package in `folder`, on `devices` (several: its layers over them), with CPU `threads`."""

    folder: str
    devices: tuple[str, ...]
    position: int
    threads: int
    weight_bytes_limit: int | None = None  # of each device, for a model that is split


def run_worker(connection, task: Assignment) -> None:
    """The process: work until the pipe closes. It leaves at once then, whatever its threads and CUDA are at."""
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(f"worker {task.position}", encoding="utf-8")  # as top and ps show it
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(task.threads)
    work(connection, task)
    os._exit(0)


def work(connection, task: Assignment) -> None:
    """Load, then score until the other end of the pipe is closed or something fails."""
    began, device = time.monotonic(), task.devices[0]
    try:
        if device.startswith("cuda"):
            torch.cuda.set_device(device)  # else libraries that ask for no device take memory of the first GPU
        package = open_package(Path(task.folder))
        model, stages = load_on(package, task.devices, task.weight_bytes_limit)
        worst = check_golden_scores(package, model, device)
    except (PackageError, FloatingPointError) as error:
        return tell(connection, "refused", f"{type(error).__name__}: {error}")
    except Exception:
        return tell(connection, "failed", traceback.format_exc())
    at_once = len(stages.locks) if stages else 1
    facts = {"dtype": str(model.dtype), "batches_at_once": at_once, "worst": worst, "seconds": time.monotonic() - began}
    tell(connection, "loaded", facts)

    def score_requests(requests):
        passing = stages.batch if stages else contextlib.nullcontext
        with torch.cuda.device(device) if device.startswith("cuda") else contextlib.nullcontext():  # it is each thread's own
            return score_batch(model, package.model_input, package.contract, requests, device, passing)

    serve(connection, score_requests, at_once, lambda: memory_bytes(task.devices))


def open_package(folder: Path) -> Package:
    """A package whose files were checked before (see package.read_package), as this process needs it."""
    model_input = execute_model_input(folder / "model_input.py")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return Package(folder, model_input.read_contract(folder), manifest, model_input, read_tokenizer(folder))


def load_on(
    package: Package, devices: tuple[str, ...], weight_bytes_limit: int | None = None
) -> tuple[torch.nn.Module, Stages | None]:
    """The model on a device, or split over several, then with its stages."""
    if len(devices) == 1:
        return load_model(package.folder, package.contract, devices[0]), None
    device_map = split_over(package.folder, devices, weight_bytes_limit)
    model = load_model(package.folder, package.contract, devices[0], device_map=device_map)
    return model, Stages(model, stage_starts(device_map), devices)


def check_golden_scores(package: Package, model: torch.nn.Module, device: str) -> float:
    """The largest difference from the manifest's golden probabilities; over GOLDEN_TOLERANCE it is a PackageError."""
    pairs = [package.model_input.pair_from_row(row["pair"]) for row in package.contract.golden]
    contract = package.contract
    settings = {"orders": ("as_given",), "tokens_per_batch": contract.budget_tokens, "device": device}
    found = score(model, package.model_input, package.tokenizer, contract, pairs, **settings)
    worst = 0.0
    for golden in package.manifest["golden"]:
        values = found[golden["id"]]["as_given"]
        worst = max([worst, *(abs(f - e) for f, e in zip(values, golden["probabilities"], strict=True))])
        if worst > GOLDEN_TOLERANCE:
            raise PackageError(
                f"{package.folder}: golden row {golden['id']} scores {values} on {device}, the package recorded "
                f"{golden['probabilities']}; weights, head, pad id or attention are not those that were packaged"
            )
    return worst


def serve(connection, score_requests, at_once: int, memory) -> None:
    """Score what comes in, `at_once` batches at a time; `score_requests` gives a batch's BatchScores, `memory` its bytes.

    Batches are read as they come, so that the next one lies ready when one is done.
    """
    inbox, lock = queue.SimpleQueue(), threading.Lock()

    def score_from_inbox():
        while message := inbox.get():
            number, requests = message
            try:
                answer = ("scored", number, score_requests(requests), memory())
            except Exception as error:
                is_too_large = lacks_memory(error, len(requests))
                answer = ("out of memory", number) if is_too_large else ("failed", traceback.format_exc())
            if answer[0] == "out of memory":
                free_memory()
            with lock:
                tell(connection, *answer)
            if answer[0] == "failed":
                return  # a CUDA error stays with its process: the other end will kill it

    for _ in range(at_once):
        threading.Thread(target=score_from_inbox, daemon=True).start()
    with contextlib.suppress(EOFError, OSError):
        while True:
            inbox.put(connection.recv())
    for _ in range(at_once):
        inbox.put(None)


def lacks_memory(error: Exception, rows: int) -> bool:
    """Whether a batch of so many rows was too large: PyTorch says so of its own memory, CUDA's libraries only in words.

    By those words a row that is alone is no batch to be cut; only a new process may help it.
    """
    said = any(words in str(error) for words in MEMORY_WORDS) or isinstance(error, MemoryError)
    return isinstance(error, torch.OutOfMemoryError) or (said and rows > 1)


def tell(connection, *message) -> None:
    """Send a message; where nobody listens any more there is nothing to tell."""
    with contextlib.suppress(OSError):
        connection.send(message)


def free_memory() -> None:
    """Give the memory of a batch that failed back to its device."""
    gc.collect()
    if torch.cuda.is_initialized():
        with contextlib.suppress(RuntimeError):  # a broken device raises its error again; the next batch then ends the worker
            torch.cuda.empty_cache()


def memory_bytes(devices: tuple[str, ...]) -> list[int]:
    """The most memory that PyTorch took so far on each GPU, or this process on the CPU."""
    if devices[0].startswith("cuda"):
        return [torch.cuda.max_memory_reserved(device) for device in devices]
    return [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]
