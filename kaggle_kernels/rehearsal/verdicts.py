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
from preprocess.sources.competition import read_verdict
from recipes.pairwise.tracking.metrics import measure_answers


def choose_layout(test_rows: pl.DataFrame, competition: Competition) -> Competition:
    """Choose whose verdict columns to read: the competition's, or WSDM's, which pairs.parquet has too."""
    has_columns = any(name in test_rows.columns for name in competition.verdict_columns)
    return competition if has_columns else COMPETITIONS["wsdm"]


def find_verdict_columns(test_rows: pl.DataFrame, competition: Competition) -> list[str]:
    """List the columns of a table that hold verdicts; there may be none."""
    layout = choose_layout(test_rows, competition)
    return [name for name in layout.verdict_columns if name in test_rows.columns]


def read_verdicts(
    test_rows: pl.DataFrame, competition: Competition, where: str
) -> pl.DataFrame | None:
    """Read the verdicts of a table in the layout of the competition's train file, or of pairs.

    Returns:
        `id` as text, `winner` (null: the row has no verdict) and `longer`, the verdict for the
        response with more characters. None where there are no columns of verdicts.

    Raises:
        UserError: One of several columns is missing, or a value is no verdict; the message names
            the row.
    """
    layout = choose_layout(test_rows, competition)
    columns = find_verdict_columns(test_rows, competition)
    if not columns:
        return None
    missing = set(layout.verdict_columns) - set(columns)
    if missing:
        names = ", ".join(sorted(missing))
        raise UserError(
            f"{where}: no column {names}, but there is {columns[0]}; give all columns of verdicts, or none"
        )

    winners = []
    verdict_rows = test_rows.select(columns).iter_rows(named=True)
    for place, values in enumerate(verdict_rows):
        winner, _ = read_verdict(layout, values)
        has_verdict = any(value is not None for value in values.values())
        if has_verdict and winner not in VERDICTS:
            cells = ", ".join(f"{column} is {value!r}" for column, value in values.items())
            expected = "a 1 for the winner, and 0 for the others"
            if layout.verdict_form == "name":
                expected = "model_a, model_b or tie"
            raise UserError(
                f"{where}, row {place + 1} (id {test_rows['id'][place]}): {cells}; "
                f"expected {expected}"
            )
        winners.append(winner if has_verdict else None)

    # The longer response is a baseline that a model should beat.
    length_a = count_characters(test_rows, "response_a")
    length_b = count_characters(test_rows, "response_b")
    longer = pl.when(length_a >= length_b).then(pl.lit("model_a")).otherwise(pl.lit("model_b"))
    return test_rows.select(
        pl.col("id").cast(pl.String),
        pl.Series("winner", winners, pl.String),
        longer.alias("longer"),
    )


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
