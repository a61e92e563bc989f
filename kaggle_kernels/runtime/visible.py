"""The visible run is a load test: it also scores rows of the competition's train file.

They are validation rows that every package lists, so that accuracy means what it will mean in the
hidden run, and enough to predict from their speed when 10,000 and 25,000 rows will be done.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from kaggle_kernels.runtime.inputs import TEXTS, find_mounted, read_table, read_text
from kaggle_kernels.runtime.package import Package
from kaggle_kernels.runtime.settings import Settings, is_hidden_run

VALIDATION_IDS = "validation_ids.json"
TRAIN_FILES = ("train.parquet", "train.csv")
TRAIN_PREFIX = "train:"  # of the rows' ids, which then differ from those of test rows
FLAG_SET = ("1", "1.0", "True")  # as text, for a flag may be an integer, a float or a truth value


@dataclass(frozen=True)
class VisibleRows:
    """What the visible run scores beside the test rows."""

    rows: tuple[dict, ...] = ()  # as the test file's, each with a new id
    winners: Mapping[str, str | None] = field(default_factory=dict)  # by that id; None: no verdict
    trained_on: bool = False  # a model has seen the rows in training
    log_line: str = ""  # what was chosen, or why nothing was


def choose_visible_rows(root: Path, settings: Settings, packages: Sequence[Package]) -> VisibleRows:
    """Choose rows of the train file that every package lists as validation rows.

    Args:
        root: The folder that is /kaggle, or stands for it.
        settings: Says how many rows at most.
        packages: The packages.

    Returns:
        No rows in the hidden run, and where there are none to choose from; it is never an error.
    """
    if is_hidden_run() or settings.visible_rows == 0:
        return VisibleRows()

    # Whatever is wrong with the train file, the test rows can be scored.
    try:
        listings = []
        for package in packages:
            listing = (package.folder / VALIDATION_IDS).read_text(encoding="utf-8")
            listings.append(json.loads(listing))
        file = find_mounted(root, settings.competition, TRAIN_FILES, "competitions")
        train_rows = read_train_rows(file, settings, listings)
    except (OSError, ValueError, pa.ArrowException) as error:
        return VisibleRows(log_line=f"visible run: only test rows are scored: {error}")

    # Rows that a model knows say nothing of its accuracy.
    trained_on = any(listing["trained_on"] for listing in listings)
    log_line = f"visible run: {len(train_rows)} rows of {file.name} are scored too"
    if trained_on:
        log_line += "; a model was trained on them: they tell of speed only"

    # They look like rows of the test file.
    rows = []
    winners = {}
    for train_row in train_rows:
        row = {"id": TRAIN_PREFIX + train_row["id"], "counts": True}
        for name in TEXTS:
            row[name] = read_text(train_row[name], settings.texts_are_turns)
        rows.append(row)
        winners[row["id"]] = read_winner(train_row, settings)
    return VisibleRows(tuple(rows), winners, trained_on, log_line)


def read_train_rows(file: Path, settings: Settings, listings: Sequence[Mapping]) -> list[dict]:
    """Read as many rows of the train file as the spec wants, of those in every listing.

    Raises:
        ValueError: There are none.
    """
    id_sets = [frozenset(listing["ids"]) for listing in listings]
    listed_by_all = frozenset.intersection(*id_sets)
    rows = []
    for row in read_table(file, ("id", *TEXTS, *settings.verdict_columns)):
        if row["id"] in listed_by_all:
            rows.append(row)
    if not rows:
        raise ValueError(
            f"{file.name} holds none of the {len(listed_by_all)} ids that every package lists"
        )

    # A fair sample, whatever the file's order.
    rows.sort(key=lambda row: hashlib.sha256(row["id"].encode()).hexdigest())
    return rows[: settings.visible_rows]


def read_winner(row: Mapping, settings: Settings) -> str | None:
    """Read a train row's verdict from a column with its name, or from one flag a verdict."""
    if settings.verdict_form == "name":
        [column] = settings.verdict_columns
        return row[column]

    winners = []
    for verdict, column in zip(settings.verdicts, settings.verdict_columns, strict=True):
        if str(row[column]) in FLAG_SET:
            winners.append(verdict)
    return winners[0] if len(winners) == 1 else None


def measure_quality(
    visible: VisibleRows, verdicts: Sequence[str], scored: Mapping[str, Sequence[float]]
) -> dict:
    """Measure the final probabilities over the scored rows that have one of `verdicts`.

    Returns:
        `judged` (the number of these rows), and unless there is none: `accuracy`, its
        `standard_error`, `log_loss` in nats, and `brier_score`.
    """
    right_rows = []
    losses = []
    brier_scores = []
    for row_id, winner in visible.winners.items():
        if row_id not in scored or winner not in verdicts:
            continue
        values = scored[row_id]
        place = verdicts.index(winner)
        right_rows.append(values.index(max(values)) == place)
        losses.append(-math.log(values[place]))

        # Σ (p − y)², where y is 1 for the winner and else 0.
        sum_of_squares = sum(value**2 for value in values)
        brier_scores.append(sum_of_squares - 2 * values[place] + 1)

    judged = len(right_rows)
    if not judged:
        return {"judged": 0}

    # The standard error is that of a share.
    accuracy = sum(right_rows) / judged
    return {
        "judged": judged,
        "accuracy": accuracy,
        "standard_error": math.sqrt(accuracy * (1 - accuracy) / judged),
        "log_loss": sum(losses) / judged,
        "brier_score": sum(brier_scores) / judged,
    }


def predict_finish(passes: Sequence[Mapping], started_seconds: float, rows: int) -> dict:
    """Predict when so many rows will be done, at the speed of the visible run.

    Args:
        passes: The records of its passes (see pass_runner.pass_record).
        started_seconds: Passed before the first batch, and for loading the other models.
        rows: The number of rows.

    Returns:
        `rows`; in seconds since the beginning when every row has its first score, and when every
        order of every model is done.
    """
    # The first pass of its kind has all the rows that count.
    seconds_per_row: dict[tuple[str, str], float] = {}
    for record in passes:
        if record["scored"]:
            seconds = record["seconds"] / record["scored"]
            seconds_per_row.setdefault((record["run"], record["order"]), seconds)

    first_order, *others = seconds_per_row.values()
    return {
        "rows": rows,
        "first_order_seconds": round(started_seconds + rows * first_order),
        "all_seconds": round(started_seconds + rows * (first_order + sum(others))),
    }


def describe_quality(quality: Mapping) -> str:
    """Write a line for the log: how good the answers are."""
    error = 2 * quality["standard_error"]
    return (
        f"visible run: accuracy {quality['accuracy']:.4f} ± {error:.4f} (two standard errors), "
        f"log loss {quality['log_loss']:.4f}, Brier score {quality['brier_score']:.4f} "
        f"on {quality['judged']} rows"
    )


def describe_finish(finish: Mapping, clock_seconds: float) -> str:
    """Write a line for the log: one prediction, a warning where rows will be left to the prior."""
    line = (
        f"predicted for {finish['rows']:,} rows: every row scored once after "
        f"{format_hours(finish['first_order_seconds'])}, everything after "
        f"{format_hours(finish['all_seconds'])}, with {format_hours(clock_seconds)} allowed"
    )
    if finish["first_order_seconds"] > clock_seconds:
        return f"warning: {line}; rows would get the prior"
    return line


def format_hours(seconds: float) -> str:
    """Format seconds as hours and minutes, e.g. 4 h 40 min; under ten minutes as seconds."""
    if seconds < 600:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"
