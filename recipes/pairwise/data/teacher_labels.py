"""The file of a teacher's labels, outputs/TEACHER/labels.parquet, and what a student reads of it.

`pairwise labels` (postprocess/labels) writes the file. A row's label is the mean of the runs that did
not train on it: of its own fold's run for a row with votes, of all folds' runs for the pool and the
lockbox. A student refuses labels that say otherwise, that are of another pairs file, or that are older
than the runs which they come from.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import polars as pl

from preprocess.core.errors import UserError
from preprocess.core.files import read_object, sha256
from preprocess.model_input import VERDICTS
from recipes.pairwise.config.schema import DistillBlock

# These stand in the teacher's folder, beside its runs.
LABELS = "labels.parquet"
LABELS_RECORD = "labels.json"
LOCKBOX = "lockbox.json"  # its scores on the lockbox rows


def teacher_folder(run: str) -> Path:
    """Find a teacher's folder: `run` is the name of one below outputs/, or a path."""
    if "/" in run:
        return Path(run)
    return Path("outputs") / run


def hash_labels(distill: DistillBlock | None) -> dict[str, str]:
    """Hash the files of labels that a student reads, by their paths; empty without distillation."""
    if distill is None:
        return {}

    hashes = {}
    for run in distill.teachers:
        file = teacher_folder(run) / LABELS
        hashes[str(file)] = sha256(file) if file.is_file() else "absent"
    return hashes


def read_teachers(
    distill: DistillBlock, rows: pl.DataFrame, pairs_file: Path, verdicts: Sequence[str]
) -> np.ndarray:
    """Read the labels of a student's training rows, averaged over its teachers by their weights.

    Returns:
        Probabilities, float32 (rows, verdicts), in the order as given.

    Raises:
        UserError: A file is missing, or its labels are not fit for these rows.
    """
    probability_columns = [f"p_{verdict}" for verdict in verdicts]
    labels_by_teacher = []
    for run in distill.teachers:
        labels = read_labels(teacher_folder(run), rows, pairs_file, verdicts)
        labels_by_teacher.append(labels.select(probability_columns).to_numpy())

    weights = list(distill.teachers.values())
    mean_rv = np.average(labels_by_teacher, axis=0, weights=weights)
    return mean_rv.astype(np.float32)


def read_labels(
    folder: Path, rows: pl.DataFrame, pairs_file: Path, verdicts: Sequence[str]
) -> pl.DataFrame:
    """Read one teacher's labels of some rows of the pairs file, in the order of the rows.

    Returns:
        A row for each of `rows`, with the columns id, role, fold, and those of labels.parquet: the
        probabilities, and as `runs` the names of the teacher's runs that gave them.
    """
    file = folder / LABELS
    if not file.is_file() or not (folder / LABELS_RECORD).is_file():
        raise UserError(
            f"{file}: no such file; train the teacher's folds with make cv R={folder.name}, and label with "
            f"pairwise labels {folder.name}"
        )
    record = read_object(folder / LABELS_RECORD)
    check_record(record, folder, pairs_file, verdicts)

    # A left join keeps a row that has no label, with nulls in its columns. The next check names it.
    all_labels = pl.read_parquet(file)
    wanted_rows = rows.select("id", "role", "fold")
    labels = wanted_rows.join(all_labels, on="id", how="left", maintain_order="left")
    check_each_row_has_label(labels, folder)
    check_runs(labels, record["runs"], file)
    return labels


def check_record(record: Mapping, folder: Path, pairs_file: Path, verdicts: Sequence[str]) -> None:
    """Check that a teacher's labels are of the student's pairs file and verdicts, and of its runs as they are now.

    `record` is the teacher's labels.json: it says from which pairs file and which runs the labels were made.
    """
    file = folder / LABELS
    remedy = f"run pairwise labels {folder.name} again"

    # Ids of another file may name other pairs, or its folds may be cut in another way.
    if record["pairs_sha256"] != sha256(pairs_file):
        raise UserError(
            f"{file}: these labels were made from another pairs file than {pairs_file} as it is now; train teacher and "
            f"student on one file, and {remedy}"
        )

    if set(record["verdicts"]) != set(verdicts):
        raise UserError(
            f"{file}: the teacher's verdicts are {', '.join(record['verdicts'])}, the student's "
            f"{', '.join(verdicts)}; set pairwise.verdicts to the same in both recipes"
        )

    # A run that is trained again gets a new contract.json.
    for run, run_record in record["runs"].items():
        contract = folder / run / "contract.json"
        if not contract.is_file() or sha256(contract) != run_record["contract_sha256"]:
            raise UserError(
                f"{file}: the run {folder / run} was trained again, or removed, after these labels were made; {remedy}"
            )


def check_each_row_has_label(labels: pl.DataFrame, folder: Path) -> None:
    """Raise UserError where the teacher in a folder has not labelled a row: its columns are null."""
    unlabelled = labels.filter(pl.col("runs").is_null())
    if unlabelled.is_empty():
        return
    raise UserError(
        f"{folder / LABELS}: no label of {len(unlabelled):,} of the {len(labels):,} training rows, such as "
        f"{unlabelled['id'][0]} (role {unlabelled['role'][0]}); train every fold of the teacher with "
        f"make cv R={folder.name}, and label again"
    )


def check_runs(labels: pl.DataFrame, runs: Mapping[str, Mapping], file: Path) -> None:
    """Check that no row with votes was labelled by a run that was trained on it.

    A teacher is trained once for each fold, and each of these runs holds out its own fold. So a row of
    fold 2 may be labelled only by the run that held out fold 2.
    """
    held_out_fold = {run: run_record["fold"] for run, run_record in runs.items()}

    # Rows of the other roles, pool and test, are never trained on by a teacher: all runs may label them.
    with_votes = labels.filter(pl.col("role").is_in(["train", "extra"]))
    for row_id, fold, row_runs in with_votes.select("id", "fold", "runs").iter_rows():
        for run in row_runs:
            if held_out_fold.get(run) != fold:
                raise UserError(
                    f"{file}: {row_id} of fold {fold} is labelled by the run {run}, which was trained on it; a "
                    "teacher's labels must be out-of-fold: make them with pairwise labels"
                )


def label_columns(suffix: str = "") -> list[str]:
    """Name the columns of probabilities: of the mean of both orders, or with a suffix of one order."""
    return [f"p_{verdict}{suffix}" for verdict in VERDICTS]
