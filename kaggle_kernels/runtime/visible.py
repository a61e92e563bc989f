"""The visible run is a load test: beside the few test rows that it is shown, it scores rows of the competition's train file.

They are rows of the validation fold that every package lists, so that accuracy means what it will mean in the hidden run,
and there are enough of them to measure a speed and to predict from it when 10,000 and 25,000 rows will be done.
"""

import hashlib
import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pyarrow as pa

from kaggle_kernels.runtime.inputs import TEXTS, find_mounted, read_ids, read_text, rows_of
from kaggle_kernels.runtime.settings import Settings
from kaggle_kernels.runtime.submission import is_first_longer

VALIDATION_IDS = "validation_ids.json"
TRAIN_FILES = ("train.parquet", "train.csv")
TRAIN_PREFIX = "train:"
HIDDEN_ROWS = (10_000, 25_000)  # of the public and of the final phase
JUDGEMENTS = ("model_a", "model_b", "tie")
NEVER = 1e9  # seconds, where nothing was measured


@dataclass(frozen=True)
class VisibleRows:
    """What the visible run scores beside the test rows.

    `rows` are like the test file's, each with a new id; `winners` holds their verdicts by that id (None: has none). With
    `trained_on` a model has seen the rows in training. `log_line` says what was chosen or why nothing was.
    """

    rows: tuple[dict, ...] = ()
    winners: Mapping[str, str | None] = field(default_factory=dict)
    trained_on: bool = False
    log_line: str = ""


@dataclass(frozen=True)
class Speed:
    """What was measured of a package, over all the devices that it was on: tokens without padding, of one order of a row.

    `orders` is how often a row is scored: 1 for a reward model.
    """

    run: str
    loading_seconds: float
    tokens_per_second: float
    tokens_per_row: float
    orders: int

    def seconds_for(self, rows: int, orders: int) -> float:
        """How long `rows` take, in that many orders, once the model is loaded."""
        return min(rows * orders * self.tokens_per_row / self.tokens_per_second, NEVER) if self.tokens_per_second else NEVER


def choose_visible_rows(root: Path, settings: Settings, folders: Sequence[Path], test_ids: Collection[str]) -> VisibleRows:
    """Choose at most settings.visible_rows rows of the train file that the packages in `folders` all list.

    No rows in the hidden run, and where there are none to choose from: the log then says why, and it is never an error.
    """
    if os.environ.get("KAGGLE_IS_COMPETITION_RERUN"):
        return VisibleRows()
    if not settings.visible_rows:
        return no_visible_rows("visible_rows is 0, no row of the train file is scored")

    lists = []
    for folder in folders:
        if not (folder / VALIDATION_IDS).is_file():
            return no_visible_rows(f"{folder.name} has no {VALIDATION_IDS}; package the run again to have it measured")
        lists.append(json.loads((folder / VALIDATION_IDS).read_text(encoding="utf-8")))
    listed_by_all = frozenset.intersection(*(frozenset(listing["ids"]) for listing in lists))

    try:
        file = find_mounted(root, settings.competition, TRAIN_FILES, "competitions")
    except FileNotFoundError:
        return no_visible_rows(f"no {' or '.join(TRAIN_FILES)} of {settings.competition} is mounted")
    try:
        train_rows = read_train_rows(file, settings, listed_by_all)
    except (OSError, ValueError, pa.ArrowException) as error:
        return no_visible_rows(f"the train file is not scored: {error}")
    if not train_rows:
        return no_visible_rows(f"{file.name} holds none of the {len(listed_by_all)} ids that every package lists")

    trained_on = any(listing["trained_on"] for listing in lists)
    if trained_on:
        kind = "rows that a model was trained on: they tell of speed only"
    else:
        folds = sorted({f"fold {listing['fold']}" for listing in lists})
        kind = f"held out ({' and '.join(folds)})"
    log_line = f"visible run: {len(train_rows)} rows of {file.name} are scored too, {kind}"
    rows, winners = rename_train_rows(train_rows, settings, test_ids)
    return VisibleRows(rows, winners, trained_on, log_line)


