"""Rows of all sources become pairs: judgements of one pair united, ids unique, prompts grouped, groups spread over folds.

A pair is one prompt with two responses, in whichever order they were shown. Judged several times it is one row, that of its
first judgement: the weight is the number of judgements, p_* are the shares of votes, the winner is the verdict with most of
them (tie where two have as many). An id that an earlier row has taken becomes `source:id`, then `source:id:2` and so on.

A group's number is a hash of its earliest prompt, its fold the remainder of that number. So rows added after the others
(further files, or at a file's end) move no pair, unless they join two groups: then the younger one moves, and is reported.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import polars as pl

from preprocess.dedup.grouping import group_prompts
from preprocess.dedup.ngrams import normalise
from preprocess.model_input import VERDICTS
from preprocess.sources.rows import SHARES, TEXTS, TURNS

PAIRS = pl.Schema(
    {
        "id": pl.String,
        "prompt": TURNS,
        "response_a": TURNS,
        "response_b": TURNS,
        "winner": pl.String,
        "language": pl.String,
        "source": pl.String,
        "group": pl.Int64,
        "fold": pl.Int8,
        "weight": pl.Float32,
        "p_model_a": pl.Float32,
        "p_model_b": pl.Float32,
        "p_tie": pl.Float32,
    }
)
REJECTED = ("file", "row", "id", "reason", *TEXTS, "winner", "language", "source")
ROWS_AT_ONCE = 2048


@dataclass(frozen=True)
class Joined:
    """Two groups of earlier files that a later file joined: the younger one's earliest pair, and its fold before and now."""

    id: str
    fold_before: int
    fold_now: int


@dataclass(frozen=True)
class Pairs:
    """`table` has the schema PAIRS; `prompts` are its prompts normalised; `united` counts, by source, the judgements that
    became part of an earlier row."""

    table: pl.DataFrame
    prompts: list[str]
    joined: tuple[Joined, ...]
    united: dict[str, int]


def make_pairs(rows: pl.DataFrame, folds: int, threshold: float, track: Callable = lambda steps, _: steps) -> Pairs:
    """Pairs of usable rows (schema sources.ROWS, files in the order in which they were added)."""
    united, counts = unite_judgements(rows)
    united = united.with_columns(id=pl.Series(_unique_ids(united["id"].to_list(), united["source"].to_list()), dtype=pl.String))
    prompts = [normalise(turns) for part in united.iter_slices(ROWS_AT_ONCE) for turns in part["prompt"].to_list()]
    ages = united["file"].rle_id().to_numpy()
    groups = group_prompts(prompts, threshold, ages, track)
    numbers = {root: group_number(prompts[root]) for root in np.unique(groups.root).tolist()}
    group = np.array([numbers[root] for root in groups.root.tolist()], dtype=np.int64)
    joined = tuple(
        Joined(united["id"][given_up], group_number(prompts[given_up]) % folds, int(group[given_up]) % folds)
        for _, given_up in groups.joined
    )
    table = united.with_columns(group=pl.Series(group), fold=pl.Series((group % folds).astype(np.int8)))
    return Pairs(table.select(pl.col(name).cast(dtype) for name, dtype in PAIRS.items()), prompts, joined, counts)


def group_number(prompt: str) -> int:
    """A group's number, from its earliest prompt (normalised): 0 to 2**63 - 1."""
    return int.from_bytes(hashlib.sha256(prompt.encode("utf-8")).digest()[:8], "big") >> 1


def unite_judgements(rows: pl.DataFrame) -> tuple[pl.DataFrame, dict[str, int]]:
    """One row for each unordered pair, with weight and shares; and how many rows of each source went into an earlier one."""
    votes: dict[bytes, np.ndarray] = {}
    first, owners, united = [], [], {}
    shares = rows.select(*SHARES, "weight").to_numpy()
    sources = rows["source"].to_list()
    for at, (key, swapped) in enumerate(_keys(rows)):
        weight = shares[at, 3]
        vote = shares[at, [1, 0, 2] if swapped else [0, 1, 2]] * weight
        if key in votes:
            united[sources[at]] = united.get(sources[at], 0) + 1
            votes[key] += [*vote, weight, 1, 0]
        else:
            votes[key] = np.array([*vote, weight, 1, swapped], dtype=np.float64)
            first.append(at)
            owners.append(key)
    totals = np.array([votes[key] for key in owners]).reshape(-1, 6)
    flip = totals[:, 5].astype(bool)
    totals[flip, :2] = totals[flip, 1::-1]
    p = totals[:, :3] / totals[:, 3:4]
    kept = rows[first]
    return kept.with_columns(
        winner=pl.Series(_winners(kept["winner"].to_list(), p, totals[:, 4]), dtype=pl.String),
        weight=pl.Series(totals[:, 3]),
        **{name: pl.Series(p[:, at]) for at, name in enumerate(SHARES)},
    ), united


def _winners(given: list[str], p: np.ndarray, judgements: np.ndarray) -> list[str]:
    """The verdict with the most votes; a single judgement keeps its own, for its shares may be a teacher's."""
    top = p.max(axis=1, keepdims=True, initial=0)
    leading = np.isclose(p, top, rtol=0, atol=1e-9)
    voted = np.where(leading.sum(axis=1) == 1, leading.argmax(axis=1), VERDICTS.index("tie"))
    return [one if count == 1 else VERDICTS[most] for one, count, most in zip(given, judgements, voted, strict=True)]


def _keys(rows: pl.DataFrame) -> Iterator[tuple[bytes, bool]]:
    """Of each row: a digest of its unordered pair, and whether its responses stand in the other order than in the digest."""
    for part in rows.select(TEXTS).iter_slices(ROWS_AT_ONCE):
        for prompt, a, b in part.iter_rows():
            digests = [hashlib.sha256("\x00".join(turns).encode("utf-8")).digest() for turns in (prompt, a, b)]
            yield digests[0] + min(digests[1:]) + max(digests[1:]), digests[1] > digests[2]


def _unique_ids(ids: list[str], sources: list[str]) -> list[str]:
    taken: set[str] = set()
    unique = []
    for row_id, source in zip(ids, sources, strict=True):
        name, number = row_id, 1
        while name in taken:
            name = f"{source}:{row_id}" if number == 1 else f"{source}:{row_id}:{number}"
            number += 1
        taken.add(name)
        unique.append(name)
    return unique
