"""The similarity of two prompts: Jaccard, of their sets of character 5-grams, after normalising.

Characters rather than words, so that it works for Chinese and Japanese. A text shorter than 5 characters
is its own only n-gram. N-grams are compared by hashes of 64 bits, which is ten times as fast.
"""

import unicodedata
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import polars as pl

GRAM = 5

# Takes the place of missing characters in a text shorter than GRAM: the first number that is no character.
PADDING = 0x110000

# Odd 64-bit constants with well mixed bits: of Knuth's golden ratio hash, and of SplitMix64.
FACTOR = np.uint64(0x9E3779B97F4A7C15)
MIX = np.uint64(0xBF58476D1CE4E5B9)


def normalise(turns: Sequence[str]) -> str:
    """Return a prompt's turns as one text: NFKC, case folded, each run of white space one space."""
    text = unicodedata.normalize("NFKC", "\n".join(turns))
    return " ".join(text.casefold().split())


def gram_codes(text: str) -> np.ndarray:
    """Return the 5-grams of a normalised text as hashes: uint64, sorted, without duplicates."""
    characters = np.frombuffer(text.encode("utf-32-le"), np.uint32).astype(np.uint64)
    missing = GRAM - len(characters)
    if missing > 0:
        characters = np.append(characters, np.full(missing, PADDING, np.uint64))
    count = len(characters) - GRAM + 1

    # The code of the n-gram c0 c1 c2 c3 c4 is (((c0 F + c1) F + c2) F + c3) F + c4 modulo 2**64, where F
    # is FACTOR. All n-grams take each step together: uint64 wraps around by itself.
    codes = characters[:count].copy()
    for offset in range(1, GRAM):
        codes *= FACTOR
        codes += characters[offset : offset + count]

    # Spread the differences of similar n-grams over all bits, as SplitMix64 does.
    codes ^= codes >> np.uint64(31)
    codes *= MIX
    codes ^= codes >> np.uint64(29)

    # Without duplicates. This is three times as fast as np.unique, which hashes.
    codes.sort()
    is_first = np.ones(count, bool)
    is_first[1:] = codes[1:] != codes[:-1]
    return codes[is_first]


def find_first_copies(texts: pl.Series) -> np.ndarray:
    """Return for each text the position of the first one that is equal to it: int64 (texts,)."""
    frame = texts.to_frame("text").with_row_index("position")
    first_position = pl.col("position").min().over("text").cast(pl.Int64)
    return frame.select(first_position).to_series().to_numpy()


# The searches compare one text with many others in a row.
_cached_gram_codes = lru_cache(maxsize=4096)(gram_codes)


def jaccard(first: str, second: str) -> float:
    """Return the similarity of two normalised texts, 0 to 1: exact, unless the hashes of two n-grams collide."""
    merged = np.concatenate([_cached_gram_codes(first), _cached_gram_codes(second)])

    # NumPy's stable sort merges two sorted runs in linear time. Neither text has an n-gram twice,
    # so that an n-gram which stands twice now is shared.
    merged.sort(kind="stable")
    shared = int(np.count_nonzero(merged[1:] == merged[:-1]))
    return shared / (len(merged) - shared)
