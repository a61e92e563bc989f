"""`scores`: past submissions with what the ledger says of them and what Kaggle gave them, one table.

Lockbox is the competition's metric on rows that no model or teacher has seen, and CV that on the rows that training held out,
of the kernel's models together. Both are as push wrote them down.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from kagglesdk.competitions.types.competition_api_service import ApiSubmission
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from kaggle_kernels.build.listing import table_console
from kaggle_kernels.publish.client import Pace, connect
from kaggle_kernels.publish.lineage import find_entry, find_push, follow_push, shorten_commit
from kaggle_kernels.publish.submit import list_submissions
from preprocess.competitions import COMPETITIONS
from preprocess.core import ledger

COLUMNS = (
    "date (UTC)",
    "kernel",
    "commit",
    "recipe",
    "lockbox",
    "CV",
    "public",
    "private",
    "message",
)


def print_scores(competition_name: str, pace: Pace) -> None:
    """Print a row for each of the newest submissions to a competition."""
    competition = COMPETITIONS[competition_name]
    submissions = list_submissions(connect(pace), competition.slug)
    if not submissions:
        print(f"{competition.slug}: no submissions")
        return

    entries = ledger.read()
    table = Table(*COLUMNS, box=SIMPLE_HEAD, pad_edge=False)
    for submission in submissions:
        origin = describe_origin(submission, entries, competition.metric)
        # The status stands for the score where there is none (yet).
        public = format_score(submission.public_score) or submission.status.name.lower()
        private = format_score(submission.private_score)
        message = escape(submission.description or "")
        table.add_row(f"{submission.date:%Y-%m-%d %H:%M}", *origin, public, private, message)
    table_console().print(table)


def describe_origin(
    submission: ApiSubmission, entries: Sequence[Mapping], metric: str
) -> tuple[str, str, str, str, str]:
    """Look up in the ledger where a submission came from: its entry of the submission leads to that of the push.

    Returns:
        The cells kernel, commit, recipe, lockbox and CV of its row; empty where the ledger does not say.
    """
    # A submission that was made on another machine is in another ledger.
    submit = find_entry(entries, "submit", "submission_ref", str(submission.ref))
    if submit is None:
        return "not in the ledger", "", "", "", ""

    # The ledger has a kernel as owner/slug. The owner is the same in all rows, and is not shown.
    slug = submit["kernel"].split("/")[-1]
    kernel = f"{slug} {submit['kernel_version']}"

    # The push, too, may have been made on another machine.
    push = find_push(entries, submit)
    if push is None:
        return kernel, "", "", "", ""

    # The push wrote down the metrics of the kernel's models together, where there were any.
    lockbox_metrics = push.get("lockbox") or {}
    validation_metrics = push.get("validation") or {}
    return (
        kernel,
        shorten_commit(push, digits=7),
        "\n".join(list_recipes(entries, push)),
        format_score(lockbox_metrics.get(metric)),
        format_score(validation_metrics.get(metric)),
    )


def list_recipes(entries: Sequence[Mapping], push: Mapping) -> list[str]:
    """List the recipes by which the models of a pushed kernel were trained, each of them once.

    Several packages, or the folds of one, may be of the same recipe. Trainings that are not in the ledger
    are left out.
    """
    recipes = []
    for step in follow_push(entries, push, depth=0):
        if step.event != "train" or step.is_broken:
            continue

        recipe = Path(step.entry["recipe"]).stem
        if recipe not in recipes:
            recipes.append(recipe)
    return recipes


def format_score(value: float | str | None) -> str:
    """Write a score with four digits; empty where there is none."""
    # Kaggle gives a text, which is empty before the score is there.
    try:
        number = float(value)
    except (TypeError, ValueError):
        return ""
    return f"{number:.4f}" if math.isfinite(number) else ""
