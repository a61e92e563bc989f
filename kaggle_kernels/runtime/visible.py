"""The visible run is a load test: it also scores rows of the competition's train file.

They are validation rows that every package lists, so that accuracy means what it will mean in the
hidden run, and enough to predict from their speed when 10,000 and 25,000 rows will be done.
"""

import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pyarrow as pa

from kaggle_kernels.runtime.inputs import TEXTS, find_mounted, read_table, read_text
from kaggle_kernels.runtime.settings import Settings, is_hidden_run, start_clock
from kaggle_kernels.runtime.submission import ModelScores, is_first_longer

VALIDATION_IDS = "validation_ids.json"
TRAIN_FILES = ("train.parquet", "train.csv")
TRAIN_PREFIX = "train:"
HIDDEN_ROWS = (10_000, 25_000)  # WSDM's public phase; its final phase, and LMSYS's
VERDICTS = ("model_a", "model_b", "tie")  # in the order of LMSYS's columns
NEVER = 1e9  # seconds, where nothing was measured


@dataclass(frozen=True)
class VisibleRows:
    """What the visible run scores beside the test rows."""

    rows: tuple[dict, ...] = ()  # as the test file's, each with a new id
    winners: Mapping[str, str | None] = field(default_factory=dict)  # by that id; None: no verdict
    trained_on: bool = False  # a model has seen the rows in training
    log_line: str = ""  # what was chosen, or why nothing was


@dataclass(frozen=True)
class Speed:
    """What was measured of a package, over all its devices. Tokens are those without padding."""

    run: str
    loading_seconds: float
    tokens_per_second: float
    tokens_per_row: float  # in one order
    orders: int  # in which a row is scored: 1 for a reward model

    def seconds_for(self, rows: int, orders: int) -> float:
        """Predict how long rows take, in that many orders, once the model is loaded."""
        if not self.tokens_per_second:
            return NEVER
        return min(rows * orders * self.tokens_per_row / self.tokens_per_second, NEVER)


def choose_visible_rows(
    root: Path, settings: Settings, folders: Sequence[Path], test_ids: Collection[str]
) -> VisibleRows:
    """Choose rows of the train file that every package lists as validation rows.

    Args:
        root: The folder that is /kaggle, or stands for it.
        settings: Says how many rows at most.
        folders: The packages.
        test_ids: Ids that no chosen row may have.

    Returns:
        No rows in the hidden run, and where there are none to choose from; it is never an error.
    """
    if is_hidden_run():
        return VisibleRows()
    if not settings.visible_rows:
        return no_visible_rows("visible_rows is 0, no row of the train file is scored")

    # Rows that every package lists.
    listings = []
    for folder in folders:
        path = folder / VALIDATION_IDS
        if not path.is_file():
            return no_visible_rows(
                f"{folder.name} has no {VALIDATION_IDS}; package the run again to have it measured"
            )
        listings.append(json.loads(path.read_text(encoding="utf-8")))
    id_sets = [frozenset(listing["ids"]) for listing in listings]
    listed_by_all = frozenset.intersection(*id_sets)

    # A rehearsal may have no train file.
    try:
        file = find_mounted(root, settings.competition, TRAIN_FILES, "competitions")
    except FileNotFoundError:
        return no_visible_rows(
            f"no {' or '.join(TRAIN_FILES)} of {settings.competition} is mounted"
        )
    # Whatever is wrong with this file, the test rows can be scored.
    try:
        train_rows = read_train_rows(file, settings, listed_by_all)
    except (OSError, ValueError, pa.ArrowException) as error:
        return no_visible_rows(f"the train file is not scored: {error}")
    if not train_rows:
        return no_visible_rows(
            f"{file.name} holds none of the {len(listed_by_all)} ids that every package lists"
        )

    # Rows that a model knows say nothing of its accuracy.
    trained_on = any(listing["trained_on"] for listing in listings)
    if trained_on:
        kind = "rows that a model was trained on: they tell of speed only"
    else:
        folds = sorted({f"fold {listing['fold']}" for listing in listings})
        kind = f"held out ({' and '.join(folds)})"
    log_line = f"visible run: {len(train_rows)} rows of {file.name} are scored too, {kind}"

    rows, winners = rename_train_rows(train_rows, settings, test_ids)
    return VisibleRows(rows, winners, trained_on, log_line)


def no_visible_rows(reason: str) -> VisibleRows:
    """No rows, and a line for the log that says why."""
    return VisibleRows(log_line=f"visible run: {reason}")


