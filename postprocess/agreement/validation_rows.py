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

ROWS = 500  # with which a comparison begins
GROWTH = 4  # how many times as many rows are compared where they do not decide
LISTED_IDS = 5000
NUMBER_OF_COPY = re.compile(r":\d+$")


def by_hash(ids: Iterable[str], count: int = ROWS, salt: str = "") -> list[str]:
    """Choose up to `count` ids as if at random, but always the same ones: those with the lowest SHA-256.

    Another salt, which is hashed before each id, chooses other ids. They come in the order of their hashes.
    """

    def hash_id(row_id: str) -> str:
        return sha256((salt + row_id).encode()).hexdigest()

    return sorted(ids, key=hash_id)[:count]


def part_bounds(part: int) -> tuple[int, int]:
    """Give where a part of the validation rows begins and ends, in the order of by_hash.

    The first part has 500 rows. Where they do not decide whether models agree, a second part makes
    them 2,000 in all, a third one 8,000, and so on: (0, 500), (500, 2000), (2000, 8000), …
    """
    rows_with_this_part = ROWS * GROWTH**part
    rows_before = 0 if part == 0 else rows_with_this_part // GROWTH
    return rows_before, rows_with_this_part


def count_validation_rows(run: Run) -> int:
    """Count the rows that models could be compared on."""
    _, predictions_file = run.validation_files()
    return len(read_predictions(predictions_file, run.contract.verdicts))


def validation_rows(run: Run, first: int = 0, end: int = ROWS) -> tuple[pl.DataFrame, list]:
    """Read some of the rows in predictions.parquet: `first` to `end`, as in a slice, in the order of by_hash.

    Returns:
        A table with the columns of the recipe's pairs file and the probabilities of predictions.parquet, and
        the rows as pairs. There may be fewer rows.

    Raises:
        UserError: The pairs file does not hold the rows.
    """
    pairs_file, predictions_file = run.validation_files()
    predictions = read_predictions(predictions_file, run.contract.verdicts)
    ids = by_hash(predictions["id"], end)[first:]

    # Joining both tables to the list of ids brings them into its order. If an id is missing from one of
    # them, or is in it twice, the number of rows changes.
    rows = pl.DataFrame({"id": ids}, schema={"id": pl.String})
    rows = rows.join(predictions, on="id", maintain_order="left")
    rows = rows.join(read_pairs(pairs_file), on="id", maintain_order="left")
    if len(rows) != len(ids) or not ids:
        raise UserError(
            f"{pairs_file}: holds {len(rows)} of the {len(ids)} validation rows in {predictions_file}, so this is "
            "not the file of the training; put that file back, or train again"
        )

    pairs = [run.model_input.pair_from_row(row) for row in rows.iter_rows(named=True)]
    return rows, pairs


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
    """List up to 5,000 ids of validation rows, for the package.

    The kernel scores some of these rows in its visible run. It sees only the competition's file, and finds the
    rows there by the ids that this file has.

    Returns:
        `fold`, a number or "all"; `trained_on`, whether the run was trained on these rows; and `ids`.
    """
    pairs_file, predictions_file = run.validation_files()
    predictions = read_predictions(predictions_file, run.contract.verdicts)
    pairs = read_pairs(pairs_file)
    is_held_out = pairs["id"].is_in(predictions["id"].to_list())
    held_out_rows = pairs.filter(is_held_out)

    # Files of several sources may use the same id for different rows. Where one of these is held out and
    # another was trained on, the kernel could not tell them apart: such an id is left out.
    held_out_ids = list_source_ids(held_out_rows)
    ids_of_others = list_source_ids(pairs.filter(~is_held_out))

    metrics = read_metrics(run)
    return {
        "fold": metrics["fold"],
        "trained_on": metrics["rows_were_trained_on"],
        "ids": by_hash(held_out_ids - ids_of_others, LISTED_IDS),
    }


def list_source_ids(pairs: pl.DataFrame) -> set[str]:
    """List the ids that rows of pairs.parquet may have had in the files that they were read from."""
    if "source" not in pairs.columns:
        return set(pairs["id"])

    ids = set()
    for row_id, source in pairs.select("id", "source").iter_rows():
        ids |= source_ids(row_id, source)
    return ids


def source_ids(row_id: str, source: str) -> set[str]:
    """List the ids that a row of pairs.parquet may have had in its source.

    Of an id that another row had already, preprocessing made `source:id` or `source:id:2`.
    """
    if not source or not row_id.startswith(f"{source}:"):
        return {row_id}

    # The source itself may have ids that end in a number.
    id_in_source = row_id.removeprefix(f"{source}:")
    return {id_in_source, NUMBER_OF_COPY.sub("", id_in_source)}


def read_metrics(run: Run) -> dict:
    """Read what training measured."""
    return read_object(run.folder / "metrics.json")
