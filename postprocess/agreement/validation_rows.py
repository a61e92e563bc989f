"""The rows that models are compared on, and which of many rows to take: by a hash of their ids, so always the same.

Also the ids of a run's validation rows, for the package: the kernel's visible run scores some of these.
"""

import re
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

import polars as pl

from kaggle_kernels.runtime.models.scoring import ORDERS
from postprocess.run_folder import Run
from preprocess.core.errors import UserError
from preprocess.core.files import read_object
from recipes.pairwise.data.datasets import read_pairs

ROWS = 500
LISTED_IDS = 5000


def by_hash(ids: Iterable[str], count: int = ROWS, salt: str = "") -> list[str]:
    """Choose and order ids by the SHA-256 of each.

    Args:
        ids: The ids.
        count: How many are chosen at most.
        salt: Another one chooses others.
    """

    def hash_id(row_id: str) -> str:
        return sha256((salt + row_id).encode()).hexdigest()

    return sorted(ids, key=hash_id)[:count]


def part_bounds(part: int) -> tuple[int, int]:
    """Give the places of the rows that are scored in one go: 500, then four times as many in all, and so on.

    Args:
        part: 0 for the first rows, 1 for those that are added if they do not decide, …

    Returns:
        The first place and the one behind the last, in the order of by_hash.
    """
    if part == 0:
        return 0, ROWS
    return ROWS * 4 ** (part - 1), ROWS * 4**part


def count_validation_rows(run: Run) -> int:
    """Count the rows that models could be compared on."""
    return len(read_predictions(run.validation_files()[1], run.contract.verdicts))


def validation_rows(run: Run, first: int = 0, end: int = ROWS) -> tuple[pl.DataFrame, list]:
    """Read some of the rows in predictions.parquet, in the order of a hash of their ids.

    Args:
        run: The run.
        first: The place of the first row.
        end: The place behind the last one; there may be fewer.

    Returns:
        A table with the columns of the recipe's pairs file and the probabilities of
        predictions.parquet, and the rows as pairs, in the table's order.

    Raises:
        UserError: The pairs file does not hold the rows.
    """
    pairs_file, predictions_file = run.validation_files()
    predictions = read_predictions(predictions_file, run.contract.verdicts)
    ids = by_hash(predictions["id"], end)[first:]
    order = pl.DataFrame({"id": ids}, schema={"id": pl.String})
    rows = order.join(predictions, on="id", maintain_order="left")
    rows = rows.join(read_pairs(pairs_file), on="id", maintain_order="left")
    if len(rows) != len(ids) or not ids:
        raise UserError(
            f"{pairs_file}: holds {len(rows)} of the {len(ids)} validation rows in {predictions_file}; "
            "it is not the file of the training"
        )
    return rows, [run.model_input.pair_from_row(row) for row in rows.iter_rows(named=True)]


def read_predictions(file: Path, verdicts: tuple[str, ...]) -> pl.DataFrame:
    """Read ids and the probabilities of each order from a run's predictions.parquet."""
    columns = ["id"]
    for verdict in verdicts:
        columns += [f"p_{verdict}_{order}" for order in ORDERS]
    try:
        return pl.read_parquet(file, columns=columns)
    except (pl.exceptions.PolarsError, OSError) as error:
        first_line = str(error).splitlines()[0]
        raise UserError(
            f"{file}: not the predictions of training ({first_line}); train again"
        ) from None


def validation_ids(run: Run) -> dict:
    """List up to 5,000 ids of validation rows, and say of which fold they are and whether they were trained on.

    The ids are those of the competition's file. One that also is the id of a row outside the fold, of another source or
    fold, is left out: the kernel, which sees only the competition's file, could not tell the two apart.
    """
    pairs_file, predictions_file = run.validation_files()
    held_out_ids = set(read_predictions(predictions_file, run.contract.verdicts)["id"])
    frame = read_pairs(pairs_file)
    sources = frame["source"] if "source" in frame.columns else [""] * len(frame)

    ids_inside = set()
    ids_outside = set()
    folds = set()
    for row_id, source, row_fold in zip(frame["id"], sources, frame["fold"], strict=True):
        if row_id in held_out_ids:
            ids_inside |= source_ids(row_id, source)
            folds.add(row_fold)
        else:
            ids_outside |= source_ids(row_id, source)

    # Without metrics, rows of several folds can only be those of a run that held none out.
    metrics_file = run.folder / "metrics.json"
    metrics = read_object(metrics_file) if metrics_file.is_file() else {}
    fold = metrics.get("fold", min(folds) if len(folds) == 1 else "all")
    is_trained_on_all = fold == "all" and run.recipe.pairwise.train
    return {
        "fold": fold,
        "trained_on": bool(metrics.get("rows_were_trained_on", is_trained_on_all)),
        "ids": by_hash(ids_inside - ids_outside, LISTED_IDS),
    }


def source_ids(row_id: str, source: str) -> set[str]:
    """Return the ids that a row of pairs.parquet may have had in its source.

    Of an id that was taken already, preprocess makes `source:id` or `source:id:2`.
    """
    if not source or not row_id.startswith(f"{source}:"):
        return {row_id}
    name = row_id.removeprefix(f"{source}:")
    return {name, re.sub(r":\d+$", "", name)}
