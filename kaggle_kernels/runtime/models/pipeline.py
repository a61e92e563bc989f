"""A split model has a batch in flight on each of its devices: while the second computes one, the first has the next.

A stage is the layers on one device. A batch leaves its stage once the device has computed it and the next stage is free, so
that there is one batch in a stage at most, and a device holds the intermediates of one batch only.

Each batch in flight has a CUDA stream of its own on every device. PyTorch's copy from one GPU to another makes the current
streams of both wait for each other, and accelerate copies masks and positions anew for every layer of a later stage: on one
stream, the first GPU's next batch would stand in the queue behind copies that wait for the second GPU.
"""

import contextlib
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence

import torch


class Stages:
    """The stages of a split model, entered by forward hooks on the first part of each device.

    `devices` are the stages' devices; those that are GPUs get a stream for each batch in flight.
    """

    def __init__(self, model, starts: Sequence[str], devices: Sequence[str] = ()):
        self.locks = [threading.Lock() for _ in range(1 + len(starts))]
        self.local = threading.local()
        self.streams: queue.SimpleQueue[list] = queue.SimpleQueue()
        for _ in self.locks:
            self.streams.put([torch.cuda.Stream(device) for device in devices if device.startswith("cuda")])
        for stage, start in enumerate(starts, 1):
            part = next(part for name, part in model.named_modules() if f".{name}".endswith(f".{start}"))  # PEFT adds a prefix
            part.register_forward_pre_hook(lambda *_, stage=stage: self.enter(stage))

    @contextlib.contextmanager
    def batch(self) -> Iterator[None]:
        """One batch on its way through all stages; outside of this nothing waits. What it computes must be read inside."""
        self.locks[0].acquire()
        self.local.stage, self.local.streams = 0, self.streams.get()
        try:
            with contextlib.ExitStack() as current:
                for stream in reversed(self.local.streams):  # the last one entered decides the thread's device
                    current.enter_context(torch.cuda.stream(stream))
                yield
        finally:
            self.streams.put(self.local.streams)
            self.locks[self.local.stage].release()
            self.local.stage = None

    def enter(self, stage: int) -> None:
        """Wait until the stage is free, take it, and give back the one before once its device has done its work."""
        held = getattr(self.local, "stage", None)
        if held is not None:
            self.locks[stage].acquire()
            if self.local.streams:
                self.local.streams[held].synchronize()
            self.locks[held].release()
            self.local.stage = stage


def stage_starts(device_map: Mapping[str, str]) -> list[str]:
    """The first part on each device but the first, from a device_map in the order in which a row passes through its parts."""
    parts = [(part, device) for part, device in device_map.items() if ".layers." in part]
    return [part for (_, before), (part, device) in zip(parts, parts[1:], strict=False) if device != before]
