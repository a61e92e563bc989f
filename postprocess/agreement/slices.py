"""Parts of the validation rows that are judged on their own: languages, and quarters by length.

A package that is broken for one language of many, or for long rows only, looks well on the average.
"""

import numpy as np
import polars as pl

FEWEST_GROUPS = 20  # below it, an interval says little
OTHER_LANGUAGES = "other languages"
QUARTERS = (
    "the shortest quarter",
    "the second quarter",
    "the third quarter",
    "the longest quarter",
)


def slice_rows(rows: pl.DataFrame, groups_r: np.ndarray) -> dict[str, np.ndarray]:
    """Give the slices of the rows that have groups enough to be judged, as masks of shape (rows,)."""
    slices = slice_by_language(rows, groups_r) | slice_by_length(rows)
    judged_slices = {}
    for name, is_in_slice_r in slices.items():
        if count_groups(is_in_slice_r, groups_r) >= FEWEST_GROUPS:
            judged_slices[name] = is_in_slice_r
    return judged_slices


def slice_by_language(rows: pl.DataFrame, groups_r: np.ndarray) -> dict[str, np.ndarray]:
    """Slice the rows by language, if they have one; those of rare languages are one slice together."""
    if "language" not in rows.columns:
        return {}

    languages_r = rows["language"].fill_null("unknown").to_numpy()
    slices = {}
    is_rare_r = np.full(len(rows), False)
    for language in sorted(set(languages_r)):
        is_language_r = languages_r == language
        if count_groups(is_language_r, groups_r) >= FEWEST_GROUPS:
            slices[f"the language {language}"] = is_language_r
        else:
            is_rare_r |= is_language_r
    return slices | {OTHER_LANGUAGES: is_rare_r}


def slice_by_length(rows: pl.DataFrame) -> dict[str, np.ndarray]:
    """Slice the rows into quarters by the characters of prompt and responses."""
    lengths_r = np.zeros(len(rows))
    for column in ("prompt", "response_a", "response_b"):
        characters = pl.col(column).list.eval(pl.element().str.len_chars()).list.sum()
        lengths_r += rows.select(characters.fill_null(0)).to_series().to_numpy()

    slices = {}
    places_by_length = np.argsort(lengths_r, kind="stable")
    for name, places in zip(QUARTERS, np.array_split(places_by_length, 4), strict=True):
        slices[name] = np.full(len(rows), False)
        slices[name][places] = True
    return slices


def count_groups(is_in_slice_r: np.ndarray, groups_r: np.ndarray) -> int:
    """Count the groups of prompts in a slice."""
    return len(np.unique(groups_r[is_in_slice_r]))
