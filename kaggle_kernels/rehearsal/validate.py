"""Validation of a kernel's results from outside, relying on none of the kernel's own checks.

`rehearse.py` calls `check_results` on submission.csv and scores.parquet after the run. Every
failure is a UserError that names the file and the id.
"""

import csv
import hashlib
import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from preprocess.competitions import Competition
from preprocess.core.errors import UserError
from preprocess.core.files import read_object
from preprocess.sources.rows import TEXTS

# Rows with the same texts get slightly different probabilities, since their batches are padded to
# different lengths. Largest allowed difference:
FLOAT32_TOLERANCE = 1e-5

# On a GPU, or with quantised weights.
SIXTEEN_BIT_TOLERANCE = 1e-3

# How far probabilities may be from a sum of one, and those in submission.csv from the computed.
SUM_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Difference:
    """How far rows with the same texts are apart: the largest difference in any column."""

    largest: float = 0.0
    column: str | None = None  # None where all rows are equal
    ids: tuple[str, ...] = ()  # the two rows that it was found in


def check_results(
    folder: Path, rows: pl.DataFrame, competition: Competition, tolerance: float
) -> dict:
    """Check submission.csv and scores.parquet against the test rows.

    submission.csv must have the competition's columns, every id once in the order of the rows, and
    winners of the competition or probabilities within (0, 1) that sum to one. scores.parquet must
    have the same ids and answers, and no NaN.

    Args:
        folder: The folder with the two files.
        rows: The test rows that the kernel got.
        competition: What answers have to look like.
        tolerance: How far probabilities of rows with the same texts may differ.

    Returns:
        What rehearsal.json holds under `checks`. Numbers of rows: `ids`, `scored`, `alike` (rows whose texts
        another row has too) and `by_model` (scored by each run). Of the rows that are alike, how far
        probabilities differ at most: `largest_difference`, in which `column`, between which two `rows`.
    """
    # Each file by itself, then both together.
    ids = rows["id"].cast(pl.String).to_list()
    answers = read_submission(folder / "submission.csv", ids, competition)
    scores = read_scores(folder / "scores.parquet", ids, competition.verdicts)
    check_same_answers(folder / "submission.csv", answers, scores, competition)

    # An answer that stands in another row's place shows between rows with the same texts.
    twins = select_twins(rows, scores)
    difference = find_largest_difference(twins, competition.verdicts)
    if difference.largest > tolerance:
        first, second = difference.ids
        raise UserError(
            f"{folder / 'scores.parquet'}: the ids {first} and {second} have the same texts, and "
            f"{difference.column} differs by {difference.largest:.1e}, more than {tolerance:g}; "
            "one of them has another row's answer, or its answer depends on the rest of its batch"
        )

    return {
        "ids": len(ids),
        "scored": int(scores["scored"].sum()),
        "by_model": count_scored_rows(scores),
        "tolerance": tolerance,
        "alike": len(twins),
        "largest_difference": difference.largest,
        "column": difference.column,
        "rows": list(difference.ids),
    }


def choose_tolerance(packages: Iterable[Path], out: Path) -> float:
    """Choose how far probabilities of rows with the same texts may differ.

    In float32 they differ by rounding alone; a GPU's 16 bits and quantised weights round more coarsely.
    `packages` are folders with a config.json, `out` has the kernel.json that lists the devices.
    """
    devices = read_object(out / "kernel.json")["devices"]
    is_on_cpu = all(device == "cpu" for device in devices)
    is_quantised = any(
        "quantization_config" in read_object(package / "config.json") for package in packages
    )
    if is_on_cpu and not is_quantised:
        return FLOAT32_TOLERANCE
    return SIXTEEN_BIT_TOLERANCE


