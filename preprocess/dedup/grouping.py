"""Prompts that are equal or nearly so form groups: MinHash finds candidates, exact Jaccard decides.

A group is what is connected by pairs at or above the threshold, no more: sparing a single such link would put a near-copy
into another fold. Its root is its earliest prompt, so that what is added later joins a group without renaming it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from rensa import RMinHash

from preprocess.dedup.ngrams import codes_jaccard, gram_codes

PERMUTATIONS = 256
SEED = 42
MISSES = 2e-5  # accepted chance that no band of two prompts exactly at the threshold agrees
SLACK = 0.15  # five standard deviations of the MinHash estimate with 256 permutations
SMALL_BUCKET = 64
BATCH = 2048


@dataclass(frozen=True)
class Groups:
    """`root[i]`: the earliest prompt of prompt i's group. `joined`: (root kept, root given up) where newer data did that."""

    root: np.ndarray
    joined: tuple[tuple[int, int], ...]


def group_prompts(
    texts: Sequence[str], threshold: float, ages: Sequence[int] | None = None, track: Callable = lambda steps, _: steps
) -> Groups:
    """Group normalised prompts. `ages[i]` numbers the file that prompt i is from, in the order in which files were added."""
    first: dict[str, int] = {}
    of_unique = np.array([first.setdefault(text, at) for at, text in enumerate(texts)], dtype=np.int64)
    uniques = np.fromiter(first.values(), np.int64, len(first))
    unique_texts = list(first)
    signatures = _signatures(unique_texts, track)
    candidates = _candidates(signatures, threshold, track)
    codes = lru_cache(maxsize=4096)(lambda at: gram_codes(unique_texts[at]))
    parents = list(range(len(unique_texts)))
    joined = []
    for earlier, later in track(candidates.tolist(), "comparing prompts that look alike"):
        kept, given_up = sorted((_find(parents, earlier), _find(parents, later)))
        if kept == given_up or codes_jaccard(codes(earlier), codes(later)) < threshold:
            continue
        parents[given_up] = kept
        if ages is not None and ages[uniques[given_up]] < ages[uniques[later]]:
            joined.append((int(uniques[kept]), int(uniques[given_up])))
    roots = np.array([_find(parents, at) for at in range(len(parents))], dtype=np.int64)
    position = np.zeros(len(texts), dtype=np.int64)
    position[uniques] = np.arange(len(uniques))
    return Groups(uniques[roots[position[of_unique]]], tuple(joined))


def _find(parents: list[int], at: int) -> int:
    while parents[at] != at:
        parents[at] = parents[parents[at]]
        at = parents[at]
    return at


def band_rows(threshold: float) -> int:
    """Hashes a band: the most with which two prompts at the threshold share some band, but for MISSES."""
    rows = range(1, 33)
    return max(r for r in rows if r == 1 or (1 - threshold**r) ** (PERMUTATIONS // r) <= MISSES)


def _signatures(texts: Sequence[str], track: Callable) -> np.ndarray:
    """MinHash signatures, uint32 (texts, PERMUTATIONS)."""
    parts = [np.zeros((0, PERMUTATIONS), np.uint32)]
    for start in track(range(0, len(texts), BATCH), "hashing prompts"):
        codes = [gram_codes(text) for text in texts[start : start + BATCH]]
        offsets = np.cumsum([0, *map(len, codes)]).astype(np.uint64)
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(np.concatenate(codes), offsets, PERMUTATIONS, SEED)
        parts.append(np.array(matrix.to_rows(), dtype=np.uint32))
    return np.concatenate(parts)


def _candidates(signatures: np.ndarray, threshold: float, track: Callable) -> np.ndarray:
    """Pairs (earlier, later) that share a band and whose signatures agree about as often as the threshold asks.

    Sorted by the later one, as if prompts arrived one by one. int64 (candidates, 2).
    """
    count, rows = len(signatures), band_rows(threshold)
    least = (threshold - SLACK) * PERMUTATIONS
    found = [np.zeros(0, np.int64)]
    for band in track(range(PERMUTATIONS // rows), "finding prompts that look alike"):
        columns = np.ascontiguousarray(signatures[:, band * rows : (band + 1) * rows])
        keys = columns.view(np.dtype((np.void, 4 * rows))).ravel()
        order = np.argsort(keys, kind="stable")
        changes = np.flatnonzero(keys[order][1:] != keys[order][:-1]) + 1
        for one, other in _pairs_in(order, np.concatenate([[0], changes, [count]])):
            for part in range(0, len(one), 8 * BATCH):
                a, b = one[part : part + 8 * BATCH], other[part : part + 8 * BATCH]
                alike = (signatures[a] == signatures[b]).sum(axis=1) >= least
                found.append(np.maximum(a, b)[alike] * count + np.minimum(a, b)[alike])
    codes = np.unique(np.concatenate(found))
    return np.stack([codes % max(count, 1), codes // max(count, 1)], axis=1)


def _pairs_in(order: np.ndarray, edges: np.ndarray) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """All pairs in the small buckets, then those of each large one. Bucket k is order[edges[k]:edges[k + 1]]."""
    sizes = np.diff(edges)
    small = np.repeat((sizes > 1) & (sizes <= SMALL_BUCKET), sizes)
    bucket_of = np.repeat(np.arange(len(sizes)), sizes)[small]
    members = order[small]
    for distance in range(1, SMALL_BUCKET):
        same = np.flatnonzero(bucket_of[distance:] == bucket_of[:-distance])
        if not len(same):
            break
        yield members[same], members[same + distance]
    for bucket in np.flatnonzero(sizes > SMALL_BUCKET):
        inside = order[edges[bucket] : edges[bucket + 1]]
        for at in range(len(inside) - 1):
            yield np.full(len(inside) - at - 1, inside[at]), inside[at + 1 :]