def read_train_rows(file: Path, settings: Settings, listed: frozenset[str]) -> list[dict]:
    """Read as many listed rows of the train file as the spec wants.

    Rows are chosen and ordered by the hashes of their ids, so that the file's order is without
    effect.
    """
    listed_rows = []
    for row in read_table(file, ("id", *TEXTS, *settings.columns)):
        if row["id"] in listed:
            listed_rows.append(row)
    listed_rows.sort(key=lambda row: hashlib.sha256(row["id"].encode()).hexdigest())
    return listed_rows[: settings.visible_rows]


def rename_train_rows(
    train_rows: Sequence[dict], settings: Settings, test_ids: Collection[str]
) -> tuple[tuple[dict, ...], dict[str, str | None]]:
    """Make rows of the train file into test rows, under new ids that no test row has.

    Returns:
        The rows, and their verdicts by the new ids.
    """
    # A test row may have such an id already.
    prefix = TRAIN_PREFIX
    while any(row_id.startswith(prefix) for row_id in test_ids):
        prefix = TRAIN_PREFIX + prefix

    are_turns = "tie" in settings.verdicts
    rows = []
    winners = {}
    for train_row in train_rows:
        row = {"id": prefix + train_row["id"], "counts": True}
        for name in TEXTS:
            row[name] = read_text(train_row[name], are_turns)
        rows.append(row)
        winners[row["id"]] = read_winner(train_row, settings.columns)
    return tuple(rows), winners


def read_winner(row: Mapping, columns: Sequence[str]) -> str | None:
    """Read a train row's verdict from a column with its name, or from one flag a verdict."""
    if len(columns) == 1:
        winner = row[columns[0]]
        return winner if winner in VERDICTS else None

    # A flag may come as an integer, a float or a truth value, from CSV as their text.
    winners = []
    for verdict, name in zip(VERDICTS, columns, strict=True):
        if str(row[name]) in ("1", "1.0", "True"):
            winners.append(verdict)
    return winners[0] if len(winners) == 1 else None


def report_quality(
    visible: VisibleRows,
    verdicts: Sequence[str],
    scored: Mapping[str, Sequence[float]],
    models: Mapping[str, ModelScores],
) -> dict:
    """Report for kernel.json how good the answers are, where no model has seen the rows before.

    Args:
        visible: The rows of the train file and their winners.
        verdicts: The competition's.
        scored: Final probabilities by id.
        models: What each run's model gave.
    """
    ids = [row["id"] for row in visible.rows]
    report = {
        "rows": len(ids),
        "scored": sum(row_id in scored for row_id in ids),
        "trained_on": visible.trained_on,
    }
    if not visible.trained_on:
        report["quality"] = measure_quality(visible, verdicts, scored)
        report["flips"] = {}
        for run, model in models.items():
            report["flips"][run] = share_of_flips(model.by_id, ids)
    return report


def report_speed(speeds: Sequence[Speed], before_seconds: float, settings: Settings) -> dict:
    """Report for kernel.json how fast the packages are, and what that means for hidden tests.

    Args:
        speeds: Of the packages that scored, in their order.
        before_seconds: Passed before the first model was loaded.
        settings: Has the time limits.
    """
    if not speeds:
        return {"speed": [], "predicted": []}

    measured = []
    for speed in speeds:
        rows_per_second = speed.tokens_per_second / max(speed.tokens_per_row, 1)
        measured.append({**asdict(speed), "rows_per_second": rows_per_second})

    # Each number of rows has a time limit of its own.
    predicted = []
    for rows in HIDDEN_ROWS:
        clock = start_clock(settings.time_limit(rows))
        clock_seconds = clock.deadline - clock.began
        predicted.append(predict_finish(speeds, before_seconds, clock_seconds, rows))
    return {"speed": measured, "predicted": predicted}


def measure_quality(
    visible: VisibleRows, verdicts: Sequence[str], scored: Mapping[str, Sequence[float]]
) -> dict:
    """Measure the final probabilities over the scored rows that have one of `verdicts`.

    Returns:
        `judged` (the number of these rows), `ties_left_out` (rows that are a tie where the
        competition has none), and unless no row is left: `accuracy`, its `standard_error`,
        `log_loss` in nats, and `longer_accuracy`: that of the longer answer.
    """
    judged = 0
    correct = 0
    correct_by_length = 0
    loss = 0.0
    for row in visible.rows:
        values = scored.get(row["id"])
        winner = visible.winners[row["id"]]
        if values is None or winner not in verdicts:
            continue
        judged += 1
        correct += verdicts[values.index(max(values))] == winner

        # The baseline that any model must beat.
        longer = "model_a" if is_first_longer(row) else "model_b"
        correct_by_length += longer == winner

        # A probability of 0 would make the loss infinite.
        loss -= math.log(max(values[verdicts.index(winner)], 1e-15))

    ties_left_out = 0
    if "tie" not in verdicts:
        ties_left_out = list(visible.winners.values()).count("tie")
    if not judged:
        return {"judged": 0, "ties_left_out": ties_left_out}

    # The standard error is that of a share.
    accuracy = correct / judged
    return {
        "judged": judged,
        "ties_left_out": ties_left_out,
        "accuracy": accuracy,
        "standard_error": math.sqrt(accuracy * (1 - accuracy) / judged),
        "log_loss": loss / judged,
        "longer_accuracy": correct_by_length / judged,
    }


