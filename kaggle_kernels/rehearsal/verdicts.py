"""Human verdicts of the test rows, and the kernel's probabilities measured against them.

A rehearsal may use a train file as its test file; its verdicts are taken away from the kernel and
kept here. `rehearse.py` calls `read_verdicts` before the kernel runs and `measure_quality` after.
"""

import math
from pathlib import Path

import polars as pl

from kaggle_kernels.build.spec import COMPETITIONS, Spec
from preprocess.core.errors import UserError
from preprocess.model_input import VERDICTS

# LMSYS's columns: 1 in that of the verdict, 0 in the others.
FLAG_COLUMNS = [f"winner_{verdict}" for verdict in VERDICTS]


def read_verdicts(test_rows: pl.DataFrame, where: str) -> pl.DataFrame | None:
    """Read the verdicts from WSDM's column `winner` or from LMSYS's three columns of 0 and 1.

    Returns:
        `id` as text, `winner` (null: the row has no verdict) and `longer`, the verdict for the
        response with more characters. None where there are no columns of verdicts.

    Raises:
        UserError: One of LMSYS's columns is missing, or a value is no verdict; the message names
            the row.
    """
    if "winner" in test_rows.columns:
        winners = read_winner_column(test_rows, where)
    elif any(name in test_rows.columns for name in FLAG_COLUMNS):
        winners = read_flag_columns(test_rows, where)
    else:
        return None

    # The longer response is a baseline that a model should beat.
    length_a = count_characters(test_rows, "response_a")
    length_b = count_characters(test_rows, "response_b")
    longer = pl.when(length_a >= length_b).then(pl.lit("model_a")).otherwise(pl.lit("model_b"))
    return test_rows.select(
        pl.col("id").cast(pl.String),
        pl.Series("winner", winners, pl.String),
        longer.alias("longer"),
    )


def read_winner_column(test_rows: pl.DataFrame, where: str) -> list[str | None]:
    """Read WSDM's column `winner`; a UserError names the first row with another value."""
    winners = test_rows["winner"].cast(pl.String).to_list()
    for place, winner in enumerate(winners):
        if winner is not None and winner not in VERDICTS:
            row = name_row(test_rows, where, place)
            raise UserError(f"{row}: winner is {winner!r}; expected model_a, model_b or tie")
    return winners


def read_flag_columns(test_rows: pl.DataFrame, where: str) -> list[str | None]:
    """Read LMSYS's three columns; a UserError names an absent one, or the first wrong row."""
    missing = set(FLAG_COLUMNS) - set(test_rows.columns)
    if missing:
        names = ", ".join(sorted(missing))
        raise UserError(f"{where}: no column {names}; give all three, or none")

    # A CSV has the flags as text. What is no number becomes null.
    flag_table = test_rows.select(FLAG_COLUMNS)
    number_table = flag_table.cast(pl.Float64, strict=False)

    winners = []
    rows = zip(flag_table.iter_rows(), number_table.iter_rows(), strict=True)
    for place, (flags, numbers) in enumerate(rows):
        if numbers.count(1) == 1 and numbers.count(0) == 2:
            winners.append(VERDICTS[numbers.index(1)])
        elif flags == (None, None, None):
            winners.append(None)
        else:
            row = name_row(test_rows, where, place)
            raise UserError(
                f"{row}: winner is {flags!r}; expected a 1 for model_a, model_b or tie, "
                "and 0 for the others"
            )
    return winners


def name_row(test_rows: pl.DataFrame, where: str, place: int) -> str:
    """Name a row in a message: its number, counted from 1, and its id."""
    return f"{where}, row {place + 1} (id {test_rows['id'][place]})"


def count_characters(rows: pl.DataFrame, name: str) -> pl.Expr:
    """Return an expression for the length of a column's texts, or of all turns together."""
    if isinstance(rows.schema[name], pl.List):
        length = pl.col(name).list.eval(pl.element().str.len_chars()).list.sum()
    else:
        length = pl.col(name).str.len_chars()
    return length.fill_null(0)


def measure_quality(test_rows: pl.DataFrame, scores_file: Path, spec: Spec) -> dict:
    """Measure the kernel's probabilities over the rows that have a verdict, joined by id.

    Rows whose verdict the spec's competition does not know are left out.

    Returns:
        `judged` (the number of rows), `accuracy`, `log_loss` (in nats), and `longer_accuracy`: the
        accuracy of always preferring the longer response. Empty where no row has a verdict.
    """
    truth = read_verdicts(test_rows, "the test rows")
    if truth is None:
        return {}

    verdicts = COMPETITIONS[spec.competition].verdicts
    joined = pl.read_parquet(scores_file).join(truth, on="id", how="inner")
    judged = joined.filter(pl.col("winner").is_in(verdicts))
    if judged.is_empty():
        return {}

    correct = 0
    correct_by_length = 0
    loss = 0.0
    for row in judged.to_dicts():
        probabilities = {verdict: row[f"p_{verdict}"] for verdict in verdicts}
        prediction = max(probabilities, key=probabilities.get)
        if prediction == row["winner"]:
            correct += 1
        if row["longer"] == row["winner"]:
            correct_by_length += 1
        loss -= math.log(probabilities[row["winner"]])

    return {
        "judged": len(judged),
        "accuracy": correct / len(judged),
        "log_loss": loss / len(judged),
        "longer_accuracy": correct_by_length / len(judged),
    }