def read_submission(path: Path, ids: Sequence[str], competition: Competition) -> list[list[str]]:
    """Read and check submission.csv, whose ids must be `ids` in their order.

    Returns:
        Each row's values without its id, as the file has them.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            lines = list(csv.reader(file, strict=True))
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}; the kernel's log says why") from None

    header = lines.pop(0) if lines else []
    expected_header = ["id", *competition.columns]
    if header != expected_header:
        raise UserError(
            f"{path}: its columns are {', '.join(header)}; "
            f"{competition.slug} wants {', '.join(expected_header)}"
        )

    # Ids come first, so that later messages can name rows by them.
    written_ids = []
    for line in lines:
        written_ids.append(line[0] if line else "")  # a blank line has no values
    check_ids(path, written_ids, ids)

    for line in lines:
        if len(line) != len(expected_header):
            expected = len(expected_header)
            raise UserError(f"{path}: id {line[0]}: {len(line)} values, expected {expected}")
        check_answer(path, line[0], line[1:], competition)
    return [line[1:] for line in lines]


def check_ids(path: Path, written_ids: Sequence[str], expected_ids: Sequence[str]) -> None:
    """Raise UserError unless the ids written to `path` are the expected ones, once, in order."""
    repeated = [row_id for row_id, times in Counter(written_ids).items() if times > 1]
    refuse_ids(path, repeated, "occur twice or more")
    refuse_ids(path, set(expected_ids) - set(written_ids), "are missing")
    refuse_ids(path, set(written_ids) - set(expected_ids), "are not in the test file")

    # They are the same ids now: only their order may differ.
    pairs = zip(written_ids, expected_ids, strict=True)
    for row, (written_id, expected_id) in enumerate(pairs, start=1):
        if written_id != expected_id:
            raise UserError(
                f"{path}, row {row}: the id is {written_id}, but the test file has {expected_id} there; "
                "write the rows in its order"
            )


def refuse_ids(path: Path, wrong_ids: Collection[str], problem: str) -> None:
    """Raise UserError if there are any wrong ids; `problem` says in the message what they do, e.g. "are missing"."""
    if wrong_ids:
        raise UserError(
            f"{path}: {len(wrong_ids)} ids {problem}, e.g. {min(wrong_ids)}; "
            "a submission needs every id once"
        )


def check_answer(path: Path, row_id: str, answer: Sequence[str], competition: Competition) -> None:
    """Check a row's winner, or its probabilities, whichever the competition wants."""
    if competition.answer == "probabilities":
        check_probabilities(path, row_id, answer)
        return

    [winner] = answer
    if winner not in competition.verdicts:
        verdicts = " or ".join(competition.verdicts)
        raise UserError(f"{path}: id {row_id}: winner is {winner!r}, expected {verdicts}")


def check_probabilities(path: Path, row_id: str, values: Sequence[str | float | None]) -> None:
    """Raise UserError unless a row's values are numbers within (0, 1) that sum to one."""
    # What is no number, such as an empty cell, becomes NaN, which is within no bounds.
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError):
        numbers = [math.nan]

    are_within_bounds = all(0 < number < 1 for number in numbers)
    if not are_within_bounds or abs(sum(numbers) - 1) > SUM_TOLERANCE:
        raise UserError(
            f"{path}: id {row_id}: found {', '.join(map(str, values))}, expected probabilities between "
            "0 and 1 that sum to one"
        )


def read_scores(path: Path, ids: Sequence[str], verdicts: Sequence[str]) -> pl.DataFrame:
    """Read and check scores.parquet, whose ids must be `ids` in their order.

    Returns:
        The table with its ids as text. Each verdict has a column p_VERDICT of final probabilities.
    """
    try:
        scores = pl.read_parquet(path)
    except (pl.exceptions.PolarsError, OSError) as error:
        message = " ".join(str(error).split())
        raise UserError(f"{path}: cannot be read: {message}; the kernel's log says why") from None

    final_columns = [f"p_{verdict}" for verdict in verdicts]
    missing = {"id", "scored", *final_columns} - set(scores.columns)
    if missing:
        raise UserError(f"{path}: no column {', '.join(sorted(missing))}")
    scores = scores.with_columns(pl.col("id").cast(pl.String))
    check_ids(path, scores["id"].to_list(), ids)

    # A row that no model scored has the prior, so that no value may be absent.
    for row_id, *probabilities in scores.select("id", *final_columns).iter_rows():
        check_probabilities(path, row_id, probabilities)

    # A model's own probabilities may be null where it did not score the row, but never NaN.
    for name in list_model_columns(scores):
        ids_with_nan = scores.filter(pl.col(name).is_nan())["id"]
        if not ids_with_nan.is_empty():
            raise UserError(f"{path}: id {ids_with_nan[0]}: {name} is NaN")
    return scores


