"""A split model has a batch in flight on each of its devices: while the second computes one, the first has the next.

A stage is the layers on one device. A batch leaves its stage once the device has computed it and the next stage is free, so
that there is one batch in a stage at most, and a device holds the intermediates of one batch only.

Each batch in flight has a CUDA stream of its own on every device. PyTorch's copy from one GPU to another makes the current
streams of both wait for each other, and accelerate copies masks and positions anew for every layer of a later stage: on one
stream, the first GPU's next batch would stand in the queue behind copies that wait for the second GPU.
"""

import contextlib
import functools
import itertools
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
        # Whoever holds a stage's lock has its device for itself. The first stage has no start.
        stages = 1 + len(starts)
        self.locks = [threading.Lock() for _ in range(stages)]

        # What belongs to the batch that a thread computes: its `stage` and its `streams`.
        self.local = threading.local()

        # Streams for as many batches as there are stages; a batch takes a set and puts it back.
        gpus = [device for device in devices if device.startswith("cuda")]
        self.free_streams: queue.SimpleQueue[list] = queue.SimpleQueue()
        for _ in range(stages):
            self.free_streams.put([torch.cuda.Stream(gpu) for gpu in gpus])

        # The model calls `enter_stage` just before the first layer of each further stage.
        for stage, start in enumerate(starts, start=1):
            hook = functools.partial(self.enter_stage, stage)
            find_part(model, start).register_forward_pre_hook(hook)

    @contextlib.contextmanager
    def forward_pass(self) -> Iterator[None]:
        """Let the forward pass of a batch, made in this context, wait for each stage to be free.

        Its results must be read in the context too, while the batch has its streams.
        """
        self.locks[0].acquire()
        self.local.stage = 0
        self.local.streams = self.free_streams.get()
        try:
            with contextlib.ExitStack() as current_streams:
                # The stream entered last decides the thread's device: it must be the first stage's.
                for stream in reversed(self.local.streams):
                    current_streams.enter_context(torch.cuda.stream(stream))
                yield
        finally:
            # `enter_stage` has moved the batch on. After an error it may be in any of the stages.
            self.free_streams.put(self.local.streams)
            self.locks[self.local.stage].release()
            self.local.stage = None

    def enter_stage(self, stage: int, *_) -> None:
        """Wait until a stage is free, move this thread's batch on to it, and free the one before."""
        previous_stage = getattr(self.local, "stage", None)
        is_outside_of_forward_pass = previous_stage is None
        if is_outside_of_forward_pass:
            return

        # Python runs ahead of the device. The stage before is free once its device is done.
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
    layer_names = [part_name for part_name in device_map if LAYER.search(part_name)]
    starts = []
    for previous_name, layer_name in itertools.pairwise(layer_names):
        if device_map[layer_name] != device_map[previous_name]:
            starts.append(layer_name)
    return starts
