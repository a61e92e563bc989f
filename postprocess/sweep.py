"""`python -m postprocess.sweep DIR`: the trials of `axolotl train RECIPE --sweep FILE`, best first: parameters → metrics.

DIR holds sweep0001, sweep0002, …, which Axolotl numbers in shuffled order. A trial's parameters are what its recipe.yml has
other than the other trials'. Written beside the trials: sweep.csv, and sweep.png, each parameter against each metric.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import matplotlib.style
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from preprocess.core.errors import UserError, exits_with_2
from preprocess.core.files import atomic_file, read_object, read_yaml
from preprocess.report import console
from recipes.pairwise.tracking.recipe_copy import LOG, RECIPE_COPY, TRIAL

LOWER_IS_BETTER = {"log_loss": True, "accuracy": False}
METRICS = ("log_loss", "accuracy", "flip_rate", "rows", "steps")
NOT_PARAMETERS = re.compile(r"output_dir|wandb_\w+")
ERROR_LINE = re.compile(
    r"^(?:error: (.+)|((?:\w+\.)*\w*(?:Error|Exception|Interrupt)(?:: .*)?))$", re.MULTILINE
)
TAIL_BYTES = 65536
FINISHED, UNFINISHED = "finished", "unfinished: it runs still, or was ended"
MOST_DRAWN, MOST_TICKS, MOST_LETTERS = 6, 8, 24
DOTS_PER_INCH, WIDE_RATIO = (
    100,
    10,
)  # a parameter whose values are this far apart is drawn on a logarithmic axis
DOT, BEST, LINE = "#3b6ea5", "#d1495b", "#8a8a8a"


@dataclass(frozen=True)
class Trial:
    """One run of a sweep. `values` are its recipe's, flat (pairwise.budget_tokens); `metrics` is empty before it ended."""

    name: str
    folder: Path
    status: str
    values: Mapping[str, object]
    metrics: Mapping[str, float]


@click.command(help=__doc__)
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--by",
    type=click.Choice(tuple(LOWER_IS_BETTER)),
    default="log_loss",
    help="What decides which is best.",
)
@exits_with_2
def main(folder: Path, by: str) -> None:
    """Print the trials of a sweep, best first, and write them to sweep.csv and sweep.png."""
    trials = sorted(read_trials(folder), key=lambda trial: rank(trial, by))
    names = parameters(trials)
    finished = [trial for trial in trials if trial.status == FINISHED]
    with atomic_file(folder / "sweep.csv") as temporary:
        table_of(trials, names).write_csv(temporary)
    show(console(), trials, names)
    for note in notes(finished, names):
        click.echo(note)
    if finished:
        best = finished[0]
        click.echo(
            f"best by {by}: {best.name}; package it: python -m postprocess {best.folder / RECIPE_COPY}"
        )
    if drawn := parameters(finished):
        with atomic_file(folder / "sweep.png") as temporary:
            draw(folder, finished, drawn, temporary)
        click.echo(f"written: {folder / 'sweep.csv'}, {folder / 'sweep.png'}")
    else:
        (folder / "sweep.png").unlink(missing_ok=True)
        click.echo(f"written: {folder / 'sweep.csv'}; nothing to draw")


def read_trials(folder: Path) -> list[Trial]:
    """The trials in `folder`; one that was trained on several folds is one trial for each."""
    found = sorted(
        path for path in folder.glob("sweep*") if path.is_dir() and TRIAL.fullmatch(path.name)
    )
    if not found:
        what = "holds no sweep0001" if folder.is_dir() else "no such folder"
        raise UserError(
            f"{folder}: {what}; axolotl train RECIPE --sweep FILE writes the trials below FILE's output_dir, or the recipe's"
        )
    runs = [run for path in found for run in (sorted(path.glob("fold-*")) or [path])]
    return [read_trial(folder, run) for run in runs]


