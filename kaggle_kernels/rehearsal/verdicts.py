"""Human verdicts of the test rows, and the kernel's probabilities measured against them.

A rehearsal may use a train file as its test file; its verdicts are taken away from the kernel and
kept here. `rehearse.py` calls `read_verdicts` before the kernel runs and `measure_quality` after.
"""

from pathlib import Path

import numpy as np
import polars as pl

from kaggle_kernels.build.spec import Spec
from preprocess.competitions import COMPETITIONS, Competition
from preprocess.core.errors import UserError
from preprocess.model_input import VERDICTS
from recipes.pairwise.tracking.metrics import measure_answers

# Where a table of pairs, made by preprocess, has the verdict.
PAIRS_COLUMN = "winner"


def find_verdict_columns(test_rows: pl.DataFrame, competition: Competition) -> list[str]:
    """List the columns with verdicts: those of the competition's train file, or else of a table of pairs."""
    present = [name for name in competition.verdict_columns if name in test_rows.columns]
    if not present and PAIRS_COLUMN in test_rows.columns:
        return [PAIRS_COLUMN]
    return present


def read_verdicts(
    test_rows: pl.DataFrame, competition: Competition, where: str
) -> pl.DataFrame | None:
    """Read the verdicts of a table in the layout of the competition's train file, or of pairs.

    Args:
        test_rows: The table, whose verdict columns may be absent.
        competition: Says which columns they are.
        where: The file, for error messages.

    Returns:
        `id` as text, `winner` (null: the row has no verdict) and `longer`, the verdict for the
        response with more characters. None where there are no columns of verdicts.

    Raises:
        UserError: One of several columns is missing, or a value is no verdict; the message names
            the row.
    """
    columns = find_verdict_columns(test_rows, competition)
    if not columns:
        return None
    if competition.verdict_form == "flags" and columns != [PAIRS_COLUMN]:
        winners = read_flag_columns(test_rows, competition, where)
    else:
        winners = read_winner_column(test_rows, columns[0], where)

    # The longer response is a baseline that a model should beat.
    length_a = count_characters(test_rows, "response_a")
    length_b = count_characters(test_rows, "response_b")
    longer = pl.when(length_a >= length_b).then(pl.lit("model_a")).otherwise(pl.lit("model_b"))
    return test_rows.select(
        pl.col("id").cast(pl.String),
        pl.Series("winner", winners, pl.String),
        longer.alias("longer"),
    )


def read_winner_column(test_rows: pl.DataFrame, column: str, where: str) -> list[str | None]:
    """Read a column of verdicts; a UserError names the first row with another value."""
    winners = test_rows[column].cast(pl.String).to_list()
    for place, winner in enumerate(winners):
        if winner is not None and winner not in VERDICTS:
            row = name_row(test_rows, where, place)
            raise UserError(f"{row}: {column} is {winner!r}; expected model_a, model_b or tie")
    return winners


def read_flag_columns(
    test_rows: pl.DataFrame, competition: Competition, where: str
) -> list[str | None]:
    """Read a column of 0 and 1 for each verdict; a UserError names an absent one, or a wrong row."""
    columns = list(competition.verdict_columns)
    missing = set(columns) - set(test_rows.columns)
    if missing:
        names = ", ".join(sorted(missing))
        raise UserError(f"{where}: no column {names}; give {', '.join(columns)}, or none of them")

    # Flags are numbers, or text in a CSV. What is no number becomes null.
    flag_table = test_rows.select(columns)
    number_table = flag_table.cast(pl.Float64, strict=False)

    winners = []
    rows = zip(flag_table.iter_rows(), number_table.iter_rows(), strict=True)
    for place, (flags, numbers) in enumerate(rows):
        if numbers.count(1) == 1 and numbers.count(0) == len(columns) - 1:
            winners.append(competition.verdicts[numbers.index(1)])
        elif flags.count(None) == len(columns):
            winners.append(None)
        else:
            row = name_row(test_rows, where, place)
            raise UserError(
                f"{row}: {', '.join(columns)}: found {flags!r}; expected a 1 for the winner, "
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
        `judged` (the number of rows), `accuracy`, `log_loss` (in nats), `brier_score`, and
        `longer_accuracy`: the accuracy of always preferring the longer response. Empty where no row
        has a verdict.
    """
    competition = COMPETITIONS[spec.competition]
    truth = read_verdicts(test_rows, competition, "the test rows")
    if truth is None:
        return {}

    verdicts = competition.verdicts
    joined = pl.read_parquet(scores_file).join(truth, on="id", how="inner")
    judged = joined.filter(pl.col("winner").is_in(verdicts))
    if judged.is_empty():
        return {}

    probabilities_rv = judged.select(f"p_{verdict}" for verdict in verdicts).to_numpy()
    winners_r = np.array([verdicts.index(winner) for winner in judged["winner"]])
    return {
        "judged": len(judged),
        **measure_answers(probabilities_rv, winners_r),
        "longer_accuracy": judged.select((pl.col("longer") == pl.col("winner")).mean()).item(),
    }
