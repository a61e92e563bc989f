"""Read predictions.parquet or oof.parquet, and add the texts, labels and groups of the pairs file.

`run_data.read_run` calls this module. The report measures the rows that it returns.
"""

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import polars as pl

from preprocess.core.errors import UserError
from preprocess.core.files import sha256
from preprocess.model_input import VERDICTS
from recipes.pairwise.data.datasets import read_pairs

PREDICTIONS = "predictions.parquet"
OUT_OF_FOLD = "oof.parquet"
PAIR_COLUMNS = ("prompt", "response_a", "response_b", "language", "source", "group")
# Of the mean of both orders, then of each order.
PROBABILITIES = [
    f"p_{verdict}{order}" for order, verdict in product(("", "_as_given", "_swapped"), VERDICTS)
]
SAME_PROBABILITY = 1e-6  # probabilities of float32 that differ by less are equal but for rounding


@dataclass(frozen=True)
class Predictions:
    """The rows that the report measures, sorted by id.

    They have id, fold, winner, and the columns of PROBABILITIES. With the pairs file they also have
    those of PAIR_COLUMNS that it has, and its labels: label_model_a, label_model_b, label_tie.
    """

    file: Path
    rows: pl.DataFrame

    @property
    def is_out_of_fold(self) -> bool:
        """Whether these are the rows of all folds, predicted by models that did not see them."""
        return self.file.name == OUT_OF_FOLD

    @property
    def has_pairs(self) -> bool:
        """Whether the rows have the columns of the pairs file."""
        return "prompt" in self.rows.columns

    @property
    def has_groups(self) -> bool:
        """Whether it is known which rows have nearly the same prompt."""
        return "group" in self.rows.columns


def read_table(file: Path) -> pl.DataFrame:
    """Read a Parquet file of a run; a file that is no Parquet file raises a UserError."""
    try:
        return pl.read_parquet(file)
    except (pl.exceptions.PolarsError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{file}: not a Parquet file ({reason}); remove it, or make it again"
        ) from None


def read_predictions(file: Path) -> Predictions:
    """Read a file of predictions and check its columns, ids and probabilities.

    Raises:
        UserError: The file is absent or damaged, or was not written by the training.
    """
    # Another program, or an earlier version of this project, may have written other columns.
    rows = read_table(file)
    required = ["id", "fold", "winner", *PROBABILITIES]
    missing = [column for column in required if column not in rows.columns]
    if missing:
        raise UserError(
            f"{file}: there is no column {', '.join(missing)}, so axolotl train of this version did not write "
            "the file; train again"
        )

    # Each id must be there once: rows are joined with their pairs by it.
    if rows.is_empty():
        raise UserError(f"{file}: holds no rows; train again")
    if rows["id"].is_duplicated().any():
        raise UserError(f"{file}: an id occurs twice; train again")

    # A null becomes a NaN, and a NaN is not between 0 and 1.
    values = rows.select(pl.col(PROBABILITIES).cast(pl.Float64)).fill_null(float("nan"))
    is_valid = values.select(pl.all_horizontal(pl.all().is_between(0, 1))).to_series()
    if not is_valid.all():
        first_invalid = rows["id"][is_valid.arg_min()]
        raise UserError(
            f"{file}: row {first_invalid} has probabilities that are not between 0 and 1; "
            "train again"
        )
    return Predictions(file, rows.sort("id"))


def add_pairs(
    predictions: Predictions, file: Path, expected_sha256: str | None
) -> tuple[Predictions, str | None]:
    """Add texts, groups and labels of the pairs file to the predictions that the report measures.

    Args:
        predictions: The run's predictions.
        file: The pairs file.
        expected_sha256: The hash of the file that the model was trained on. Where metrics.json has none,
            only the ids can show whether this is another file.

    Returns:
        The predictions with the columns of the pairs file, and None. Where the file cannot be used, the
        predictions as they were, and a sentence that says why.
    """
    if not file.is_file():
        return predictions, explain_missing_columns(file, "does not exist")

    # The labels of a pairs file that was made again may differ from those of the training.
    if expected_sha256 and sha256(file) != expected_sha256:
        return predictions, explain_missing_columns(file, "has changed since training")

    rows = join_pairs(predictions.rows, read_pairs(file))
    if rows is None:
        problem = "does not hold every row of the predictions"
        return predictions, explain_missing_columns(file, problem)
    return Predictions(predictions.file, rows), None


def explain_missing_columns(file: Path, problem: str) -> str:
    """Say what a report lacks without the pairs file, and what to do."""
    return (
        f"{file} {problem}, so that texts, languages, sources, lengths and groups of prompts are "
        "missing here: name the file of the training with `--pairs FILE`, or train again."
    )


def join_pairs(rows: pl.DataFrame, pairs: pl.DataFrame) -> pl.DataFrame | None:
    """Add the columns of the pairs to the predictions by id; None if a row has no pair."""
    # The pairs' own p_VERDICT are labels: they get other names than the predictions.
    labels = [
        pl.col(f"p_{verdict}").cast(pl.Float64).alias(f"label_{verdict}") for verdict in VERDICTS
    ]
    columns = [column for column in PAIR_COLUMNS if column in pairs.columns]
    pairs = pairs.select("id", *columns, *labels)

    # A left join keeps the order of the rows, and leaves null what has no pair.
    joined = rows.join(pairs, on="id", how="left", maintain_order="left")
    rows_without_pair = joined["label_model_a"].null_count()
    if rows_without_pair or len(joined) != len(rows):
        return None
    return joined


def is_comparison_of(agreement_rows: pl.DataFrame, predictions: pl.DataFrame) -> bool:
    """Find out whether packaged and trained model were compared on these predictions, and not on earlier ones.

    Args:
        agreement_rows: agreement.parquet: two rows a pair, one for each order, with the
            predictions of that time as recorded_p_VERDICT.
        predictions: The rows of predictions.parquet, which a later training may have replaced.
    """
    # For a mean of runs, agreement.parquet has no recorded predictions. Those of the model as trained are the
    # same numbers.
    prefix = "recorded_" if "recorded_p_model_a" in agreement_rows.columns else "trained_"
    required_columns = {"id", "order", f"{prefix}p_model_a"}
    if not required_columns <= set(agreement_rows.columns):
        return False

    compared_columns = [name for name in agreement_rows.columns if name.startswith(f"{prefix}p_")]
    for (order,), order_rows in agreement_rows.group_by("order"):
        joined = order_rows.join(predictions, on="id", how="left")
        for column in compared_columns:
            # For the swapped order, recorded_p_tie corresponds to p_tie_swapped of the predictions.
            predicted = joined[f"{column.removeprefix(prefix)}_{order}"]

            # A row that has no prediction any more counts as different.
            differences = (joined[column] - predicted).abs().fill_null(1.0)
            if differences.max() > SAME_PROBABILITY:
                return False
    return True
