"""A split model has a batch in flight on each of its devices: while the second computes one, the first has the next.

A stage is the layers on one device. A batch enters the next stage before it leaves its own, so that there is one batch in a
stage at most, and a device holds the intermediates of one batch only. Kernels run in the order in which they were asked for.
"""

import contextlib
import threading
from collections.abc import Iterator, Mapping


class Stages:
    """The stages of a split model, entered by forward hooks on the first part of each device."""

    def __init__(self, model, starts: list[str]):
        self.locks = [threading.Lock() for _ in range(1 + len(starts))]
        self.local = threading.local()
        for stage, start in enumerate(starts, 1):
            part = next(part for name, part in model.named_modules() if f".{name}".endswith(f".{start}"))  # PEFT adds a prefix
            part.register_forward_pre_hook(lambda *_, stage=stage: self.enter(stage))

    @contextlib.contextmanager
    def batch(self) -> Iterator[None]:
        """One batch on its way through all stages; outside of this nothing waits."""
        self.locks[0].acquire()
        self.local.stage = 0
        try:
            yield
        finally:
            self.locks[self.local.stage].release()
            self.local.stage = None

    def enter(self, stage: int) -> None:
        """Wait until the stage is free, take it, and give back the one before."""
        held = getattr(self.local, "stage", None)
        if held is not None:
            self.locks[stage].acquire()
            self.locks[held].release()
            self.local.stage = stage


def stage_starts(device_map: Mapping[str, str]) -> list[str]:
    """The first part on each device but the first, from a device_map in the order in which a row passes through its parts."""
    parts = [(part, device) for part, device in device_map.items() if ".layers." in part]
    return [part for (_, before), (part, device) in zip(parts, parts[1:], strict=False) if device != before]