def read_trial(folder: Path, run: Path) -> Trial:
    """One trial, as far as it came."""
    recipe = run / RECIPE_COPY
    values = flat(read_yaml(recipe)) if recipe.is_file() else {}
    finished = (run / "metrics.json").is_file() and (run / "contract.json").is_file()
    metrics = read_object(run / "metrics.json") if finished else {}
    missing = [name for name in METRICS if finished and not is_number(metrics.get(name))]
    if missing:
        raise UserError(
            f"{run / 'metrics.json'}: no number {missing[0]}; it is not axolotl train's, train this trial again"
        )
    return Trial(
        str(run.relative_to(folder)), run, FINISHED if finished else why_not(run), values, metrics
    )


def why_not(run: Path) -> str:
    """Why a trial has no metrics: the last error in its log."""
    log = run / LOG
    text = log.read_bytes()[-TAIL_BYTES:].decode(errors="replace") if log.is_file() else ""
    errors = [said or raised for said, raised in ERROR_LINE.findall(text)]
    return f"failed: {errors[-1]}" if errors else UNFINISHED


def flat(values: Mapping, before: str = "") -> dict[str, object]:
    """Nested keys as one, with dots: {pairwise: {fold: 0}} is {pairwise.fold: 0}."""
    found = {}
    for key, value in values.items():
        found |= (
            flat(value, f"{before}{key}.")
            if isinstance(value, Mapping)
            else {f"{before}{key}": value}
        )
    return found


def parameters(trials: Sequence[Trial]) -> list[str]:
    """The keys that are not the same in all trials, in the order of the recipes."""
    known = [trial.values for trial in trials if trial.values]
    keys = dict.fromkeys(
        key for values in known for key in values if not NOT_PARAMETERS.fullmatch(key)
    )
    return [
        key
        for key in keys
        if len({json.dumps(values.get(key), default=str) for values in known}) > 1
    ]


def rank(trial: Trial, by: str) -> tuple:
    """Sorts trials best first; what has no metrics comes last."""
    if trial.status != FINISHED:
        return (1, 0, 0, trial.name)
    ordered = [by, *(name for name in LOWER_IS_BETTER if name != by)]
    return (
        0,
        *(trial.metrics[name] * (1 if LOWER_IS_BETTER[name] else -1) for name in ordered),
        trial.name,
    )


def table_of(trials: Sequence[Trial], names: Sequence[str]) -> pl.DataFrame:
    """One row a trial: its name, parameters, metrics, status."""
    columns = {"trial": [trial.name for trial in trials]}
    for name in names:
        values = [trial.values.get(name) for trial in trials]
        same_kind = all(value is None or is_number(value) for value in values)
        columns[name] = (
            values
            if same_kind
            else [None if value is None else in_short(value) for value in values]
        )
    columns |= {name: [trial.metrics.get(name) for trial in trials] for name in METRICS}
    return pl.DataFrame(columns | {"status": [trial.status for trial in trials]}, strict=False)


def is_number(value: object) -> bool:
    """Return whether a parameter is a number; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def in_short(value: object) -> str:
    """A parameter's value as a recipe has it."""
    if isinstance(value, list):
        return f"[{', '.join(map(in_short, value))}]"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def value_text(values: Mapping[str, object], name: str) -> str:
    """A trial's value of a parameter; nothing is known of one that left no recipe."""
    if not values:
        return "unknown"
    return "default" if values.get(name) is None else in_short(values[name])


def shortened(word: str) -> str:
    """Return the word, cut to what a column of the table holds."""
    return word if len(word) <= MOST_LETTERS else f"{word[:MOST_LETTERS]}…"


def show(screen: Console, trials: Sequence[Trial], names: Sequence[str]) -> None:
    """Print the trials as a table; where one did not end, its status takes the place of the metrics."""
    table = Table(box=SIMPLE_HEAD)
    for heading in ("trial", *names):
        table.add_column(
            heading, justify="left" if heading == "trial" else "right", overflow="fold"
        )
    for heading in (*METRICS, "status"):
        table.add_column(
            heading.replace("_", " "),
            justify="left" if heading == "status" else "right",
            overflow="fold",
        )
    for trial in trials:
        values = (value_text(trial.values, name) for name in names)
        table.add_row(
            trial.name,
            *values,
            *(metric_text(trial.metrics.get(name)) for name in METRICS),
            trial.status,
        )
    screen.print(table)


