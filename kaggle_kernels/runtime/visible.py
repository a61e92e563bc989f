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
from kaggle_kernels.runtime.settings import Clock, Settings, is_hidden_run, log

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


def choose_visible_rows(
    root: Path, settings: Settings, packages: Sequence[Package], clock: Clock
) -> VisibleRows:
    """Choose rows of the train file that every package lists as validation rows.

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
        log(clock, f"visible run: only test rows are scored: {error}")
        return VisibleRows()

    # Rows that a model knows say nothing of its accuracy.
    trained_on = any(listing["trained_on"] for listing in listings)
    remark = "; a model was trained on them: they tell of speed only" if trained_on else ""
    log(clock, f"visible run: {len(train_rows)} rows of {file.name} are scored too{remark}")

    # They look like rows of the test file.
    rows = []
    winners = {}
    for train_row in train_rows:
        row = {"id": TRAIN_PREFIX + train_row["id"], "counts": True}
        for name in TEXTS:
            row[name] = read_text(train_row[name], settings.texts_are_turns)
        rows.append(row)
        winners[row["id"]] = read_winner(train_row, settings)
    return VisibleRows(tuple(rows), winners, trained_on)


def read_train_rows(file: Path, settings: Settings, listings: Sequence[Mapping]) -> list[dict]:
    """Read rows of the train file that are validation rows of every package, as many as the spec wants.

    `listings` are the packages' lists of validation rows, one validation_ids.json each.

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

    # A fair sample, which does not depend on the file's order: by a hash of the id.
    rows.sort(key=lambda row: hashlib.sha256(row["id"].encode()).hexdigest())
    return rows[: settings.visible_rows]


def read_winner(row: Mapping, settings: Settings) -> str | None:
    """Read a train row's verdict from a column with its name, or from a column for each verdict; None without one."""
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
    """Measure the kernel's probabilities against the verdicts that people gave.

    Args:
        visible: The rows of the train file with their verdicts.
        verdicts: The competition's, in the order of the probabilities. Rows with another one, such
            as a tie where there are none, are left out.
        scored: The final probabilities by id.

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

        probabilities = scored[row_id]
        place = verdicts.index(winner)
        right_rows.append(probabilities.index(max(probabilities)) == place)
        losses.append(-math.log(probabilities[place]))

        # The Brier score is Σ (p − y)², where y is 1 for the winner and else 0.
        sum_of_squares = sum(probability**2 for probability in probabilities)
        brier_scores.append(sum_of_squares - 2 * probabilities[place] + 1)

    judged = len(right_rows)
    if not judged:
        return {"judged": 0}

    # The standard error of a share p of n rows is √(p (1 − p) / n).
    accuracy = sum(right_rows) / judged
    return {
        "judged": judged,
        "accuracy": accuracy,
        "standard_error": math.sqrt(accuracy * (1 - accuracy) / judged),
        "log_loss": sum(losses) / judged,
        "brier_score": sum(brier_scores) / judged,
    }


def predict_finish(passes: Sequence[Mapping], fixed_seconds: float, rows: int) -> dict:
    """Predict how long the hidden run would take for so many rows, at the speed of this run.

    Args:
        passes: The records of this run's passes (see pass_runner.pass_record). A pass is one model
            that scores rows in one order of their two responses.
        fixed_seconds: What does not depend on the number of rows, such as loading the models.
        rows: The number of rows.

    Returns:
        `rows`; `first_order_seconds` until every row has a score; `all_seconds` until every model
        has scored every row in every order.
    """
    # A later pass of the same model and order had only rows that were left over, or do not count.
    seconds_per_row: dict[tuple[str, str], float] = {}
    for record in passes:
        model_and_order = (record["run"], record["order"])
        if record["scored"] > 0 and model_and_order not in seconds_per_row:
            seconds_per_row[model_and_order] = record["seconds"] / record["scored"]

    # The first pass gives every row a score, the further ones make it better.
    seconds_in_first_pass, *_further_passes = seconds_per_row.values()
    seconds_in_all_passes = sum(seconds_per_row.values())
    return {
        "rows": rows,
        "first_order_seconds": round(fixed_seconds + rows * seconds_in_first_pass),
        "all_seconds": round(fixed_seconds + rows * seconds_in_all_passes),
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
    """Write a prediction for the log, beside the seconds allowed; a warning where rows will be left to the prior."""
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
