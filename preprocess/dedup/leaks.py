"""The leak report: similar prompts that stand in different folds, or in a source and a held-back file.

It checks the grouping, with which it shares no search: prefix filtering here proposes pairs and misses
none, exact Jaccard decides. `python -m preprocess` writes nothing before it has passed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from preprocess.dedup.ngrams import Track, codes_jaccard, gram_codes, jaccard, show_nothing
from preprocess.dedup.prefix_filter import ROUNDING, build_prefix_index, find_candidates

# Bounds memory: n-grams, of 8 bytes each, that are held at once.
GRAMS_AT_ONCE = 50_000_000


@dataclass(frozen=True)
class Leak:
    """Two similar prompts in different places, by their positions, the earlier one first."""

    first: int
    second: int
    similarity: float


@dataclass(frozen=True)
class Window:
    """The texts begin:end by size, of which those from `first_longer` on are compared with shorter ones."""

    begin: int
    end: int
    first_longer: int  # counted from `begin`


@dataclass(frozen=True)
class LeakReport:
    """What the comparison of prompts came to."""

    leaks: tuple[Leak, ...]  # the most similar first
    compared: int  # how many pairs came so near that they were compared
    closest: float  # similarity of the closest of these that is no leak; 0 where there is none


def find_leaks(
    texts: Sequence[str],
    places: Sequence[int],
    threshold: float,
    track: Track = show_nothing,
) -> LeakReport:
    """Compare prompts that stand in different places.

    Args:
        texts: Normalised prompts.
        places: Of each, its fold, from 0 on, or a number below 0 for a file outside of the folds. Two
            such files may share prompts.
        threshold: Jaccard similarity, 0.5 to 1, from which on two prompts are a leak.
        track: Shows the progress.
    """
    positions = _drop_copies(texts, places)
    steps = track(positions.tolist(), "leak report: counting n-grams")
    sizes = np.array([len(gram_codes(texts[position])) for position in steps], np.int64)

    # The index wants the shortest texts first.
    by_size = np.argsort(sizes, kind="stable")
    positions = positions[by_size]
    # Files outside of the folds are one place, for they may share prompts.
    places_by_size = np.maximum(np.asarray(places)[positions], -1)

    leaks = []
    compared = 0
    closest = 0.0
    windows = split_by_size(sizes[by_size], threshold)
    for window in track(windows, "leak report: nearest neighbours"):
        positions_here = positions[window.begin : window.end]
        codes = [gram_codes(texts[position]) for position in positions_here]
        index = build_prefix_index(codes, places_by_size[window.begin : window.end], threshold)

        for longer, shorter in find_candidates(index, threshold, window.first_longer):
            compared += 1
            similarity = codes_jaccard(codes[longer], codes[shorter])
            if similarity < threshold:
                closest = max(closest, similarity)
                continue

            first, second = sorted((int(positions_here[longer]), int(positions_here[shorter])))
            leaks.append(Leak(first, second, jaccard(texts[first], texts[second])))

    leaks.sort(key=lambda leak: (-leak.similarity, leak.first, leak.second))
    return LeakReport(tuple(leaks), compared, closest)


def split_by_size(sizes: np.ndarray, threshold: float) -> list[Window]:
    """Split texts into windows that together hold every pair that may reach a similarity, each once.

    Args:
        sizes: The number of n-grams of each text, in ascending order (texts,).
        threshold: The Jaccard similarity, 0.5 to 1.
    """
    grams_before = np.append(0, np.cumsum(sizes))
    windows = []
    start = 0
    while start < len(sizes):
        # Texts that are any shorter share too few n-grams with those of this window.
        begin = int(np.searchsorted(sizes, threshold * sizes[start] - ROUNDING))

        # Not to end up with one text a window where many have about the same size.
        most_grams = max(
            grams_before[begin] + GRAMS_AT_ONCE, grams_before[start] + GRAMS_AT_ONCE // 4
        )
        end = int(np.searchsorted(grams_before, most_grams, side="right")) - 1
        end = max(end, start + 1)

        windows.append(Window(begin, end, start - begin))
        start = end
    return windows


def _drop_copies(texts: Sequence[str], places: Sequence[int]) -> np.ndarray:
    """Return the positions of prompts; of equal ones in one place the first stands for all."""
    position_by_key: dict[tuple[str, int], int] = {}
    for position, (text, place) in enumerate(zip(texts, places, strict=True)):
        position_by_key.setdefault((text, int(place)), position)
    return np.array(list(position_by_key.values()), dtype=np.int64)
