"""`python -m postprocess.sweep DIR`: the trials of `axolotl train RECIPE --sweep FILE`, best first.

DIR holds sweep0001, sweep0002, …, which Axolotl numbers in shuffled order. A trial's parameters are
what its recipe.yml has other than the other trials'. Their table is written beside them, sweep.csv.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import polars as pl
from rich.box import SIMPLE_HEAD
from rich.table import Table

from preprocess.core.errors import UserError, exits_with_2
from preprocess.core.files import atomic_file, read_object, read_yaml
from preprocess.report import console
from recipes.pairwise.tracking.recipe_copy import LOG, RECIPE_COPY, TRIAL

RANKED_BY = ("log_loss", "accuracy")
METRICS = ("log_loss", "accuracy", "flip_rate", "rows", "steps")
NOT_PARAMETERS = re.compile(r"output_dir|wandb_\w+")  # each trial has its own

# The line of a log that says why a training ended: an error of this project, or one of a library.
OWN_ERROR = re.compile(r"^error: (.+)$", re.MULTILINE)
RAISED_ERROR = re.compile(r"^((?:\w+\.)*\w*(?:Error|Exception|Interrupt)(?:: .*)?)$", re.MULTILINE)
LOG_TAIL_BYTES = 65536

TABLE_WIDTH = 140  # where the output is piped: a sweep has a column for each parameter
FINISHED = "finished"
UNFINISHED = "unfinished: it runs still, or was ended"


@dataclass(frozen=True)
class Trial:
    """One run of a sweep, or one fold of it."""

    name: str  # its folder below that of the sweep
    folder: Path
    status: str
    values: Mapping[str, object]  # of its recipe, by flat key, such as pairwise.budget_tokens
    metrics: Mapping[str, float]  # empty before the run has ended


@click.command(help=__doc__)
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--by", type=click.Choice(RANKED_BY), default="log_loss", help="What decides which is best."
)
@exits_with_2
def main(folder: Path, by: str) -> None:
    """Print the trials of a sweep, best first, and write them to sweep.csv."""
    trials = sort_trials(read_trials(folder), by)
    parameters = find_parameters(trials)
    table = make_frame(trials, parameters)
    with atomic_file(folder / "sweep.csv") as temporary:
        table.write_csv(temporary)

    console(piped_width=TABLE_WIDTH).print(make_screen_table(table))
    if not parameters:
        click.echo(
            "no parameter differs between the trials: their recipes are equal, or there is only one"
        )

    # Trials that failed are in the table too, but cannot be the best.
    finished = [trial for trial in trials if trial.status == FINISHED]
    if finished:
        best = finished[0]
        recipe = best.folder / RECIPE_COPY
        click.echo(describe_uncertainty(finished))
        click.echo(f"best by {by}: {best.name}; package it: python -m postprocess {recipe}")
    click.echo(f"written: {folder / 'sweep.csv'}")


# Reading


def read_trials(folder: Path) -> list[Trial]:
    """Read the trials of a sweep: the runs of one recipe with different values of some keys.

    A trial that was trained on several folds counts as one trial for each fold.

    Raises:
        UserError: There is no trial, or the metrics of one are not those of a training.
    """
    trials = []
    for path in sorted(folder.glob("sweep*")):
        is_trial = path.is_dir() and TRIAL.fullmatch(path.name)
        if not is_trial:
            continue

        # The runs of several folds are in folders of their own.
        run_folders = sorted(path.glob("fold-*")) or [path]
        for run_folder in run_folders:
            trials.append(read_trial(folder, run_folder))

    if not trials:
        reason = "there is no such folder"
        if folder.is_dir():
            reason = "holds no trial, that is no folder such as sweep0001"
        raise UserError(
            f"{folder}: {reason}; name the output_dir of FILE, or else of the recipe, where axolotl train "
            "RECIPE --sweep FILE writes the trials"
        )
    return trials


def read_trial(sweep_folder: Path, run_folder: Path) -> Trial:
    """Read the recipe, metrics and status of one trial; an unfinished one has no metrics.

    Raises:
        UserError: Its metrics are not those of a training.
    """
    # A trial that failed early may have left no recipe.
    recipe = run_folder / RECIPE_COPY
    values = {}
    if recipe.is_file():
        values = flatten_keys(read_yaml(recipe))

    name = str(run_folder.relative_to(sweep_folder))
    metrics_file = run_folder / "metrics.json"

    # The contract is written last, after the metrics.
    is_finished = metrics_file.is_file() and (run_folder / "contract.json").is_file()
    if not is_finished:
        return Trial(name, run_folder, find_failure(run_folder), values, metrics={})
    return Trial(name, run_folder, FINISHED, values, read_metrics(metrics_file))


def read_metrics(metrics_file: Path) -> dict:
    """Read the metrics of a training; a UserError where one is missing."""
    metrics = read_object(metrics_file)
    for name in METRICS:
        if not is_number(metrics.get(name)):
            raise UserError(
                f"{metrics_file}: holds no number {name}, so axolotl train did not write it; "
                "train this trial again"
            )
    return metrics


def find_failure(run_folder: Path) -> str:
    """Say why a trial has no metrics, by the last error in its log."""
    log = run_folder / LOG
    if not log.is_file():
        return UNFINISHED

    # An error of this project says what to do, so that it counts before those of libraries.
    tail = log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace")
    errors = OWN_ERROR.findall(tail) or RAISED_ERROR.findall(tail)
    if not errors:
        return UNFINISHED
    return f"failed: {errors[-1]}"


def flatten_keys(values: Mapping, prefix: str = "") -> dict[str, object]:
    """Join nested keys with dots: {pairwise: {fold: 0}} becomes {pairwise.fold: 0}."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten_keys(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


