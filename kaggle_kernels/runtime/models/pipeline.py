"""A split model has a batch in flight on each of its devices: while the second computes one, the first has the next.

A stage is the layers on one device. A batch leaves its stage once the device has computed it and the next stage is free, so
that there is one batch in a stage at most, and a device holds the intermediates of one batch only.

Each batch in flight has a CUDA stream of its own on every device. PyTorch's copy from one GPU to another makes the current
streams of both wait for each other, and accelerate copies masks and positions anew for every layer of a later stage: on one
stream, the first GPU's next batch would stand in the queue behind copies that wait for the second GPU.
"""

import contextlib
import functools
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence

import torch

from kaggle_kernels.runtime.models.placement import LAYER


class Stages:
    """The stages of a split model, entered by forward hooks on the first part of each device.

    `devices` are the stages' devices; those that are GPUs get a stream for each batch in flight.
    """

    def __init__(self, model: torch.nn.Module, starts: Sequence[str], devices: Sequence[str] = ()):
        self.locks = [threading.Lock() for _ in range(1 + len(starts))]

        # The stage and the streams of the batch that this thread computes.
        self.local = threading.local()

        # A set of streams for each batch in flight, taken by one batch after the other.
        gpus = [device for device in devices if device.startswith("cuda")]
        self.streams: queue.SimpleQueue[list] = queue.SimpleQueue()
        for _ in self.locks:
            self.streams.put([torch.cuda.Stream(gpu) for gpu in gpus])

        for stage, start in enumerate(starts, 1):
            hook = functools.partial(self.enter_stage, stage)
            find_part(model, start).register_forward_pre_hook(hook)

    @contextlib.contextmanager
    def forward_pass(self) -> Iterator[None]:
        """Let the forward pass of one batch inside go through the stages.

        Results must be read inside of this context, while the batch has its streams. A forward pass
        outside of it takes no locks.
        """
        # Wait until the first stage is free; enter_stage moves the batch on to the others.
        self.locks[0].acquire()
        self.local.stage = 0
        self.local.streams = self.streams.get()
        try:
            with contextlib.ExitStack() as current_streams:
                # The stream entered last decides the thread's device: it must be the first stage's.
                for stream in reversed(self.local.streams):
                    current_streams.enter_context(torch.cuda.stream(stream))
                yield
        finally:
            # After an error the batch may be in any of the stages.
            self.streams.put(self.local.streams)
            self.locks[self.local.stage].release()
            self.local.stage = None

    def enter_stage(self, stage: int, *_) -> None:
        """Move this thread's batch on to a stage, and free the one before.

        The model calls this as a hook, just before the first layer of the stage.
        """
        previous_stage = getattr(self.local, "stage", None)
        if previous_stage is None:  # outside of `forward_pass`
            return

        # Python is ahead of the device: a stage is free only once its device has done its work.
        self.locks[stage].acquire()
        if self.local.streams:
            self.local.streams[previous_stage].synchronize()
        self.locks[previous_stage].release()
        self.local.stage = stage


def find_part(model: torch.nn.Module, part_name: str) -> torch.nn.Module:
    """Find a part of a model by its name, to which PEFT adds a prefix."""
    for name, module in model.named_modules():
        if f".{name}".endswith(f".{part_name}"):
            return module
    raise LookupError(f"the model has no part {part_name}")


def stage_starts(device_map: Mapping[str, str]) -> list[str]:
    """List the first layer on each device but the first, by a device_map in the order of the layers."""
    starts = []
    previous_device = None
    for part_name, device in device_map.items():
        if not LAYER.search(part_name):
            continue
        # The first part of the first device begins no stage that a batch would have to wait for.
        if previous_device not in (None, device):
            starts.append(part_name)
        previous_device = device
    return starts
