"""What is held in memory of every row of the sources: all but its texts, and what follows from these.

`preprocess.stream` extracts the facts of a batch of rows; `preprocess.pairs` makes pairs of them.
"""

import hashlib

import polars as pl
import pyarrow as pa

from preprocess.dedup.ngrams import normalise
from preprocess.sources.rows import ROWS, TEXTS

# What follows from the texts; null for a row that cannot be used.
OF_TEXTS = pl.Schema(
    {
        "prompt_text": pl.String,  # the prompt, normalised
        "opening": pl.String,  # the prompt's first characters as they are, to be printed
        "prompt_hash": pl.Binary,
        "responses_hash": pl.Binary,  # the same in whichever order the two responses stand
        "is_swapped": pl.Boolean,  # whether they stand the other way round than in the hash
        "is_a_longer": pl.Boolean,  # has more characters, or as many
    }
)
FACTS = pl.Schema({name: ROWS[name] for name in ROWS if name not in TEXTS} | OF_TEXTS)

OPENING_CHARACTERS = 100
HASH_BYTES = 16


def extract_facts(rows: pl.DataFrame) -> pl.DataFrame:
    """Replace the texts of rows by what is needed of them, so that all rows fit into memory.

    Returns:
        A frame of the columns FACTS.
    """
    # A row with a reason (why it cannot be used) is kept, with null in place of what follows from its texts.
    descriptions = []
    for prompt, response_a, response_b, reason in rows.select(*TEXTS, "reason").iter_rows():
        is_usable = reason is None
        if is_usable:
            descriptions.append(describe_texts(prompt, response_a, response_b))
        else:
            descriptions.append({})

    # PyArrow makes columns of dictionaries; a key that is missing becomes null.
    arrow_schema = pl.DataFrame(schema=OF_TEXTS).to_arrow().schema
    arrow_table = pa.Table.from_pylist(descriptions, arrow_schema)
    of_texts = pl.DataFrame(arrow_table, schema=OF_TEXTS)
    return rows.drop(TEXTS).hstack(of_texts)


def describe_texts(prompt: list[str], response_a: list[str], response_b: list[str]) -> dict:
    """Return what the columns OF_TEXTS say about a pair's texts, by column."""
    # The smaller hash of the two responses comes first, so that the joined hash is the same in whichever
    # order the responses stand. is_swapped tells whether B has the smaller one.
    hash_a = hash_turns(response_a)
    hash_b = hash_turns(response_b)
    responses_hash = min(hash_a, hash_b) + max(hash_a, hash_b)
    return {
        "prompt_text": normalise(prompt),
        "opening": " ".join(prompt)[:OPENING_CHARACTERS],
        "prompt_hash": hash_turns(prompt),
        "responses_hash": responses_hash,
        "is_swapped": hash_a > hash_b,
        "is_a_longer": count_characters(response_a) >= count_characters(response_b),
    }


def hash_turns(turns: list[str]) -> bytes:
    """Hash the turns of a conversation; 128 bits do not collide by accident."""
    return hashlib.sha256("\x00".join(turns).encode("utf-8")).digest()[:HASH_BYTES]


def count_characters(turns: list[str]) -> int:
    """Count the characters of all turns."""
    return sum(map(len, turns))