def no_visible_rows(reason: str) -> VisibleRows:
    """No rows, and a line for the log that says why."""
    return VisibleRows(log_line=f"visible run: {reason}")


def read_train_rows(file: Path, settings: Settings, listed: frozenset[str]) -> list[dict]:
    """The rows of the train file to be scored, in an order that does not depend on the file's: that of their ids' hashes."""
    present = listed.intersection(read_ids(file))
    by_hash = sorted(present, key=lambda row_id: hashlib.sha256(row_id.encode()).hexdigest())
    wanted = by_hash[: settings.visible_rows]
    columns = ("id", *TEXTS, *settings.columns)
    rows_by_id = {row["id"]: row for row in rows_of(file, columns, frozenset(wanted))}
    return [rows_by_id[row_id] for row_id in wanted]


def rename_train_rows(
    train_rows: Sequence[dict], settings: Settings, test_ids: Collection[str]
) -> tuple[tuple[dict, ...], dict[str, str | None]]:
    """The train file's rows as those of the test file are, and their verdicts, under new ids that no test row has."""
    prefix = TRAIN_PREFIX
    while any(row_id.startswith(prefix) for row_id in test_ids):
        prefix = TRAIN_PREFIX + prefix

    rows = []
    winners = {}
    for train_row in train_rows:
        new_id = prefix + train_row["id"]
        texts = {name: read_text(train_row[name], are_turns="tie" in settings.verdicts) for name in TEXTS}
        rows.append({"id": new_id, **texts})
        winners[new_id] = judgement_of(train_row, settings.columns)
    return tuple(rows), winners


def judgement_of(row: Mapping, columns: Sequence[str]) -> str | None:
    """A train row's verdict, from the one column with its name or from one flag a verdict; None where it has none."""
    if len(columns) == 1:
        return row[columns[0]] if row[columns[0]] in JUDGEMENTS else None
    won = [verdict for verdict, name in zip(JUDGEMENTS, columns, strict=True) if str(row[name]) in ("1", "1.0", "True")]
    return won[0] if len(won) == 1 else None


def visible_report(  # noqa: PLR0913  one for each thing that was measured
    visible: VisibleRows,
    verdicts: Sequence[str],
    scored: Mapping[str, Sequence[float]],
    per_package: Mapping[str, tuple[Sequence[str], Mapping[str, Mapping[str, Sequence[float]]]]],
    speeds: Sequence[Speed],
    before_seconds: float,
    clock_seconds: float,
) -> dict:
    """What the visible run measured, for kernel.json.

    `scored` are the final probabilities of `verdicts` by id; `per_package` holds for each run its verdicts and its scores by id
    and order. `before_seconds` passed before the first model was loaded, `clock_seconds` are there until the deadline.
    """
    ids = [row["id"] for row in visible.rows]
    report = {
        "rows": len(ids),
        "scored": sum(row_id in scored for row_id in ids),
        "trained_on": visible.trained_on,
        "speed": [
            {**asdict(speed), "rows_per_second": speed.tokens_per_second / max(speed.tokens_per_row, 1)} for speed in speeds
        ],
        "clock_seconds": clock_seconds,
        "predicted": [predict_finish(speeds, before_seconds, clock_seconds, rows) for rows in HIDDEN_ROWS],
    }
    if not visible.trained_on:
        report["quality"] = quality_of(visible, verdicts, scored)
        report["flips"] = {run: share_of_flips(scores, ids) for run, (_, scores) in per_package.items()}
    return report


def quality_of(visible: VisibleRows, verdicts: Sequence[str], scored: Mapping[str, Sequence[float]]) -> dict:
    """Accuracy, log loss (natural) and the accuracy of the longer answer over the scored rows with one of `verdicts`.

    Where the competition has no ties, rows that are one are left out. No figures where no row is left.
    """
    right, loss, longer_right, judged = 0, 0.0, 0, 0
    for row in visible.rows:
        values, winner = scored.get(row["id"]), visible.winners[row["id"]]
        if values is None or winner not in verdicts:
            continue
        judged += 1
        right += verdicts[values.index(max(values))] == winner
        loss -= math.log(max(values[verdicts.index(winner)], 1e-15))
        longer_right += ("model_a" if is_first_longer(row) else "model_b") == winner
    ties = 0 if "tie" in verdicts else sum(winner == "tie" for winner in visible.winners.values())
    if not judged:
        return {"judged": 0, "ties_left_out": ties}
    accuracy = right / judged
    return {
        "judged": judged,
        "ties_left_out": ties,
        "accuracy": accuracy,
        "standard_error": math.sqrt(accuracy * (1 - accuracy) / judged),
        "log_loss": loss / judged,
        "longer_accuracy": longer_right / judged,
    }