def list_model_columns(scores: pl.DataFrame) -> list[str]:
    """List the columns RUN_p_VERDICT_ORDER: a model's probabilities in one order, null if none."""
    return [name for name in scores.columns if "_p_" in name]


def count_scored_rows(scores: pl.DataFrame) -> dict[str, int]:
    """Count the rows that each run's model has scored, in the order in which it scored most."""
    rows_by_run: dict[str, int] = {}
    for name in list_model_columns(scores):
        run = name.split("_p_")[0]
        scored_rows = scores[name].count()  # without nulls
        rows_by_run[run] = max(rows_by_run.get(run, 0), scored_rows)
    return rows_by_run


def check_same_answers(
    submission: Path,
    answers: Sequence[Sequence[str]],
    scores: pl.DataFrame,
    competition: Competition,
) -> None:
    """Check that the answers of submission.csv agree with the probabilities of scores.parquet."""
    final_columns = [f"p_{verdict}" for verdict in competition.verdicts]
    final_rows = scores.select("id", *final_columns).iter_rows()

    for answer, (row_id, *probabilities) in zip(answers, final_rows, strict=True):
        if competition.answer == "winner":
            winner = competition.verdicts.index(answer[0])
            is_same = probabilities[winner] == max(probabilities)
        else:
            # A file of text may have rounded them.
            printed = [float(text) for text in answer]
            is_same = np.allclose(printed, probabilities, rtol=0, atol=SUM_TOLERANCE)

        if not is_same:
            raise UserError(
                f"{submission}: id {row_id}: {', '.join(answer)}, but scores.parquet has "
                f"{', '.join(map(str, probabilities))}"
            )


def select_twins(rows: pl.DataFrame, scores: pl.DataFrame) -> pl.DataFrame:
    """Select the twins: rows whose prompt and responses another row has too.

    `rows` are the test rows, `scores` their scores in the same order.

    Returns:
        The scores of the twins, with a column `texts` that is equal for rows of the same texts.
    """
    # Texts may be very long: a hash stands for them.
    hashes = []
    for texts in rows.select(TEXTS).iter_rows():
        serialised = json.dumps(texts).encode()
        hashes.append(hashlib.sha256(serialised).hexdigest())
    return scores.with_columns(texts=pl.Series(hashes)).filter(pl.col("texts").is_duplicated())


def find_largest_difference(twins: pl.DataFrame, verdicts: Sequence[str]) -> Difference:
    """Find the largest difference in any column of probabilities between rows of the same texts."""
    same_texts = [pl.col("texts")]
    differences = [Difference()]
    model_columns = list_model_columns(twins)
    for name in model_columns:
        differences.append(compare_rows(twins, name, same_texts))

    # The final probabilities are comparable only where the same models scored both rows, in the
    # same orders.
    same_models = [pl.col(name).is_not_null() for name in model_columns]
    for verdict in verdicts:
        differences.append(compare_rows(twins, f"p_{verdict}", [*same_texts, *same_models]))
    return max(differences, key=lambda difference: difference.largest)


def compare_rows(twins: pl.DataFrame, column: str, keys: Sequence[pl.Expr]) -> Difference:
    """Find the largest difference of a column's values between rows that are equal in all `keys`.

    Rows without a value are left out.
    """
    groups = twins.filter(pl.col(column).is_not_null()).group_by(keys)

    # In each group of equal rows, how far its values reach, and the two rows at the ends.
    ids_by_value = pl.col("id").sort_by(column, "id")
    ranges = groups.agg(
        difference=pl.col(column).max() - pl.col(column).min(),
        lowest_id=ids_by_value.first(),
        highest_id=ids_by_value.last(),
    )
    if ranges.is_empty():
        return Difference()

    # The hash decides between equal differences, so that the choice is always the same.
    largest = ranges.sort("difference", "texts").row(-1, named=True)
    ids = (largest["lowest_id"], largest["highest_id"])
    return Difference(largest["difference"], column, ids)
