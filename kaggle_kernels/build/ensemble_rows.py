"""The validation rows on which an ensemble is weighed: those that all its runs held out, with each run's probabilities.

`axolotl train` writes a run's rows to outputs/RUN/predictions.parquet. They are joined by id, and refused where the runs were
not trained on the same pairs with the same fold held out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from kaggle_kernels.build.spec import Spec
from postprocess.report.predictions import read_predictions
from preprocess.competitions import COMPETITIONS
from preprocess.core.errors import UserError
from preprocess.core.files import read_object

TRAIN_ALIKE = "train them on the same pairs with the same fold held out"


@dataclass(frozen=True)
class Rows:
    """The rows that all runs held out."""

    probabilities: np.ndarray  # float64 of shape (runs, rows, verdicts), whose verdicts sum to one
    winners: np.ndarray  # int of shape (rows,), the index of the verdict that people gave


def read_rows(spec: Spec) -> Rows:
    """Read the validation rows that all runs of a spec held out, with verdicts of the competition."""
    verdicts = COMPETITIONS[spec.competition].verdicts
    tables = {package.run: read_probabilities(package.run, spec) for package in spec.packages}
    first_run = spec.packages[0].run

    # Join the runs by id: what is left are the rows that all have, a column for each run.
    shared = tables[first_run].select("id", "winner")
    for run, table in tables.items():
        check_shared_rows(tables, first_run, run)
        probabilities = table.select("id", pl.col("probabilities").alias(f"p_{run}"))
        shared = shared.join(probabilities, on="id", how="inner", maintain_order="left")

    judged = shared.filter(pl.col("winner").is_in(verdicts))
    if judged.is_empty():
        raise UserError(
            f"{predictions_path(first_run)}: no row with a verdict of {spec.competition} is among "
            f"those of all runs: {', '.join(tables)}; {TRAIN_ALIKE}"
        )

    # As arrays, in which a verdict is its place among the competition's.
    winners = [verdicts.index(winner) for winner in judged["winner"]]
    probabilities_by_run = [judged[f"p_{run}"].to_list() for run in tables]
    return Rows(np.array(probabilities_by_run, dtype=np.float64), np.array(winners))


def check_shared_rows(tables: Mapping[str, pl.DataFrame], first: str, other: str) -> None:
    """Raise UserError unless two runs have rows in common, with the same folds and verdicts."""
    path = predictions_path(other)
    shared = tables[first].join(
        tables[other], on="id", how="inner", suffix="_other", maintain_order="left"
    )
    if shared.is_empty():
        raise UserError(
            f"{path}: its rows are of {name_folds(tables[other])}, and none of them is among the rows of "
            f"{first}, which are of {name_folds(tables[first])}; {TRAIN_ALIKE}"
        )

    # Runs on other pairs, or with another fold held out, may share ids all the same.
    for column in ("fold", "winner"):
        differs = pl.col(column).ne_missing(pl.col(f"{column}_other"))
        differing_rows = shared.filter(differs)
        if not differing_rows.is_empty():
            row = differing_rows.row(0, named=True)
            value_of_other = row[f"{column}_other"]
            raise UserError(
                f"{path}: row {row['id']}: {column} is {value_of_other}, in {first} {row[column]}; {TRAIN_ALIKE}"
            )


def name_folds(table: pl.DataFrame) -> str:
    """Name the folds of a run's rows, e.g. "fold 0"."""
    folds = table["fold"].unique().sort().to_list()
    return "fold " + ", ".join(str(fold) for fold in folds)


def predictions_path(run: str) -> Path:
    """The file of a run's held-out rows."""
    return Path("outputs") / run / "predictions.parquet"


def read_probabilities(run: str, spec: Spec) -> pl.DataFrame:
    """Read a run's held-out rows, with its probabilities of the competition's verdicts.

    Returns:
        Columns id, fold, winner, and probabilities: a list in the order of the verdicts.

    Raises:
        UserError: where the file is absent or broken, or the run was trained on these rows.
    """
    check_held_out(run)
    rows = read_predictions(predictions_path(run)).rows

    # p_VERDICT is the mean of both orders, p_VERDICT_as_given that of the order in which people saw the row.
    order_suffix = "" if spec.orders == "both" else "_as_given"
    verdicts = COMPETITIONS[spec.competition].verdicts
    columns = [f"p_{verdict}{order_suffix}" for verdict in verdicts]

    # A run may know a verdict, such as a tie, that the competition does not: what is left sums to one again.
    values = rows.select(columns).to_numpy().astype(np.float64)  # (rows, verdicts)
    shares = values / values.sum(axis=1, keepdims=True)
    return rows.select("id", "fold", "winner", pl.Series("probabilities", shares.tolist()))


def check_held_out(run: str) -> None:
    """Raise UserError unless a run was validated, on rows that it was not trained on."""
    path = predictions_path(run)
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; weights are fitted on a run's validation rows: "
            f"axolotl train recipes/{run}.yml"
        )

    metrics_path = path.with_name("metrics.json")
    if read_object(metrics_path).get("rows_were_trained_on"):
        raise UserError(
            f"{metrics_path}: rows_were_trained_on: the run was trained on these rows, so that they say "
            "nothing of its weight; train it with a fold held out (PAIRWISE_FOLD=0), and weigh that"
        )
