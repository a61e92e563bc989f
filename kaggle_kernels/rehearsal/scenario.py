"""What a rehearsal changes of Kaggle's conditions: the options of `rehearse`, read by the steps that they are for."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Scenario:
    """The options of `rehearse`, by its parameters' names. By default the kernel runs undisturbed on the file's own rows."""

    # How the test rows differ from the file's: see rows.py.
    size: int | None = None  # number of rows to draw from the file; None: all of them, once
    shuffle: bool = False  # rows change their order, and ids are dealt out anew
    hostile: bool = False  # some rows are replaced by adversarial ones
    seed: int = 0

    # What the kernel has.
    devices: int | None = None  # number of CPU workers; None: the kernel uses what it finds
    clock_seconds: float | None = None  # None: the spec's
    train_file: Path | None = None  # beside the test file: the visible run scores rows of it

    # What happens to it: see fault_injection.py.
    kill_every: float | None = None  # seconds between kills, from when the first worker appears
    lose_all_at: float | None = None  # from this share of a pass's rows on, all are killed for good
    end_clock_at: int | None = None  # the clock comes to its end once so many rows are scored

    @property
    def needs_new_ids(self) -> bool:
        """Whether rows are drawn or replaced, so that the file's ids no longer belong to them."""
        return self.size is not None or self.hostile

    @property
    def is_hidden(self) -> bool:
        """Whether the hidden run is rehearsed: the kernel gets other rows than the test file's."""
        return self.needs_new_ids or self.shuffle
