"""`scores`: past submissions joined with the ledger: what each was made of, its cross-validation, and what Kaggle gave it.

CV is the competition's metric on the rows that training held out: of the kernel's models together, as push wrote it down, or
else of its one run; of a run that was trained on every row it is not known. Whether it can be trusted is what its correlation
with the leaderboard says.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from kaggle_kernels.build.listing import table_console
from kaggle_kernels.build.spec import COMPETITIONS
from kaggle_kernels.publish.client import Pace
from kaggle_kernels.publish.lineage import chain, push_of
from kaggle_kernels.publish.submit import list_submissions
from preprocess.core import ledger
from preprocess.core.files import atomic_file

PICTURE = Path("outputs/scores.png")
METRICS = {"accuracy": "accuracy (higher is better)", "log_loss": "log loss (lower is better)"}
COLUMNS = ("date (UTC)", "kernel", "commit", "recipe", "CV accuracy", "CV log loss", "public", "private", "message")
MADE = ("push", "package", "train")  # where the chain is broken at one of these, not every run is known
LEAST_POINTS = 3  # below, a line fits whatever there is
PUBLIC, PRIVATE, LINE = "#3b6ea5", "#d1495b", "#8a8a8a"


@dataclass(frozen=True)
class Scored:
    """A submission. What is not known is None; `recipes` is empty where the ledger does not have it."""

    date: str
    message: str
    status: str
    public: float | None
    private: float | None
    kernel: str | None = None
    commit: str | None = None
    recipes: tuple[str, ...] = ()
    accuracy: float | None = None
    log_loss: float | None = None


def print_scores(competition: str, pace: Pace) -> None:
    """Print the table and the correlations, and draw them to outputs/scores.png where there is something to draw."""
    known = COMPETITIONS[competition]
    rows = join(list_submissions(known, pace), ledger.read())
    if not rows:
        print(f"{known.slug}: no submissions")
        return
    table_console().print(table(rows))
    for side in ("public", "private"):
        print(correlation(rows, known.metric, side))
    if draw(rows, competition, known.metric):
        print(f"{PICTURE}: CV beside the leaderboard")


def join(submissions: Sequence[Mapping], entries: Sequence[Mapping]) -> list[Scored]:
    """Each of Kaggle's submissions, newest first, with what the ledger says of it."""
    return [scored(row, find_submit(row, entries), entries) for row in submissions]


def find_submit(row: Mapping, entries: Sequence[Mapping]) -> Mapping | None:
    """The ledger's entry of a submission: by its ref, or by its message where Kaggle had not listed it yet."""
    submits = [entry for entry in reversed(entries) if entry["event"] == "submit"]
    by_ref = [entry for entry in submits if str(entry.get("submission_ref")) == str(row["ref"])]
    unlisted = [entry for entry in submits if not str(entry.get("submission_ref")).isdigit()]
    by_message = [entry for entry in unlisted if entry.get("message") == row.get("description")]
    return next(iter([*by_ref, *by_message]), None)


def scored(row: Mapping, submit: Mapping | None, entries: Sequence[Mapping]) -> Scored:
    """One submission, its chain followed to the runs that its packages were made of."""
    told = {
        "date": str(row.get("date"))[:16].replace("T", " "),
        "message": str(row.get("description") or ""),
        "status": str(row.get("status")).split(".")[-1],
        "public": number(row.get("publicScore")),
        "private": number(row.get("privateScore")),
    }
    if submit is None:
        return Scored(**told)
    push = push_of(entries, submit)
    steps = list(chain(entries, submit, push))
    trainings = [step.entry for step in steps if step.event == "train" and step.entry]
    cv = validation_of(push or {}, () if any(step.is_broken and step.event in MADE for step in steps) else trainings)
    return Scored(
        **told,
        kernel=f"{str(submit.get('kernel')).split('/')[-1]} {submit.get('kernel_version')}",
        commit=commit_of(push or {}),
        recipes=tuple(dict.fromkeys(Path(entry.get("recipe", "")).stem for entry in trainings)),
        accuracy=number(cv.get("accuracy")),
        log_loss=number(cv.get("log_loss")),
    )


