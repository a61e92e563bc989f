"""The leak report: similar prompts that stand in different folds, or in a source and a held-back file.

It checks the grouping, with which it shares no search: prefix filtering here proposes pairs and misses
none, exact Jaccard decides. `python -m preprocess` writes nothing before it has passed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from preprocess.dedup.ngrams import Track, codes_jaccard, gram_codes, jaccard, show_nothing
from preprocess.dedup.prefix_filter import build_prefix_index, find_candidates


@dataclass(frozen=True)
class Leak:
    """Two similar prompts in different places, by their positions, the earlier one first."""

    first: int
    second: int
    similarity: float


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
    steps = track(positions.tolist(), "leak report: n-grams")
    codes = [gram_codes(texts[position]) for position in steps]

    # The index wants the shortest texts first.
    sizes = [len(text_codes) for text_codes in codes]
    by_size = np.argsort(sizes, kind="stable")
    positions = positions[by_size]
    codes = [codes[number] for number in by_size]
    # Files outside of the folds are one place, for they may share prompts.
    places_by_size = np.maximum(np.asarray(places)[positions], -1)

    index = build_prefix_index(codes, places_by_size, threshold)
    leaks = []
    compared = 0
    closest = 0.0
    for batch in find_candidates(index, threshold):
        candidates = np.stack(batch, axis=1).tolist()
        compared += len(candidates)

        for longer, shorter in track(candidates, "leak report: nearest neighbours"):
            similarity = codes_jaccard(codes[longer], codes[shorter])
            if similarity < threshold:
                closest = max(closest, similarity)
                continue

            first, second = sorted((int(positions[longer]), int(positions[shorter])))
            leaks.append(Leak(first, second, jaccard(texts[first], texts[second])))

    leaks.sort(key=lambda leak: (-leak.similarity, leak.first, leak.second))
    return LeakReport(tuple(leaks), compared, closest)


def _drop_copies(texts: Sequence[str], places: Sequence[int]) -> np.ndarray:
    """Return the positions of prompts; of equal ones in one place the first stands for all."""
    position_by_key: dict[tuple[str, int], int] = {}
    for position, (text, place) in enumerate(zip(texts, places, strict=True)):
        position_by_key.setdefault((text, int(place)), position)
    return np.array(list(position_by_key.values()), dtype=np.int64)
