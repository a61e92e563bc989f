"""Parts of the validation rows that are judged on their own: languages, and quarters by length.

A package that is broken for one language of many, or for long rows only, looks well on the average. The
report counts characters and groups of prompts by the same functions.
"""

import numpy as np
import polars as pl

from postprocess.agreement.statistics import FEW_GROUPS

TEXTS = ("prompt", "response_a", "response_b")
OTHER_LANGUAGES = "other languages"
QUARTERS = (
    "the shortest quarter",
    "the second quarter",
    "the third quarter",
    "the longest quarter",
)


def slice_rows(rows: pl.DataFrame, groups_r: np.ndarray) -> dict[str, np.ndarray]:
    """Divide the rows by language, and again by length, and keep the slices with groups enough to be judged.

    Each slice, by its name, is a mask of shape (rows,).
    """
    slices = slice_by_language(rows, groups_r) | slice_by_length(rows)
    judged_slices = {}
    for name, is_in_slice_r in slices.items():
        if count_groups(is_in_slice_r, groups_r) >= FEW_GROUPS:
            judged_slices[name] = is_in_slice_r
    return judged_slices


def slice_by_language(rows: pl.DataFrame, groups_r: np.ndarray) -> dict[str, np.ndarray]:
    """Divide the rows by language, if they have one; the rare languages are one slice together.

    Returns:
        For each slice by its name, such as `the language German`, which rows are in it: a mask of shape (rows,).
    """
    if "language" not in rows.columns:
        return {}

    languages_r = rows["language"].fill_null("unknown").to_numpy()
    slices = {}
    is_rare_r = np.full(len(rows), False)
    for language in sorted(set(languages_r)):
        # So few rows cannot be judged alone, but a package may be broken for all rare languages.
        is_language_r = languages_r == language
        if count_groups(is_language_r, groups_r) >= FEW_GROUPS:
            slices[f"the language {language}"] = is_language_r
        else:
            is_rare_r |= is_language_r

    slices[OTHER_LANGUAGES] = is_rare_r
    return slices


def slice_by_length(rows: pl.DataFrame) -> dict[str, np.ndarray]:
    """Divide the rows into quarters by the characters of prompt and responses.

    Returns:
        For each quarter by its name, which rows are in it: a mask of shape (rows,).
    """
    lengths_r = np.zeros(len(rows))
    for column in TEXTS:
        lengths_r += count_characters(rows, column)

    # The numbers of the rows, the shortest row first, cut into four parts. Lengths of 90, 10, 70 and 30
    # give the row numbers 1, 3, 2, 0, of which the first quarter holds row 1.
    rows_by_length = np.argsort(lengths_r, kind="stable")
    quarters = np.array_split(rows_by_length, len(QUARTERS))
    slices = {}
    for name, rows_of_quarter in zip(QUARTERS, quarters, strict=True):
        is_in_quarter_r = np.full(len(rows), False)
        is_in_quarter_r[rows_of_quarter] = True
        slices[name] = is_in_quarter_r
    return slices


def count_characters(rows: pl.DataFrame, column: str) -> np.ndarray:
    """Count the characters of each row's prompt or response, which is a list of turns, (rows,)."""
    # Polars leaves a turn that is null out of the sum; where the whole list is null, so is the sum.
    characters_of_turns = pl.col(column).list.eval(pl.element().str.len_chars())
    characters = characters_of_turns.list.sum().fill_null(0)
    return rows.select(characters).to_series().to_numpy()


def groups_of(rows: pl.DataFrame) -> np.ndarray:
    """Give the number of each row's group of prompts, (rows,); a row without one is a group of its own.

    id    group    name       number
    x     7        group 7    1
    y     null     row y      2
    z     7        group 7    1
    """
    if "group" not in rows.columns:
        return np.arange(len(rows))

    # Each group gets a name first. The names begin differently, so that the id 7 is not taken for group 7.
    group = pl.col("group")
    id_as_group = pl.concat_str(pl.lit("row "), "id")
    number_as_group = pl.concat_str(pl.lit("group "), group.cast(pl.String))
    group_name = pl.when(group.is_null()).then(id_as_group).otherwise(number_as_group)

    # Equal names have the same dense rank, and the ranks have no gaps.
    return rows.select(group_name.rank("dense")).to_series().to_numpy()


def count_groups(is_in_slice_r: np.ndarray, groups_r: np.ndarray) -> int:
    """Count the groups of prompts in a slice."""
    return len(np.unique(groups_r[is_in_slice_r]))