def commit_of(push: Mapping) -> str | None:
    """The commit that a kernel was pushed from, with a + where the tree was dirty."""
    commit = push.get("git_commit")
    return f"{commit[:7]}{'+' * bool(push.get('git_dirty'))}" if commit else None


def validation_of(push: Mapping, trainings: Sequence[Mapping]) -> Mapping:
    """The metrics of what was pushed, on held-out rows; of one run they are those of its training. Empty where not known."""
    if push.get("validation"):
        return push["validation"]
    metrics = trainings[0].get("metrics", {}) if len(trainings) == 1 else {}
    return {} if metrics.get("rows_were_trained_on") else metrics


def number(value: object) -> float | None:
    """A score as a number; None where there is none (yet)."""
    try:
        found = float(str(value))
    except ValueError:
        return None
    return found if math.isfinite(found) else None


def table(rows: Sequence[Scored]) -> Table:
    """A line a submission."""
    made = Table(*COLUMNS, box=SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        values = (row.accuracy, row.log_loss, row.public, row.private)
        cells = ["" if value is None else f"{value:.4f}" for value in values]
        if row.public is None:
            cells[2] = row.status.lower()
        made_of = (row.kernel or "not in the ledger", row.commit or "", "\n".join(row.recipes))
        made.add_row(row.date, *made_of, *cells, escape(row.message))
    return made


def points(rows: Sequence[Scored], metric: str, side: str) -> list[tuple[float, float, Scored]]:
    """CV, score and submission, where both are known."""
    pairs = [(getattr(row, metric), getattr(row, side), row) for row in rows]
    return [(cv, score, row) for cv, score, row in pairs if cv is not None and score is not None]


def correlation(rows: Sequence[Scored], metric: str, side: str) -> str:
    """How CV and a side of the leaderboard go together, in words."""
    return f"correlation of CV and {side} score, {METRICS[metric]}: {pearson(rows, metric, side)}"


def pearson(rows: Sequence[Scored], metric: str, side: str) -> str:
    """Pearson's correlation of CV and a side of the leaderboard, or why it is not known."""
    found = points(rows, metric, side)
    if len(found) < LEAST_POINTS:
        return f"unknown, {len(found)} of at least {LEAST_POINTS} submissions with both"
    cv, score, _ = zip(*found, strict=True)
    if len(set(cv)) == 1 or len(set(score)) == 1:
        return f"unknown, all {len(found)} have the same {'CV' if len(set(cv)) == 1 else 'score'}"
    return f"{np.corrcoef(cv, score)[0, 1]:.3f} (Pearson, n = {len(found)})"


def draw(rows: Sequence[Scored], competition: str, metric: str) -> bool:
    """Write outputs/scores.png, a dot a submission; whether there was one to draw."""
    drawn = [(side, colour, points(rows, metric, side)) for side, colour in (("public", PUBLIC), ("private", PRIVATE))]
    sides = [(side, colour, found) for side, colour, found in drawn if found]
    if not sides:
        PICTURE.unlink(missing_ok=True)  # an earlier picture would be taken for this one
        return False
    with matplotlib.style.context("default"):  # whatever the user's matplotlibrc says
        figure = Figure(figsize=(7.5, 6), dpi=100, layout="constrained")
        axes = figure.subplots()
        for side, colour, found in sides:
            axes.scatter([cv for cv, _, _ in found], [score for _, score, _ in found], color=colour, label=side)
        for cv, score, row in sides[0][2]:
            axes.annotate(row.kernel, (cv, score), xytext=(0, 7), textcoords="offset points", fontsize=8, ha="center")
        axes.set(xlabel=f"CV {METRICS[metric]}", ylabel=f"leaderboard {METRICS[metric]}")
        told = (f"{side}: correlation {pearson(rows, metric, side)}" for side, _, _ in sides)
        axes.set_title("\n".join([competition, *told]), fontsize=9)
        axes.grid(color=LINE, alpha=0.3)
        axes.margins(0.22, 0.12)
        axes.legend()
        with atomic_file(PICTURE) as temporary:
            figure.savefig(temporary, format="png", metadata={"Software": None})
    return True
