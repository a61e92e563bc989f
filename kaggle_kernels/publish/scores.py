"""`scores`: past submissions with what the ledger says of them and what Kaggle gave them, one table.

CV is the competition's metric on the rows that training held out: of the kernel's models together, as push wrote it down, or
of its one run. A run that was trained on every row has none.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kagglesdk.competitions.types.competition_api_service import ApiSubmission
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from kaggle_kernels.build.listing import table_console
from kaggle_kernels.build.spec import COMPETITIONS
from kaggle_kernels.publish.client import Pace, connect
from kaggle_kernels.publish.lineage import Step, describe_commit, find_by, find_push, follow_chain
from kaggle_kernels.publish.submit import list_submissions
from preprocess.core import ledger

COLUMNS = ("date (UTC)", "kernel", "commit", "recipe", "CV", "public", "private", "message")


@dataclass(frozen=True)
class Origin:
    """What the ledger says of a submission; an empty text or None where it does not know."""

    kernel: str = "not in the ledger"
    commit: str = ""
    recipes: tuple[str, ...] = ()
    cv: float | None = None


def print_scores(competition_name: str, pace: Pace) -> None:
    """Print a row for each of the newest submissions to a competition."""
    competition = COMPETITIONS[competition_name]
    submissions = list_submissions(connect(pace), competition)
    if not submissions:
        print(f"{competition.slug}: no submissions")
        return

    entries = ledger.read()
    table = Table(*COLUMNS, box=SIMPLE_HEAD, pad_edge=False)
    for submission in submissions:
        origin = find_origin(submission, entries, competition.metric)
        table.add_row(*make_cells(submission, origin))
    table_console().print(table)


def make_cells(submission: ApiSubmission, origin: Origin) -> list[str]:
    """Write the row of a submission; its status stands for the score where it has none (yet)."""
    public = format_score(submission.public_score) or submission.status.name.lower()
    return [
        f"{submission.date:%Y-%m-%d %H:%M}",
        origin.kernel,
        origin.commit,
        "\n".join(origin.recipes),
        format_score(origin.cv),
        public,
        format_score(submission.private_score),
        escape(submission.description or ""),
    ]


def format_score(value: float | str | None) -> str:
    """Write a score with four digits; empty where there is none."""
    # Kaggle gives a text, which is empty before the score is there.
    try:
        number = float(value)
    except (TypeError, ValueError):
        return ""
    return f"{number:.4f}" if math.isfinite(number) else ""


def find_origin(submission: ApiSubmission, entries: Sequence[Mapping], metric: str) -> Origin:
    """Follow one of Kaggle's submissions through the ledger; `metric` is which of the metrics CV is."""
    # A submission that was made on another machine is in another ledger.
    submit = find_by(entries, "submit", "submission_ref", str(submission.ref))
    if submit is None:
        return Origin()

    # The runs that its packages were made of.
    push = find_push(entries, submit)
    steps = list(follow_chain(entries, submit, push))
    trainings = [step.entry for step in steps if step.event == "train" and step.entry]
    recipes = [Path(entry.get("recipe", "")).stem for entry in trainings]

    kernel = str(submit.get("kernel")).split("/")[-1]
    return Origin(
        kernel=f"{kernel} {submit.get('kernel_version')}",
        commit=describe_commit(push or {}, digits=7),
        recipes=tuple(dict.fromkeys(recipes)),
        cv=find_metrics(push, steps, trainings).get(metric),
    )


def find_metrics(
    push: Mapping | None, steps: Sequence[Step], trainings: Sequence[Mapping]
) -> Mapping:
    """Find the metrics on held-out rows: of all models together, or of the only run. Empty where they are unknown."""
    if push and push.get("validation"):
        return push["validation"]

    # With a broken chain, the one training that is known may not be the only one.
    is_whole = not any(step.is_broken and step.event != "pairs" for step in steps)
    if len(trainings) != 1 or not is_whole:
        return {}
    metrics = trainings[0].get("metrics") or {}
    return {} if metrics.get("rows_were_trained_on") else metrics
