"""The leak report: similar prompts that stand in different folds, or in a source and a held-back file.

It checks the grouping, with which it shares no search: prefix filtering here proposes pairs and misses
none, exact Jaccard decides. `python -m preprocess` writes nothing before it has passed.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import polars as pl

from preprocess.dedup.ngrams import find_first_copies, jaccard
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
    """The texts begin:end in order of size, which are searched for similar pairs at once.

    The longer text of such a pair is one from `first_longer` on; the shorter one is any text before
    it.
    """

    begin: int
    end: int
    first_longer: int  # counted from `begin`


def find_leaks(
    texts: pl.Series,
    places: np.ndarray,
    threshold: float,
) -> list[Leak]:
    """Compare prompts that stand in different places.

    Args:
        texts: Normalised prompts.
        places: Where each stands: the number of its fold, from 0 on, or -1, -2, … for a file
            outside of the folds. Two such files may share prompts.
        threshold: Jaccard similarity, 0.5 to 1, from which on two prompts are a leak.

    Returns:
        The leaks, the most similar first.
    """
    positions = _drop_copies(texts, places)
    counts = count_grams(texts.gather(positions))

    # The search numbers the texts by size, those with the fewest n-grams first: its text i is the
    # prompt at positions[i].
    by_size = np.argsort(counts.size, kind="stable")
    positions = positions[by_size]
    counts_by_size = GramCounts(counts.size[by_size], counts.frequency)
    texts_by_size = texts.gather(positions)

    # Within a place nothing is compared. So all files outside of the folds, -1, -2, …, become the
    # place -1.
    places_by_size = np.maximum(places[positions], -1).astype(np.int16)

    leaks = []
    for window in split_by_size(counts_by_size.size, threshold):
        pairs = _find_pairs(window, texts_by_size, places_by_size, counts_by_size, threshold)
        for longer, shorter in pairs:
            similarity = jaccard(texts_by_size[longer], texts_by_size[shorter])
            if similarity < threshold:
                continue

            first = int(min(positions[longer], positions[shorter]))
            second = int(max(positions[longer], positions[shorter]))
            leaks.append(Leak(first, second, similarity))

    leaks.sort(key=lambda leak: (-leak.similarity, leak.first, leak.second))
    return leaks


def _find_pairs(
    window: Window,
    texts: pl.Series,
    places: np.ndarray,
    counts: GramCounts,
    threshold: float,
) -> Iterator[tuple[int, int]]:
    """Yield the longer and the shorter text of each pair of a window that may reach the threshold."""
    # The index is a local variable, so that its memory is free before the next window's index is
    # built.
    members = slice(window.begin, window.end)
    counts_of_members = GramCounts(counts.size[members], counts.frequency)
    index = build_prefix_index(texts[members], counts_of_members, places[members], threshold)

    # The index numbers the window's texts from 0 on.
    for longer, shorter in find_candidates(index, threshold, window.first_longer):
        yield window.begin + longer, window.begin + shorter


def split_by_size(sizes: np.ndarray, threshold: float) -> list[Window]:
    """Split texts into windows that together hold every pair that may reach a similarity, each once.

    The texts are cut into slices start:end. A window is begin:end: a slice and those shorter texts
    before it that may be similar to one of it. The texts of the slice are compared with one another
    and with the shorter ones, so that a pair is found once, in the window of its longer text.

    Args:
        sizes: The number of n-grams of each text, in ascending order (texts,).
        threshold: The Jaccard similarity, 0.5 to 1.
    """
    # For example, at a threshold of 0.5, if ENTRIES_AT_ONCE was 40:
    #     text             0   1   2   3   4
    #     size            10  12  20  22  30
    #     entries          6   7  11  12  16
    #     first window     0   1   2   3          begin 0, start 0, end 4: 36 entries
    #     second window            2   3   4      begin 2, start 4, end 5: 39 entries
    entries_before = np.append(0, np.cumsum(count_prefix(sizes, threshold)))
    windows = []
    start = 0
    while start < len(sizes):
        # Two texts are at most as similar as smaller size / larger size. So texts below this size
        # cannot reach the threshold with any of start:end; in the example, 15 for the size 30.
        least_size = threshold * sizes[start] - ROUNDING
        begin = int(np.searchsorted(sizes, least_size))

        # A window may have ENTRIES_AT_ONCE entries. Where many texts have about the same size,
        # begin:start alone may have that many, and each slice would be a single text. So a slice
        # may always have a quarter as many.
        limit_of_window = entries_before[begin] + ENTRIES_AT_ONCE
        limit_of_slice = entries_before[start] + ENTRIES_AT_ONCE // 4
        limit = max(limit_of_window, limit_of_slice)

        # The slice ends before the text that would exceed the limit, but has at least one text.
        end = int(np.searchsorted(entries_before, limit, side="right")) - 1
        end = max(end, start + 1)

        windows.append(Window(begin, end, first_longer=start - begin))
        start = end
    return windows


def _drop_copies(texts: pl.Series, places: np.ndarray) -> np.ndarray:
    """Return the positions of the prompts to compare: of equal ones in one place, only the first.

    Equal prompts in different places all stay, for they are leaks.
    """
    copies = pl.DataFrame({"text": find_first_copies(texts), "place": places})
    is_first = copies.select(pl.struct("text", "place").is_first_distinct()).to_series()
    return is_first.arg_true().cast(pl.Int64).to_numpy()
