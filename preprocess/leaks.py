"""The leak report: prompts alike at or above a threshold that stand in different folds, or in a source and a held-back file.

It checks the grouping and shares no search with it. Of n n-grams ordered from rare to common, two texts of Jaccard
similarity t or more share one among their first n - ceil(t * n) + 1 each: an inverted index of these finds every pair
(prefix filtering: Chaudhuri et al. 2006; Xiao et al. 2008), and exact Jaccard decides.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from preprocess.ngrams import gram_codes, jaccard

FREQUENCY_BUCKETS = 1 << 22


@dataclass(frozen=True)
class Leak:
    """Two prompts, by their position, that are alike but stand in different places."""

    one: int
    other: int
    similarity: float


@dataclass(frozen=True)
class LeakReport:
    """`leaks` from the most alike on; of the `compared` pairs that came near, the closest harmless one reached `closest`."""

    leaks: tuple[Leak, ...]
    compared: int
    closest: float


@dataclass(frozen=True)
class _Index:
    """Rare n-grams of every text, texts in order of `size`: entries of text i stand at edges[i]:edges[i + 1]."""

    size: np.ndarray
    rest: np.ndarray  # n-grams beyond the rare ones
    last: np.ndarray  # rank of the commonest of the rare ones
    edges: np.ndarray
    before: np.ndarray  # of each entry: how many earlier texts hold it
    first: np.ndarray  # of each entry: where its list of texts starts in `holders`
    holders: np.ndarray


def find_leaks(
    texts: Sequence[str], places: Sequence[int], threshold: float, track: Callable = lambda steps, _: steps
) -> LeakReport:
    """Compare normalised prompts in different places: folds are 0 and up, files outside of the folds are below 0.

    Two texts outside of the folds are no leak. Of equal texts in one place the first stands for all.
    """
    stands: dict[tuple[str, int], int] = {}
    for at, key in enumerate(zip(texts, places, strict=True)):
        stands.setdefault((key[0], int(key[1])), at)
    who = np.fromiter(stands.values(), np.int64, len(stands))
    codes = [gram_codes(texts[at]) for at in track(who.tolist(), "leak report: n-grams")]
    order = np.argsort([len(code) for code in codes], kind="stable")
    who = who[order]
    where = np.asarray(places, dtype=np.int64)[who]
    index = _rare_ngrams(codes, order, threshold)
    leaks, compared, closest = [], 0, 0.0
    for at in track(range(len(who)), "leak report: nearest neighbours"):
        for neighbour in _candidates(index, where, at, threshold).tolist():
            similarity = jaccard(texts[who[at]], texts[who[neighbour]])
            compared += 1
            if similarity >= threshold:
                one, other = sorted((int(who[at]), int(who[neighbour])))
                leaks.append(Leak(one, other, similarity))
            else:
                closest = max(closest, similarity)
    return LeakReport(tuple(sorted(leaks, key=lambda leak: (-leak.similarity, leak.one, leak.other))), compared, closest)


def _rare_ngrams(codes: list[np.ndarray], order: np.ndarray, threshold: float) -> _Index:
    """The index over the texts in `order`; `codes` is emptied on the way, to spare memory."""
    frequency = np.zeros(FREQUENCY_BUCKETS, np.uint64)
    mask = np.uint64(FREQUENCY_BUCKETS - 1)
    for code in codes:
        frequency[code & mask] += np.uint64(1)
    size = np.array([len(codes[at]) for at in order], dtype=np.int64)
    kept = size - np.ceil(threshold * size - 1e-9).astype(np.int64) + 1
    prefixes, last = [np.zeros(0, np.uint64)], np.zeros(len(size), np.uint64)
    for position, at in enumerate(order.tolist()):
        rank = np.minimum(frequency[codes[at] & mask], np.uint64(0xFFFF)) << np.uint64(48) | codes[at] >> np.uint64(16)
        codes[at] = np.zeros(0, np.uint64)
        prefix = np.sort(rank)[: kept[position]]
        last[position] = prefix[-1]
        prefixes.append(prefix)
    ranks = np.concatenate(prefixes)
    prefixes.clear()
    text_of = np.repeat(np.arange(len(size), dtype=np.int32), kept)
    by_rank = np.argsort(ranks, kind="stable")
    ranks = ranks[by_rank]
    starts = np.flatnonzero(np.concatenate([[True], ranks[1:] != ranks[:-1]])) if len(ranks) else np.zeros(0, np.int64)
    first_in_order = np.repeat(starts, np.diff(np.append(starts, len(ranks))))
    first = np.empty(len(ranks), np.int64)
    first[by_rank] = first_in_order
    before = np.empty(len(ranks), np.int32)
    before[by_rank] = np.arange(len(ranks)) - first_in_order
    return _Index(size, size - kept, last, np.append(0, np.cumsum(kept)), before, first, text_of[by_rank])


def _candidates(index: _Index, where: np.ndarray, at: int, threshold: float) -> np.ndarray:
    """Texts no longer than text `at`, in another place, that share so many rare n-grams that they may reach the threshold."""
    entries = slice(index.edges[at], index.edges[at + 1])
    before, first = index.before[entries], index.first[entries]
    first, before = first[before > 0], before[before > 0].astype(np.int64)
    if not len(before):
        return before
    steps = np.arange(before.sum()) - np.repeat(np.cumsum(before) - before, before)
    holders = index.holders[np.repeat(first, before) + steps]
    other_place = (where[holders] != where[at]) & ((where[holders] >= 0) | (where[at] >= 0))
    long_enough = index.size[holders] >= threshold * index.size[at] - 1e-9
    found, shared = np.unique(holders[other_place & long_enough], return_counts=True)
    beyond = np.where(index.last[found] < index.last[at], index.rest[found], index.rest[at])
    needed = threshold / (1 + threshold) * (index.size[found] + index.size[at])
    return found[shared + beyond >= needed - 1e-9]
