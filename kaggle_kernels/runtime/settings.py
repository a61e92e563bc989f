"""What a spec asks of the kernel, the clock that it keeps to, and its log."""

import time
from dataclasses import dataclass

RESERVE_SECONDS = 300  # kept for writing and checking the submission; a twentieth of a clock under 6,000 s


@dataclass(frozen=True)
class PackageSettings:
    """One model: the run that made it, the Kaggle dataset that holds its package, its weight in the mean.

    Placement is `each` (a copy on every GPU) or `split` (one copy, its layers over all of them). Verdicts, in the order of
    the logits, and model_type are the recipe's: a package that says otherwise is refused. Another base_model is only logged.
    A model that is split puts no more than `weight_bytes_limit` on a GPU, which leaves room for a batch.
    """

    run: str
    dataset: str
    weight: float
    placement: str
    verdicts: tuple[str, ...]
    base_model: str
    model_type: str
    weight_bytes_limit: int | None = None


@dataclass(frozen=True)
class Settings:
    """A spec, checked by `build`."""

    name: str
    competition: str  # Kaggle's slug
    columns: tuple[str, ...]  # of the submission, besides id
    verdicts: tuple[str, ...]  # what the competition tells apart
    packages: tuple[PackageSettings, ...]
    orders: tuple[str, ...]
    clock_seconds: float
    budget_tokens: int | None  # None: as in training
    tokens_per_batch: int
    temperature: float
    min_scored: float
    visible_rows: int  # of the train file, scored in the visible run
    wheels: str | None  # the dataset with wheels that Kaggle's image lacks
    build: str = ""  # tells this kernel's text from others, so that what it wrote can be told from what another wrote


@dataclass(frozen=True)
class Clock:
    """Seconds since the kernel began. After `deadline` no batch may be running; what is left then is for writing."""

    began: float
    deadline: float
    reserve_seconds: float = 0.0

    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.began

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()


def start_clock(clock_seconds: float) -> Clock:
    """A clock that starts now."""
    began = time.monotonic()
    reserve_seconds = min(RESERVE_SECONDS, clock_seconds / 20)
    return Clock(began, began + clock_seconds - reserve_seconds, reserve_seconds)


def log(clock: Clock, message: str) -> None:
    """One line of the kernel's log, with the seconds since the beginning."""
    print(f"[{clock.elapsed():8.1f} s] {message}", flush=True)
