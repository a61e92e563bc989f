"""A kernel's results, checked from outside: nothing of the kernel's own checks is relied on.

Every failure is a UserError that names file and id.
"""

import csv
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import polars as pl

from kaggle_kernels.build.spec import Competition
from kaggle_kernels.rehearsal.adversarial_rows import TEXTS
from preprocess.core.errors import UserError
from preprocess.core.files import read_object

TOLERANCE = {
    "float32": 1e-5,
    "other": 1e-3,
}  # of rows of the same texts, which other batches pad to another length
SUM_TOLERANCE = 1e-6


def check_results(
    folder: Path, rows: pl.DataFrame, competition: Competition, tolerance: float
) -> dict:
    """Check submission.csv and scores.parquet in `folder` against the test rows; what was found.

    submission.csv: the competition's columns, every id once in the rows' order, legal winners or probabilities within (0, 1)
    that sum to one. scores.parquet: the same ids, no NaN, the same answers. Rows of the same texts differ in probability by
    `tolerance` at most, whatever their ids.
    """
    ids = rows["id"].cast(pl.String).to_list()
    answers = read_submission(folder / "submission.csv", ids, competition)
    scores = read_scores(folder / "scores.parquet", ids, competition.verdicts)
    check_same_answers(folder, answers, scores, competition)
    alike = largest_difference(rows, scores, competition.verdicts)
    if alike["largest_difference"] > tolerance:
        first, second = alike["rows"]
        raise UserError(
            f"{folder / 'scores.parquet'}: the ids {first} and {second} have the same texts, and {alike['column']} differs by "
            f"{alike['largest_difference']:.1e}, more than {tolerance:g}; one has another row's answer, or its batch changes it"
        )
    by_model: dict[str, int] = {}
    for name in per_model(scores):
        run = name.split("_p_")[0]
        by_model[run] = max(by_model.get(run, 0), scores[name].count())
    return {
        "ids": len(ids),
        "scored": int(scores["scored"].sum()),
        "by_model": by_model,
        "tolerance": tolerance,
        **alike,
    }


def tolerance_for(packages: Iterable[Path], out: Path) -> float:
    """What rows of the same texts may differ by: more where a package is quantised or a GPU computes, in 16 bits."""
    quantised = any(
        "quantization_config" in read_object(package / "config.json") for package in packages
    )
    on_cpu = all(device == "cpu" for device in read_object(out / "kernel.json")["devices"])
    return TOLERANCE["float32" if on_cpu and not quantised else "other"]


def read_submission(path: Path, ids: Sequence[str], competition: Competition) -> list[list[str]]:
    """The answers of submission.csv, in the order of the ids."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            header, *lines = list(csv.reader(file, strict=True)) or [[]]
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}; the kernel's log says why") from None
    expected = ["id", *competition.columns]
    if header != expected:
        raise UserError(
            f"{path}: its columns are {', '.join(header)}; {competition.slug} wants {', '.join(expected)}"
        )
    check_ids(path, [line[0] if line else "" for line in lines], ids)
    for row_id, line in zip(ids, lines, strict=True):
        if len(line) != len(expected):
            raise UserError(f"{path}: id {row_id}: {len(line)} values, expected {len(expected)}")
        if len(competition.columns) == 1 and line[1] not in competition.verdicts:
            raise UserError(
                f"{path}: id {row_id}: winner is {line[1]!r}, expected {' or '.join(competition.verdicts)}"
            )
        if len(competition.columns) > 1:
            check_probabilities(path, row_id, line[1:])
    return [line[1:] for line in lines]


def check_ids(path: Path, found: Sequence[str], expected: Sequence[str]) -> None:
    """Raise UserError unless the ids found are those expected, each once, in their order."""
    twice = [row_id for row_id, times in Counter(found).items() if times > 1]
    lost, foreign = set(expected) - set(found), set(found) - set(expected)
    for told, rows in (
        ("twice or more", twice),
        ("missing", lost),
        ("not in the test file", foreign),
    ):
        if rows:
            raise UserError(
                f"{path}: {len(rows)} ids are {told}, e.g. {min(rows)}; a submission needs every id once"
            )
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        if one != other:
            raise UserError(
                f"{path}, row {number + 1}: the id is {one}, the test file has {other} there; keep its order"
            )


def check_probabilities(path: Path, row_id: str, values: Sequence[str | float | None]) -> None:
    """Raise UserError unless the values are numbers within (0, 1) that sum to one."""
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError):
        numbers = [math.nan]
    if not all(0 < number < 1 for number in numbers) or abs(sum(numbers) - 1) > SUM_TOLERANCE:
        raise UserError(
            f"{path}: id {row_id}: {', '.join(map(str, values))} are no probabilities within 0 and 1 that sum to one"
        )


def read_scores(path: Path, ids: Sequence[str], verdicts: Sequence[str]) -> pl.DataFrame:
    """scores.parquet, its ids as text."""
    try:
        scores = pl.read_parquet(path).with_columns(pl.col("id").cast(pl.String))
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UserError(
            f"{path}: cannot be read: {' '.join(str(error).split())}; the kernel's log says why"
        ) from None
    columns = [f"p_{verdict}" for verdict in verdicts]
    if missing := {"scored", *columns} - set(scores.columns):
        raise UserError(f"{path}: no column {', '.join(sorted(missing))}")
    check_ids(path, scores["id"].to_list(), ids)
    for row_id, *values in scores.select("id", *columns).iter_rows():
        check_probabilities(path, row_id, values)
    for name in per_model(scores):
        if scores[name].is_nan().any():
            raise UserError(
                f"{path}: id {scores['id'][scores[name].is_nan().arg_max()]}: {name} is NaN"
            )
    return scores


def per_model(scores: pl.DataFrame) -> list[str]:
    """The columns of scores.parquet that hold a model's probabilities in one order; null: not scored."""
    return [name for name in scores.columns if "_p_" in name]