def metric_text(value: float | None) -> str:
    """Return a metric as the table shows it; a trial that failed has none."""
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def notes(finished: Sequence[Trial], names: Sequence[str]) -> list[str]:
    """What to know before one trial is called better than another."""
    told = []
    if not names:
        told.append(
            "all recipes are the same, or one trial has one: there are no parameters to tell apart"
        )
    rows = {(trial.metrics.get("fold"), trial.metrics.get("pairs_sha256")) for trial in finished}
    if len(rows) > 1:
        told.append(
            "the trials were validated on different rows (another fold, or other pairs): do not compare their metrics"
        )
    elif finished:
        count, accuracy = finished[0].metrics["rows"], finished[0].metrics["accuracy"]
        error = math.sqrt(accuracy * (1 - accuracy) / count)
        told.append(
            f"{count:,} validation rows: the standard error of an accuracy is {error:.3f}, and the best of several had luck too"
        )
    return told


def draw(folder: Path, finished: Sequence[Trial], names: Sequence[str], out: Path) -> None:
    """Write a PNG: a column for each parameter (the first six), a row for log loss and one for accuracy, a dot a trial."""
    drawn = names[:MOST_DRAWN]
    with matplotlib.style.context("default"):  # whatever the user's matplotlibrc says
        figure = Figure(
            figsize=(max(5.0, 3.4 * len(drawn)), 6), dpi=DOTS_PER_INCH, layout="constrained"
        )
        panels = figure.subplots(len(LOWER_IS_BETTER), len(drawn), sharey="row", squeeze=False)
        left_out = f", {len(drawn)} of {len(names)} parameters" if len(drawn) < len(names) else ""
        figure.suptitle(f"{folder}: {len(finished)} trials, the best in red{left_out}", fontsize=11)
        for row, metric in zip(panels, LOWER_IS_BETTER, strict=True):
            for axes, name in zip(row, drawn, strict=True):
                draw_parameter(axes, finished, name, metric)
            row[0].set_ylabel(
                f"{metric.replace('_', ' ')} ({'lower' if LOWER_IS_BETTER[metric] else 'higher'} is better)"
            )
        for axes, name in zip(panels[-1], drawn, strict=True):
            axes.set_xlabel(name)
        figure.savefig(out, format="png", metadata={"Software": None})


def draw_parameter(axes: Axes, finished: Sequence[Trial], name: str, metric: str) -> None:
    """A dot for each trial, and a line through the mean at each value of the parameter."""
    values = [trial.values.get(name) for trial in finished]
    metrics = [trial.metrics[metric] for trial in finished]
    if all(is_number(value) for value in values):
        places, labels = values, {value: f"{value:g}" for value in values}
        if min(values) > 0 and max(values) >= WIDE_RATIO * min(values):
            axes.set_xscale("log")
    else:
        words = [value_text(trial.values, name) for trial in finished]
        labels = {place: shortened(word) for place, word in enumerate(sorted(set(words)))}
        places = [sorted(set(words)).index(word) for word in words]
        axes.set_xlim(-0.5, len(labels) - 0.5)
    if len(labels) <= MOST_TICKS:
        axes.set_xticks(list(labels), list(labels.values()), rotation=30, ha="right")
        axes.minorticks_off()
    means = pl.DataFrame({"x": places, "y": metrics}, strict=False).group_by("x").mean().sort("x")
    axes.plot(means["x"], means["y"], color=LINE, linewidth=1, zorder=1)
    colours = [BEST if trial is finished[0] else DOT for trial in finished]
    axes.scatter(places, metrics, color=colours, s=30, zorder=2)
    axes.grid(axis="y", linewidth=0.4, alpha=0.6)


if __name__ == "__main__":
    main()
