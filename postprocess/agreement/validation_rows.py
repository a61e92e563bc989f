"""The rows that models are compared on, and which of many rows to take: by a hash of their ids, so always the same.

Also the ids of a run's validation rows, for the package: the kernel's visible run scores some of these.
"""

import re
from collections.abc import Iterable, Mapping
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
    """At most `count` of `ids`, chosen and ordered by the SHA-256 of each; another `salt` chooses others."""
    return sorted(ids, key=lambda row_id: sha256((salt + row_id).encode()).hexdigest())[:count]


def validation_rows(run: Run) -> tuple[pl.DataFrame, list]:
    """Up to 500 of the rows in predictions.parquet, chosen by a hash of their ids, as a table and as pairs, in one order.

    The table has the columns of the recipe's pairs file and the probabilities of predictions.parquet.
    """
    pairs_file, file = run.validation_files()
    predictions = read_predictions(file, run.contract.verdicts)
    keep = by_hash(predictions["id"])
    rows = read_pairs(pairs_file).filter(pl.col("id").is_in(keep)).join(predictions, on="id", how="inner")
    if len(rows) != len(keep) or not keep:
        raise UserError(
            f"{pairs_file}: holds {len(rows)} of the {len(keep)} validation rows in {file}; it is not the file of the training"
        )
    return rows, [run.model_input.pair_from_row(row) for row in rows.iter_rows(named=True)]


def read_predictions(file: Path, verdicts: tuple[str, ...]) -> pl.DataFrame:
    """Id and the probabilities of each order from a run's predictions.parquet."""
    try:
        return pl.read_parquet(file, columns=["id", *(f"p_{verdict}_{order}" for verdict in verdicts for order in ORDERS)])
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UserError(f"{file}: not the predictions of training ({str(error).splitlines()[0]}); train again") from None


def validation_ids(run: Run) -> dict:
    """The run's fold, whether it was trained on the rows of predictions.parquet, and up to 5,000 ids of them, by hash.

    The ids are those of the competition's file. One that also is the id of a row outside the fold, of another source or
    fold, is left out: the kernel, which sees only the competition's file, could not tell the two apart.
    """
    pairs_file, file = run.validation_files()
    held_out = set(read_predictions(file, run.contract.verdicts)["id"])
    frame = read_pairs(pairs_file)
    sources = frame["source"] if "source" in frame.columns else [""] * len(frame)
    inside, outside, folds = set(), set(), set()
    for row_id, source, fold in zip(frame["id"], sources, frame["fold"], strict=True):
        (inside if row_id in held_out else outside).update(source_ids(row_id, source))
        folds |= {fold} if row_id in held_out else set()
    metrics = run.folder / "metrics.json"
    told: Mapping = read_object(metrics) if metrics.is_file() else {}
    fold = told.get("fold", min(folds) if len(folds) == 1 else "all")
    trained_on = bool(told.get("rows_were_trained_on", fold == "all" and run.recipe.pairwise.train))
    return {"fold": fold, "trained_on": trained_on, "ids": by_hash(inside - outside, LISTED_IDS)}


def source_ids(row_id: str, source: str) -> set[str]:
    """Return the ids that a row of pairs.parquet may have had in its source.

    Of an id that was taken already, preprocess makes `source:id` or `source:id:2`.
    """
    if not source or not row_id.startswith(f"{source}:"):
        return {row_id}
    name = row_id.removeprefix(f"{source}:")
    return {name, re.sub(r":\d+$", "", name)}