def check_same_answers(
    folder: Path, answers: Sequence[Sequence[str]], scores: pl.DataFrame, competition: Competition
) -> None:
    """Raise UserError where submission.csv says another thing than scores.parquet."""
    columns = [f"p_{verdict}" for verdict in competition.verdicts]
    for answer, (row_id, *values) in zip(
        answers, scores.select("id", *columns).iter_rows(), strict=True
    ):
        if len(competition.columns) == 1:
            agrees = values[competition.verdicts.index(answer[0])] == max(values)
        else:
            agrees = all(
                math.isclose(float(a), v, abs_tol=SUM_TOLERANCE)
                for a, v in zip(answer, values, strict=True)
            )
        if not agrees:
            raise UserError(
                f"{folder / 'submission.csv'}: id {row_id}: {', '.join(answer)}, but scores.parquet has "
                f"{', '.join(map(str, values))}"
            )


def largest_difference(rows: pl.DataFrame, scores: pl.DataFrame, verdicts: Sequence[str]) -> dict:
    """How far rows of the same texts are apart in any probability: how many such rows, the largest difference, and where.

    Final probabilities are compared among rows that were scored by the same models in the same orders.
    """
    texts = [
        hashlib.sha256(json.dumps(row).encode()).hexdigest()
        for row in rows.select(TEXTS).iter_rows()
    ]
    models, final = per_model(scores), [f"p_{verdict}" for verdict in verdicts]
    scored = [
        "".join("01"[value is not None] for value in row)
        for _, *row in scores.select("id", *models).iter_rows()
    ]
    table = scores.with_columns(pl.Series("texts", texts), pl.Series("scored_by", scored))
    table = table.filter(pl.col("texts").is_duplicated())
    found = {"alike": len(table), "largest_difference": 0.0, "column": None, "rows": []}
    for columns, key in ((models, ["texts"]), (final, ["texts", "scored_by"])):
        for column in columns:
            spread = (
                table.filter(pl.col(column).is_not_null())
                .group_by(key)
                .agg(
                    difference=pl.col(column).max() - pl.col(column).min(),
                    first=pl.col("id").sort_by(column, "id").first(),
                    last=pl.col("id").sort_by(column, "id").last(),
                )
            )
            spread = (
                spread.filter(pl.col("difference") > found["largest_difference"])
                .sort("difference", "texts")
                .tail(1)
            )
            for row in spread.to_dicts():
                found |= {
                    "largest_difference": row["difference"],
                    "column": column,
                    "rows": [row["first"], row["last"]],
                }
    return found