def share_of_flips(
    scores: Mapping[str, Mapping[str, Sequence[float]]], ids: Sequence[str]
) -> float | None:
    """Compute the share of rows whose verdict changes with the order; None: no row has two."""
    rows = 0
    flips = 0
    for row_id in ids:
        by_order = scores.get(row_id, {})
        # What time did not allow has one order, and cannot flip.
        if len(by_order) == 2:
            first, second = by_order.values()
            rows += 1
            flips += first.index(max(first)) != second.index(max(second))
    return flips / rows if rows else None


def predict_finish(
    speeds: Sequence[Speed], before_seconds: float, clock_seconds: float, rows: int
) -> dict:
    """Predict when so many rows will be done, one model after another.

    Args:
        speeds: Of the models; the first one scores all rows once before anything else.
        before_seconds: Passed before the first model is loaded.
        clock_seconds: From the beginning to the deadline.
        rows: The number of rows.

    Returns:
        `rows`, `clock_seconds`; in seconds since the beginning when every row has its first score
        and when everything is done; the shares of the first scores and of all the rest that the
        clock allows.
    """
    # As schedule.py goes about it: one order of all rows, then the rest, model by model.
    first, *others = speeds
    loaded = before_seconds + first.loading_seconds
    once = loaded + first.seconds_for(rows, 1)
    everything = once + first.seconds_for(rows, first.orders - 1)
    for speed in others:
        everything += speed.loading_seconds + speed.seconds_for(rows, speed.orders)

    # Which part of it the clock allows.
    first_share = (clock_seconds - loaded) / max(once - loaded, 1e-9)
    if everything > once:
        rest_share = (clock_seconds - once) / (everything - once)
    else:
        rest_share = 1.0 if clock_seconds >= once else 0.0
    return {
        "rows": rows,
        "clock_seconds": clock_seconds,
        "first_order_seconds": round(once, 1),
        "all_seconds": round(everything, 1),
        "first_share": min(max(first_share, 0.0), 1.0),
        "rest_share": min(max(rest_share, 0.0), 1.0),
    }


def visible_lines(report: Mapping) -> list[str]:
    """Write the report as lines of the log."""
    lines = []
    if report.get("quality", {}).get("judged"):
        lines.append(f"visible run: {quality_line(report['quality'], report['flips'])}")
    for speed in report["speed"]:
        lines.append(
            f"visible run: {speed['run']}: {speed['rows_per_second']:.2f} rows/s in one order, "
            f"{speed['tokens_per_second']:.0f} tokens/s, {speed['tokens_per_row']:.0f} tokens "
            f"a row, loaded in {speed['loading_seconds']:.0f} s"
        )
    for finish in report["predicted"]:
        lines.append(finish_line(finish))
    return lines


def quality_line(quality: Mapping, flips: Mapping[str, float | None]) -> str:
    """Write how good the answers are, and each run's share of flips."""
    ties = quality["ties_left_out"]
    ties_note = f" (ties left out: {ties})" if ties else ""
    parts = [
        f"accuracy {quality['accuracy']:.4f} ± {2 * quality['standard_error']:.4f} "
        "(two standard errors)",
        f"log loss {quality['log_loss']:.4f} on {quality['judged']} rows{ties_note}",
        f"the longer answer: {quality['longer_accuracy']:.4f}",
    ]
    for run, share in flips.items():
        if share is not None:
            parts.append(f"{run} flips {share:.3f}")
    return ", ".join(parts)


def finish_line(finish: Mapping) -> str:
    """Write one prediction, with a warning where rows will be left to the prior."""
    beginning = f"predicted for {finish['rows']:,} rows"
    clock = format_hours(finish["clock_seconds"])
    # The share that gets no score at all is what a reader must see first.
    if finish["first_share"] < 1:
        return (
            f"warning: {beginning}: {clock} are enough for {finish['first_share']:.0%} of them; "
            "the others would get the prior"
        )

    first_order = format_hours(finish["first_order_seconds"])
    beginning += f": every row scored once after {first_order}"
    if finish["rest_share"] < 1:
        return f"{beginning}, {finish['rest_share']:.0%} of all else within {clock}"
    return f"{beginning}, all done after {format_hours(finish['all_seconds'])} of {clock}"


def format_hours(seconds: float) -> str:
    """Format seconds as hours and minutes, e.g. 4 h 40 min; under ten minutes as seconds."""
    if seconds < 600:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"
