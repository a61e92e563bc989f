"""Label a pairs file with a teacher: choose each run's rows, score them, and average what several runs say.

`python -m postprocess.labels` calls `make_labels`. The file and its reader are in
recipes/pairwise/data/teacher_labels.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl

from postprocess.agreement.statistics import stack_orders
from postprocess.labels.score_rows import score_rows
from postprocess.run_folder import Run, read_run
from preprocess.core.errors import UserError
from preprocess.core.files import atomic_file, read_object, sha256, write_json
from recipes.pairwise.config.schema import Recipe
from recipes.pairwise.data.datasets import list_folds, read_pairs, targets, winners
from recipes.pairwise.data.teacher_labels import LABELS, LABELS_RECORD, LOCKBOX, label_columns
from recipes.pairwise.tracking import metrics

CHUNKS = "labels"  # the folder of unfinished work, in the run's folder
OWN_RUN = "."  # the name of a recipe's only run, that of its own folder
SUFFIXES = ("", *(f"_{order}" for order in metrics.ORDERS))


@dataclass(frozen=True)
class TeacherRun:
    """One run of a teacher."""

    name: str  # its folder within the teacher's: fold-0, or "." for the teacher's own
    # The fold of rows that it was not trained on; None where it was trained on all of them.
    fold: int | None
    run: Run


def make_labels(recipe: Recipe, only_run: str | None = None, ray_workers: int = 0) -> None:
    """Label rows with a teacher: write to labels.parquet what probabilities its trained models give.

    labels.json records what made them. lockbox.json, written where the pairs file has lockbox rows, tells
    how good the teacher is. With `only_run`, such as fold-0, this run alone scores, and the files are left
    to another call.

    Raises:
        UserError: A run is missing, not complete, or of another pairs file.
    """
    pairs_file = Path(recipe.pairwise.pairs)
    pairs = read_pairs(pairs_file)
    pairs_sha256 = sha256(pairs_file)
    folder = recipe.run_folder
    teacher_runs = find_runs(recipe, pairs, pairs_sha256)
    if only_run is not None:
        selected_run = select_run(teacher_runs, only_run, folder)
        score_with_run(selected_run, pairs, pairs_sha256, ray_workers)
        return

    # What was scored before is read from the chunks that it left.
    tables = {}
    records = {}
    for teacher_run in teacher_runs:
        tables[teacher_run.name] = score_with_run(teacher_run, pairs, pairs_sha256, ray_workers)
        records[teacher_run.name] = describe_run(teacher_run)

    # labels.parquet is the same whichever process has scored which chunk.
    labels = average_runs(tables)
    with atomic_file(folder / LABELS) as temporary:
        labels.write_parquet(temporary)

    # The runs of one recipe have the same verdicts.
    verdicts = teacher_runs[0].run.contract.verdicts
    record = {"pairs_sha256": pairs_sha256, "verdicts": list(verdicts), "runs": records}
    write_json(folder / LABELS_RECORD, record)
    print(f"{folder / LABELS}: {len(labels):,} of {len(pairs):,} rows, by {len(records)} run(s)")
    measure_lockbox(folder, labels, pairs, verdicts)


def select_run(teacher_runs: Sequence[TeacherRun], name: str, folder: Path) -> TeacherRun:
    """Select the run that the user has named.

    Raises:
        UserError: The teacher has no such run.
    """
    runs_by_name = {teacher_run.name: teacher_run for teacher_run in teacher_runs}
    if name in runs_by_name:
        return runs_by_name[name]

    if OWN_RUN in runs_by_name:
        raise UserError(
            f"--run {name}: {folder} is one run on its own, without runs of folds; leave --run out"
        )
    raise UserError(
        f"--run {name}: {folder} has no such run; choose one of {', '.join(runs_by_name)}"
    )


def score_with_run(
    teacher_run: TeacherRun, pairs: pl.DataFrame, pairs_sha256: str, ray_workers: int
) -> pl.DataFrame:
    """Score the rows that a run was not trained on.

    Raises:
        UserError: The run was trained on every row.
    """
    rows = choose_rows(pairs, teacher_run.fold)
    if rows.is_empty():
        raise UserError(
            f"{teacher_run.run.folder}: was trained on every row of its pairs file, so that there is none to "
            "label; hold out a fold, or add a pool"
        )

    # The key is what the scores depend on: those made with another key are made again.
    key = {"pairs_sha256": pairs_sha256, **describe_run(teacher_run)}
    chunks_folder = teacher_run.run.folder / CHUNKS
    return score_rows(teacher_run.run, rows, key, chunks_folder, ray_workers)


def describe_run(teacher_run: TeacherRun) -> dict[str, object]:
    """Describe a run as labels.json does: the fold that it held out, and which training it is of."""
    # A new training writes a new contract, in which it records its time.
    contract_sha256 = sha256(teacher_run.run.folder / "contract.json")
    return {"fold": teacher_run.fold, "contract_sha256": contract_sha256}


def find_runs(recipe: Recipe, pairs: pl.DataFrame, pairs_sha256: str) -> list[TeacherRun]:
    """Find the trained models of a teacher: one for each fold of a cross-validation, or its only one.

    The recipe's run folder holds the model itself, or the folders fold-0, fold-1, … with a model each.

    Raises:
        UserError: The run of a fold is missing, or was trained on the fold's rows.
    """
    fold_folders = {}
    for fold in list_folds(pairs):
        fold_folders[fold] = recipe.run_folder / f"fold-{fold}"

    # A training writes contract.json last. With one finished fold, all the others must be there too.
    finished_folds = [
        fold for fold, folder in fold_folders.items() if (folder / "contract.json").is_file()
    ]
    if not finished_folds:
        held_out_fold = read_fold(recipe.run_folder, pairs_sha256)
        return [TeacherRun(OWN_RUN, held_out_fold, read_run(recipe))]

    runs = []
    for fold, fold_folder in fold_folders.items():
        held_out_fold = read_fold(fold_folder, pairs_sha256)
        if held_out_fold != fold:
            raise UserError(
                f"{fold_folder / 'metrics.json'}: this run held out fold {held_out_fold} and was trained on the rows "
                f"of fold {fold}, which it is to label; train it again with make cv R={fold_folder.parent.name}"
            )

        # The folds share one recipe. Each run is read with a copy that has its own fold and folder.
        block = recipe.pairwise.model_copy(update={"fold": fold})
        recipe_of_fold = replace(recipe, run_folder=fold_folder, pairwise=block)
        runs.append(TeacherRun(fold_folder.name, fold, read_run(recipe_of_fold)))
    return runs


def read_fold(folder: Path, pairs_sha256: str) -> int | None:
    """Read from a run's metrics.json which fold it was not trained on.

    Returns:
        The fold's number; None for a run that was trained on all rows.

    Raises:
        UserError: There is no metrics.json, or the run was trained on another pairs file.
    """
    file = folder / "metrics.json"
    if not file.is_file():
        raise UserError(
            f"{file}: no such file; train the teacher's folds with make cv R={folder.parent.name}"
        )

    # A row's fold is a column of the pairs file: in another file, fold 0 may have other rows.
    recorded = read_object(file)
    if recorded.get("pairs_sha256") != pairs_sha256:
        raise UserError(
            f"{file}: the run was trained on another pairs file than the one that the recipe names now; "
            "train again"
        )
    fold = recorded.get("fold")
    return None if fold == "all" else fold


def choose_rows(pairs: pl.DataFrame, fold: int | None) -> pl.DataFrame:
    """Choose the rows that a run was not trained on: its held-out fold, the pool and the lockbox.

    Without a fold, it was trained on all rows with votes.
    """
    is_trained_on = pl.col("role").is_in(["train", "extra"])
    if fold is not None:
        is_trained_on &= pl.col("fold") != fold
    return pairs.filter(~is_trained_on)


def average_runs(tables: Mapping[str, pl.DataFrame]) -> pl.DataFrame:
    """Average the runs' probabilities of each row.

    Returns:
        id, runs (the names of those that scored the row), and the probabilities of the mean and of each
        order; sorted by id.
    """
    # The columns of the mean of both orders have no suffix, those of one order end in its name.
    columns = []
    for suffix in SUFFIXES:
        columns += label_columns(suffix)

    named_tables = []
    for name, table in tables.items():
        named_tables.append(table.select("id", pl.lit(name).alias("runs"), *columns))
    rows = pl.concat(named_tables)
    # Most rows were scored by one run; pool and lockbox rows by all of them.
    return rows.group_by("id").agg(pl.col("runs"), pl.col(columns).mean()).sort("id")


def measure_lockbox(
    folder: Path, labels: pl.DataFrame, pairs: pl.DataFrame, verdicts: tuple[str, ...]
) -> None:
    """Measure a teacher on the lockbox, the test rows that no run was trained on; print and write lockbox.json.

    Without lockbox rows, nothing is written.
    """
    lockbox = pairs.filter(role="test").join(labels, on="id", how="inner", suffix="_label")
    if lockbox.is_empty():
        return

    # The labels are measured against what people voted.
    labels_rv = targets(lockbox, verdicts)
    winners_r = winners(lockbox, verdicts)
    scores = metrics.scores(stack_orders(lockbox, verdicts), labels_rv, winners_r)
    write_json(folder / LOCKBOX, scores | {"rows": len(lockbox)})
    print(
        f"lockbox: accuracy {scores['accuracy']:.4f}, log loss {scores['log_loss']:.4f} on {len(lockbox):,} rows"
    )
