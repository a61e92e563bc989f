"""The rows that models are compared on, and which of many rows to take: by a hash of their ids, so always the same."""

from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

import polars as pl

from kaggle_kernels.runtime.scoring import ORDERS
from postprocess.run import Run
from preprocess.errors import UserError
from recipes.pairwise.data import read_pairs

ROWS = 500


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
    """id and the probabilities of each order from a run's predictions.parquet."""
    try:
        return pl.read_parquet(file, columns=["id", *(f"p_{verdict}_{order}" for verdict in verdicts for order in ORDERS)])
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UserError(f"{file}: not the predictions of training ({str(error).splitlines()[0]}); train again") from None
