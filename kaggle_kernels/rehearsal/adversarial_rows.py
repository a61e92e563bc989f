"""Adversarial rows: some rows of a table replaced by texts that break kernels.

`rows.py` calls `add_adversarial_rows` for a rehearsal with `--hostile`. Users know these rows by
that word: it also names their column in rows.parquet and their keys in rehearsal.json.
"""

import json
import math
import random

import polars as pl

from kaggle_kernels.rehearsal.adversarial_texts import DUPLICATE, KINDS, LONG, Field, draw_texts
from kaggle_kernels.rehearsal.verdicts import find_verdict_columns
from kaggle_kernels.runtime.inputs import SCORED
from preprocess.competitions import Competition
from preprocess.sources.rows import TEXTS

# Share of the rows that is replaced.
SHARE = 0.05

# One row of each long kind in so many rows: it takes as long to tokenise as fifty others.
ROWS_PER_LONG_ROW = 2500

# One in so many seeds leaves out the column that says which rows count.
SEEDS_WITHOUT_SCORED = 4

# Holds an adversarial row's kind, and null for a row that stayed.
KIND_COLUMN = "hostile"


def add_adversarial_rows(rows: pl.DataFrame, seed: int, competition: Competition) -> pl.DataFrame:
    """Replace SHARE of the rows by adversarial ones, and at least one of each kind.

    Half of the rows stay in any case, so that a small table may lack some kinds.

    Args:
        rows: A table with `id` and TEXTS; verdict columns may be absent.
        seed: Decides which rows are replaced, and by what.
        competition: Says how texts and verdicts are stored, and whether rows are marked as scored.

    Returns:
        The table with the same ids and columns, and KIND_COLUMN. An adversarial row has no verdict,
        except a duplicate, which has the texts and the verdict of a row that stayed.
    """
    rng = random.Random(seed)
    kinds = choose_kinds(len(rows), rng)
    places = rng.sample(range(len(rows)), len(kinds))
    kept_places = sorted(set(range(len(rows))) - set(places))

    # Cells are replaced one by one, which is simplest in lists.
    columns = {name: rows[name].to_list() for name in rows.columns}
    columns[KIND_COLUMN] = [None] * len(rows)
    verdict_columns = find_verdict_columns(rows, competition)

    for place, kind in zip(places, kinds, strict=True):
        columns[KIND_COLUMN][place] = kind

        if kind == DUPLICATE:
            original = rng.choice(kept_places)
            for name in (*TEXTS, *verdict_columns):
                columns[name][place] = columns[name][original]
            continue

        texts = draw_texts(kind, rng)
        for name, text in zip(TEXTS, texts, strict=True):
            columns[name][place] = convert_text(
                text, rows.schema[name], competition.texts_are_turns, rng
            )

        # Nobody has judged these texts.
        for name in verdict_columns:
            columns[name][place] = None

    # A column without any text has the type Null, which could not hold the new texts.
    schema = pl.Schema(rows.schema)
    for name in TEXTS:
        if schema[name] == pl.Null:
            schema[name] = pl.String
    schema[KIND_COLUMN] = pl.String
    table = pl.DataFrame(columns, schema=schema)
    return draw_scored(table, seed) if competition.marks_scored_rows else table


def draw_scored(table: pl.DataFrame, seed: int) -> pl.DataFrame:
    """Draw for each adversarial row whether it counts on the leaderboard: yes, no or null.

    Kaggle's test files may have a column `scored` that says so. With one in SEEDS_WITHOUT_SCORED seeds the
    table has none.
    """
    leaves_column_out = seed % SEEDS_WITHOUT_SCORED == SEEDS_WITHOUT_SCORED - 1
    if leaves_column_out:
        return table.drop(SCORED, strict=False)

    rng = random.Random(seed)
    scored = [True] * len(table)
    if SCORED in table.columns:
        scored = table[SCORED].to_list()
    for place, kind in enumerate(table[KIND_COLUMN]):
        if kind is not None:
            scored[place] = rng.choice((True, False, None))
    return table.with_columns(pl.Series(SCORED, scored, pl.Boolean))


def choose_kinds(rows: int, rng: random.Random) -> list[str]:
    """Choose the kinds of the adversarial rows for a table of `rows` rows.

    Every kind comes once before any comes twice. After that the short kinds are about equally
    frequent, and each long kind comes once in ROWS_PER_LONG_ROW rows.
    """
    wanted_rows = max(math.ceil(SHARE * rows), len(KINDS))
    number = min(wanted_rows, rows // 2)

    one_of_each = rng.sample(KINDS, len(KINDS))

    # As many long rows as a rehearsal has time for.
    long_kinds = []
    for kind in LONG:
        long_kinds += [kind] * (rows // ROWS_PER_LONG_ROW)

    # More than enough of the short kinds: the list is cut to its length at the end.
    short_kinds = []
    repeats = math.ceil(number / (len(KINDS) - len(LONG)))
    for kind in KINDS:
        if kind not in LONG:
            short_kinds += [kind] * repeats
    shuffled_short_kinds = rng.sample(short_kinds, len(short_kinds))

    return [*one_of_each, *long_kinds, *shuffled_short_kinds][:number]


def convert_text(text: Field, dtype: pl.DataType, are_turns: bool, rng: random.Random) -> Field:
    """Convert a text, a list of turns or a null to what a column of the type `dtype` holds.

    With `are_turns` a column of text holds JSON lists of turns.
    """
    is_list = isinstance(dtype, pl.List)
    if are_turns and not is_list:
        return as_json_turns(text, rng)
    if text is None:
        return None

    turns = [text] if isinstance(text, str) else text
    if is_list:
        return [None if turn is None else escape_surrogates(turn) for turn in turns]

    # One text, with a line for each turn; a null turn is an empty line.
    lines = [turn or "" for turn in turns]
    return escape_surrogates("\n".join(lines))


def as_json_turns(text: Field, rng: random.Random) -> str | None:
    """Write a text as a JSON list of turns, in one of the spellings that LMSYS's files may have."""
    # Each of these three says in a file that there is no text.
    if text is None:
        return rng.choice((None, "null", "[null]"))

    # Adversarial texts that are JSON already, mostly broken, must reach the kernel as they are.
    if isinstance(text, str) and text.startswith(("[", "{")):
        return text

    turns = [text] if isinstance(text, str) else text
    ascii_json = json.dumps(turns)
    unicode_json = json.dumps(turns, ensure_ascii=False)

    # No file can hold a lone surrogate in Unicode: then only the ASCII spelling is possible.
    prefers_unicode = rng.random() < 0.5
    has_no_surrogates = escape_surrogates(unicode_json) == unicode_json
    if prefers_unicode and has_no_surrogates:
        return unicode_json
    return ascii_json


def escape_surrogates(text: str) -> str:
    """Spell out lone surrogates as a backslash, u and four digits: no text file can hold them."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
