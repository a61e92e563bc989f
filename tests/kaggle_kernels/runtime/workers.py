"""Workers without processes or models: threads at the other end of the pipe, which may be slow, run out of memory, or die."""

import multiprocessing
import os
import socket
import threading
import time

import torch

from kaggle_kernels.runtime.models.scoring import BatchScores, padded_tokens
from kaggle_kernels.runtime.scheduling import worker as runtime_worker
from kaggle_kernels.runtime.scheduling.worker_handle import Worker


class ThreadProcess:
    """What the kernel sees of a process, with a thread in its place.

    A thread can be neither killed nor, while it hangs, joined. Worker.stop closes the pipe first, which ends it.
    """

    exitcode = -9

    def __init__(self, target, connection, task):
        self.thread = threading.Thread(target=target, args=(connection, task), daemon=True)
        self.thread.start()

    def kill(self):
        pass

    def join(self, timeout=None):
        pass


def start_in_thread(task, target=runtime_worker.work):
    """In the place of worker_handle.start_process: the same work in a thread of this process."""
    ours, theirs = multiprocessing.Pipe()
    return ThreadProcess(target, theirs, task), ours


def answer(request):
    """A row's probabilities by its own ids, so that any mix-up shows."""
    first = sum(map(sum, request.sequences)) % 97 / 97
    return [first, 1 - first]


def hang_up(connection):
    """Close the pipe although another thread reads from it, as the end of a process does."""
    with socket.socket(fileno=os.dup(connection.fileno())) as end:
        end.shutdown(socket.SHUT_RDWR)


class Device:
    """A device whose worker's processes all answer by `answer`; `batches` holds rows and tokens of each that was scored."""

    def __init__(self, memory_tokens=10**9, seconds_per_batch=0.0, seconds_per_token=0.0, not_finite=False):
        self.memory_tokens, self.seconds_per_batch, self.seconds_per_token = memory_tokens, seconds_per_batch, seconds_per_token
        self.not_finite = not_finite
        self.batches, self.starts = [], 0
        self.dies_at = lambda requests: False
        self.fails_at = lambda requests: False
        self.hangs_at = lambda requests: False
        self.loads = lambda start: True

    def work(self, connection, task):
        self.starts += 1
        if not self.loads(self.starts):
            hang_up(connection)
            return
        runtime_worker.send_message(
            connection, "loaded", {"dtype": "torch.float32", "batches_at_once": 1, "worst": 0.0, "seconds": 0.01}
        )
        runtime_worker.serve(connection, lambda requests: self.score(requests, connection), 1)

    def score(self, requests, connection):
        if padded_tokens(requests) > self.memory_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if self.fails_at(requests):
            raise RuntimeError("CUDA error: device-side assert triggered")
        if self.hangs_at(requests):
            time.sleep(1000)
        if self.dies_at(requests):
            hang_up(connection)
            return BatchScores([])
        self.batches.append((len(requests), padded_tokens(requests)))
        time.sleep(self.seconds_per_batch + self.seconds_per_token * padded_tokens(requests))
        return BatchScores([[float("nan")] * 2 if self.not_finite else answer(request) for request in requests])

    def worker(self, tokens_per_batch=500, name="cpu"):
        """A worker on this device, which loads at once."""
        made = Worker(name, None, tokens_per_batch, lambda task: start_in_thread(task, self.work), (0,))
        made.launch()
        return made
