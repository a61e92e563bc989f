"""What a spec asks of the kernel, the clock that it keeps to, and its log."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

RESERVE_SECONDS = 300  # kept for writing and checking the submission
RESERVE_SHARE = 1 / 20  # of a shorter time limit


@dataclass(frozen=True)
class PackageSettings:
    """One model: the run that made it, the Kaggle dataset of its package, its weight in the mean.

    Placement is `each` (a copy on every GPU) or `split` (one copy, its layers over all of them).
    Verdicts are the recipe's, in the order of the logits: a package that says otherwise is refused.
    A model that is split puts no more than `weight_bytes_limit` on a GPU, which leaves room for a
    batch.
    """

    run: str
    dataset: str
    weight: float
    placement: str
    verdicts: tuple[str, ...]
    weight_bytes_limit: int | None = None


@dataclass(frozen=True)
class TimeLimit:
    """Seconds that a kernel may take for a test file of up to so many rows; None: of any more."""

    rows: int | None
    seconds: float


@dataclass(frozen=True)
class Settings:
    """A spec and its competition, checked by `build`."""

    name: str
    competition: str  # Kaggle's slug
    verdicts: tuple[str, ...]  # what the competition tells apart
    texts_are_turns: bool  # a text of its files is a JSON list of turns
    verdict_form: str  # of its train file: `name` in one column, or `flags`, one for each verdict
    verdict_columns: tuple[str, ...]
    answer: str  # of its submission: the `winner`, or `probabilities` of all verdicts
    columns: tuple[str, ...]  # of the submission, besides id
    metric: str  # accuracy, log_loss or brier_score
    hidden_rows: tuple[int, ...]  # numbers of rows that the hidden run may meet
    packages: tuple[PackageSettings, ...]
    orders: tuple[str, ...]
    time_limits: tuple[TimeLimit, ...]  # by ascending number of rows
    budget_tokens: int | None  # None: as in training
    tokens_per_batch: int
    temperature: float
    min_scored: float  # share of the rows; fewer are an error in the visible run
    visible_rows: int  # of the train file, scored in the visible run
    wheels: str | None  # the dataset with wheels that Kaggle's image lacks


def find_time_limit(time_limits: Sequence[TimeLimit], rows: int) -> float:
    """Return the seconds that a kernel may take for a test file of so many rows."""
    for limit in time_limits:
        if limit.rows is None or rows <= limit.rows:
            return limit.seconds
    raise ValueError(f"no time limit for {rows} rows; give one for any number of them")


@dataclass(frozen=True)
class Clock:
    """When the kernel began and must end, as time.monotonic gives seconds.

    After `deadline` no batch may be running; the reserve behind it is for writing.
    """

    began: float
    deadline: float
    reserve_seconds: float = 0.0

    def elapsed(self) -> float:
        """Return the seconds since the beginning."""
        return time.monotonic() - self.began

    def left(self) -> float:
        """Return the seconds until the deadline."""
        return self.deadline - time.monotonic()


def start_clock(limit_seconds: float, began: float | None = None) -> Clock:
    """Make a clock for a time limit, which begins now unless it `began` before."""
    if began is None:
        began = time.monotonic()

    # A rehearsal of a minute cannot spare five.
    reserve_seconds = min(RESERVE_SECONDS, limit_seconds * RESERVE_SHARE)
    return Clock(began, began + limit_seconds - reserve_seconds, reserve_seconds)


def is_hidden_run() -> bool:
    """Tell whether this is the run on the hidden test rows, which a submission starts."""
    return bool(os.environ.get("KAGGLE_IS_COMPETITION_RERUN"))


def log(clock: Clock, message: str) -> None:
    """Print one line of the kernel's log, with the seconds since the beginning."""
    print(f"[{clock.elapsed():8.1f} s] {message}", flush=True)