def share_of_flips(scores: Mapping[str, Mapping[str, Sequence[float]]], ids: Sequence[str]) -> float | None:
    """The share of rows whose verdict is another one in the second order; None where no row has two."""
    pairs = [list(scores[row_id].values()) for row_id in ids if len(scores.get(row_id, ())) == 2]
    flips = [one.index(max(one)) != other.index(max(other)) for one, other in pairs]
    return sum(flips) / len(flips) if flips else None


def predict_finish(speeds: Sequence[Speed], before_seconds: float, clock_seconds: float, rows: int) -> dict:
    """When `rows` will have their first score and when everything, in seconds since the beginning, one model after another.

    `first_share` of the rows get a first score within the clock, `rest_share` is what it allows of all that comes after.
    """
    first, *others = speeds
    loaded = before_seconds + first.loading_seconds
    once = loaded + first.seconds_for(rows, 1)
    everything = once + first.seconds_for(rows, first.orders - 1)
    everything += sum(speed.loading_seconds + speed.seconds_for(rows, speed.orders) for speed in others)
    first_share = (clock_seconds - loaded) / max(once - loaded, 1e-9)
    rest_share = (clock_seconds - once) / (everything - once) if everything > once else float(clock_seconds >= once)
    return {
        "rows": rows,
        "first_order_seconds": round(once, 1),
        "all_seconds": round(everything, 1),
        "first_share": min(max(first_share, 0.0), 1.0),
        "rest_share": min(max(rest_share, 0.0), 1.0),
    }


def visible_lines(report: Mapping) -> list[str]:
    """The report for the log."""
    lines = []
    quality = report.get("quality", {})
    if quality.get("judged"):
        flips = [f"{run} flips {share:.3f}" for run, share in report["flips"].items() if share is not None]
        ties = f" (ties left out: {quality['ties_left_out']})" if quality["ties_left_out"] else ""
        told = [
            f"accuracy {quality['accuracy']:.4f} ± {2 * quality['standard_error']:.4f} (two standard errors)",
            f"log loss {quality['log_loss']:.4f} on {quality['judged']} rows{ties}",
            f"the longer answer: {quality['longer_accuracy']:.4f}",
            *flips,
        ]
        lines.append(f"visible run: {', '.join(told)}")
    for speed in report["speed"]:
        lines.append(
            f"visible run: {speed['run']}: {speed['rows_per_second']:.2f} rows/s in one order, "
            f"{speed['tokens_per_second']:.0f} tokens/s, {speed['tokens_per_row']:.0f} tokens a row, loaded in "
            f"{speed['loading_seconds']:.0f} s"
        )
    return lines + [finish_line(finish, report["clock_seconds"]) for finish in report["predicted"]]


def finish_line(finish: Mapping, clock_seconds: float) -> str:
    """One prediction for the log."""
    begin, clock = f"predicted for {finish['rows']:,} rows", in_hours(clock_seconds)
    if finish["first_share"] < 1:
        told = f"{clock} are enough for {finish['first_share']:.0%} of them"
        return f"warning: {begin}: {told}; under min_scored nothing is submitted"
    ends = f"{begin}: every row scored once after {in_hours(finish['first_order_seconds'])}"
    if finish["rest_share"] < 1:
        return f"{ends}, {finish['rest_share']:.0%} of all else within {clock}"
    return f"{ends}, all done after {in_hours(finish['all_seconds'])} of {clock}"


def in_hours(seconds: float) -> str:
    """Seconds as hours and minutes, e.g. 4 h 40 min; under ten minutes as seconds."""
    if seconds < 600:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"
