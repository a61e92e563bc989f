"""The leak report: similar prompts that stand in different folds, or in a source and a held-back file.

It checks the grouping, with which it shares no search: prefix filtering here proposes pairs and misses
none, exact Jaccard decides. `python -m preprocess` writes nothing before it has passed.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import polars as pl

from preprocess.dedup.ngrams import (
    Track,
    fast_jaccard,
    find_first_copies,
    jaccard,
    show_nothing,
)
from preprocess.dedup.prefix_filter import (
    ROUNDING,
    GramCounts,
    build_prefix_index,
    count_grams,
    count_prefix,
    find_candidates,
)

# Bounds memory: entries of the prefix index, of about 40 bytes each, that are held at once.
ENTRIES_AT_ONCE = 50_000_000


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
    texts: pl.Series,
    places: np.ndarray,
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
    counts = count_grams(texts.gather(positions), track)

    # The index wants the shortest texts first.
    by_size = np.argsort(counts.size, kind="stable")
    positions = positions[by_size]
    counts = GramCounts(counts.size[by_size], counts.frequency)
    # Files outside of the folds are one place, for they may share prompts.
    places_by_size = np.maximum(places[positions], -1).astype(np.int16)
    texts_by_size = texts.gather(positions)

    leaks = []
    compared = 0
    closest = 0.0
    for window in split_by_size(counts.size, threshold):
        for longer, shorter in _find_pairs(
            window, texts_by_size, places_by_size, counts, threshold, track
        ):
            compared += 1
            similarity = fast_jaccard(texts_by_size[longer], texts_by_size[shorter])
            if similarity < threshold:
                closest = max(closest, similarity)
                continue

            first = int(min(positions[longer], positions[shorter]))
            second = int(max(positions[longer], positions[shorter]))
            leaks.append(Leak(first, second, jaccard(texts[first], texts[second])))

    leaks.sort(key=lambda leak: (-leak.similarity, leak.first, leak.second))
    return LeakReport(tuple(leaks), compared, closest)


def _find_pairs(
    window: Window,
    texts: pl.Series,
    places: np.ndarray,
    counts: GramCounts,
    threshold: float,
    track: Track,
) -> Iterator[tuple[int, int]]:
    """Yield the longer and the shorter text of each pair of a window that may reach the threshold.

    Args:
        window: The texts to compare.
        texts: All texts, those with the fewest n-grams first.
        places: Of each text.
        counts: Of all texts.
        threshold: The Jaccard similarity.
        track: Shows the progress.
    """
    # The index of one window is gone when that of the next is built.
    members = slice(window.begin, window.end)
    counts_of_members = GramCounts(counts.size[members], counts.frequency)
    index = build_prefix_index(texts[members], counts_of_members, places[members], threshold, track)
    for longer, shorter in find_candidates(index, threshold, window.first_longer, track):
        yield window.begin + longer, window.begin + shorter


def split_by_size(sizes: np.ndarray, threshold: float) -> list[Window]:
    """Split texts into windows that together hold every pair that may reach a similarity, each once.

    Args:
        sizes: The number of n-grams of each text, in ascending order (texts,).
        threshold: The Jaccard similarity, 0.5 to 1.
    """
    entries_before = np.append(0, np.cumsum(count_prefix(sizes, threshold)))
    windows = []
    start = 0
    while start < len(sizes):
        # Texts that are any shorter share too few n-grams with those of this window.
        begin = int(np.searchsorted(sizes, threshold * sizes[start] - ROUNDING))

        # Not to end up with one text a window where many have about the same size.
        most_entries = max(
            entries_before[begin] + ENTRIES_AT_ONCE, entries_before[start] + ENTRIES_AT_ONCE // 4
        )
        end = int(np.searchsorted(entries_before, most_entries, side="right")) - 1
        end = max(end, start + 1)

        windows.append(Window(begin, end, start - begin))
        start = end
    return windows


def _drop_copies(texts: pl.Series, places: np.ndarray) -> np.ndarray:
    """Return the positions of prompts; of equal ones in one place the first stands for all."""
    copies = pl.DataFrame({"text": find_first_copies(texts), "place": places})
    is_first = copies.select(pl.struct("text", "place").is_first_distinct()).to_series()
    return is_first.arg_true().cast(pl.Int64).to_numpy()
