"""What makes two prompts alike: the Jaccard similarity of their sets of character 5-grams, after normalising.

Characters rather than words, so that Chinese and Japanese work. A text shorter than 5 characters is its own only n-gram.
"""

import unicodedata
from collections.abc import Sequence

import numpy as np

GRAM = 5
_FACTOR, _MIX = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)


def normalise(turns: Sequence[str]) -> str:
    """One text of a prompt's turns: NFKC, case folded, runs of white space as one space."""
    return " ".join(unicodedata.normalize("NFKC", "\n".join(turns)).casefold().split())


def grams(text: str) -> frozenset[str]:
    """The set of character 5-grams of a normalised text."""
    return frozenset(text[at : at + GRAM] for at in range(max(len(text) - GRAM + 1, 1)))


def jaccard(one: str, other: str) -> float:
    """Exact similarity of two normalised texts, 0 to 1."""
    a, b = grams(one), grams(other)
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared)


def gram_codes(text: str) -> np.ndarray:
    """The same set as 64-bit hashes: sorted, unique, uint64."""
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32).astype(np.uint64)
    if len(points) < GRAM:
        points = np.concatenate([points, np.full(GRAM - len(points), 0x110000, np.uint64)])
    count = len(points) - GRAM + 1
    codes = points[:count].copy()
    for offset in range(1, GRAM):
        codes *= _FACTOR
        codes += points[offset : offset + count]
    codes ^= codes >> np.uint64(31)
    codes *= _MIX
    codes ^= codes >> np.uint64(29)
    codes.sort()
    fresh = np.ones(count, bool)
    np.not_equal(codes[1:], codes[:-1], out=fresh[1:])
    return codes[fresh]


def codes_jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """`jaccard` of two texts from their gram_codes: the same but for hashes that collide, and ten times as fast."""
    both = np.concatenate([a, b])
    both.sort(kind="stable")
    shared = int(np.count_nonzero(both[1:] == both[:-1]))
    return shared / (len(both) - shared)