# Comparing


def find_parameters(trials: Sequence[Trial]) -> list[str]:
    """Find the keys that are not the same in all trials, in the order of the recipes."""
    # Compare only trials that left a recipe.
    recipes = [trial.values for trial in trials if trial.values]
    keys: list[str] = []
    for values in recipes:
        keys += values.keys()

    parameters = []
    for key in dict.fromkeys(keys):
        # Values are compared as texts: a set cannot hold a list.
        texts = {json.dumps(values.get(key), default=str) for values in recipes}
        if len(texts) > 1 and not NOT_PARAMETERS.fullmatch(key):
            parameters.append(key)
    return parameters


def sort_trials(trials: Sequence[Trial], by: str) -> list[Trial]:
    """Sort trials, the best first; those without metrics come last, by name.

    Of trials that are equal by log_loss or accuracy, the other one decides.
    """

    def rank(trial: Trial) -> tuple[float, float]:
        # More log loss is worse, and so is less accuracy.
        log_loss = trial.metrics["log_loss"]
        error_rate = 1 - trial.metrics["accuracy"]
        if by == "accuracy":
            return (error_rate, log_loss)
        return (log_loss, error_rate)

    by_name = sorted(trials, key=lambda trial: trial.name)
    finished = [trial for trial in by_name if trial.status == FINISHED]
    unfinished = [trial for trial in by_name if trial.status != FINISHED]
    return sorted(finished, key=rank) + unfinished


def describe_uncertainty(finished: Sequence[Trial]) -> str:
    """Say how far the metrics of finished trials, the best of which is first, can be compared."""
    # Trials can be compared if they were validated on the same rows: those of one fold of one pairs file.
    validated_on = set()
    for trial in finished:
        validated_on.add((trial.metrics.get("fold"), trial.metrics.get("pairs_sha256")))
    if len(validated_on) > 1:
        return (
            "the trials were validated on different rows (other folds, or other pairs files): "
            "do not compare their metrics"
        )

    # Accuracy is a share of rows. This is the standard error of a share, for the best trial.
    best = finished[0]
    row_count = best.metrics["rows"]
    accuracy = best.metrics["accuracy"]
    error = math.sqrt(accuracy * (1 - accuracy) / row_count)
    return (
        f"{row_count:,} validation rows: the standard error of an accuracy is {error:.3f}, "
        "and the best of several had luck too"
    )


# Tables


def make_frame(trials: Sequence[Trial], parameters: Sequence[str]) -> pl.DataFrame:
    """Make a table with a row for each trial: its name, parameters, metrics and status."""
    rows = []
    for trial in trials:
        row = {"trial": trial.name}
        # As text: a list or a word may stand where another trial has a number.
        for name in parameters:
            value = trial.values.get(name)
            row[name] = None if value is None else format_value(value)
        for name in METRICS:
            row[name] = trial.metrics.get(name)
        row["status"] = trial.status
        rows.append(row)

    return pl.DataFrame(rows, strict=False, infer_schema_length=None)


def make_screen_table(frame: pl.DataFrame) -> Table:
    """Make the table that is printed; a cell is empty where a recipe has the default, or a trial no metrics."""
    table = Table(box=SIMPLE_HEAD)
    for name, dtype in frame.schema.items():
        justify = "right" if dtype.is_numeric() else "left"
        table.add_column(name, justify=justify, overflow="fold")

    for row in frame.iter_rows():
        table.add_row(*map(format_cell, row))
    return table


def format_cell(value: object) -> str:
    """Write a value of the table, of a number with decimals four digits."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def format_value(value: object) -> str:
    """Write a parameter's value as a recipe has it."""
    if isinstance(value, list):
        items = [format_value(item) for item in value]
        return f"[{', '.join(items)}]"
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def is_number(value: object) -> bool:
    """Return whether a value is a number; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


if __name__ == "__main__":
    main()
