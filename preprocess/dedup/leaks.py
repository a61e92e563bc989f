"""The leak report: prompts alike at or above a threshold that stand in different folds, or in a source and a held-back file.

It checks the grouping and shares no search with it. Of n n-grams ordered from rare to common, two texts of Jaccard
similarity t or more share one among their first n - ceil(t * n) + 1 each: an inverted index of these finds every pair
(prefix filtering: Chaudhuri et al. 2006; Xiao et al. 2008), and exact Jaccard decides.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from preprocess.dedup.ngrams import codes_jaccard, gram_codes, jaccard

FREQUENCY_BUCKETS = 1 << 22
MEETINGS_AT_ONCE = 2_000_000


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
    who, codes = who[order], [codes[at] for at in order]
    index = _rare_ngrams(codes, threshold)
    leaks, compared, closest = [], 0, 0.0
    for batch in _candidates(index, np.asarray(places, dtype=np.int64)[who], threshold):
        for longer, shorter in track(np.stack(batch, axis=1).tolist(), "leak report: nearest neighbours"):
            compared += 1
            similarity = codes_jaccard(codes[longer], codes[shorter])
            if similarity >= threshold:
                one, other = sorted((int(who[longer]), int(who[shorter])))
                leaks.append(Leak(one, other, jaccard(texts[one], texts[other])))
            else:
                closest = max(closest, similarity)
    return LeakReport(tuple(sorted(leaks, key=lambda leak: (-leak.similarity, leak.one, leak.other))), compared, closest)


def _rare_ngrams(codes: list[np.ndarray], threshold: float) -> _Index:
    """The index over texts sorted by their number of n-grams, given their gram_codes."""
    frequency = np.zeros(FREQUENCY_BUCKETS, np.uint64)
    mask = np.uint64(FREQUENCY_BUCKETS - 1)
    for code in codes:
        frequency[code & mask] += np.uint64(1)
    size = np.array([len(code) for code in codes], dtype=np.int64)
    kept = size - np.ceil(threshold * size - 1e-9).astype(np.int64) + 1
    prefixes, last = [np.zeros(0, np.uint64)], np.zeros(len(size), np.uint64)
    for position, code in enumerate(codes):
        rank = np.minimum(frequency[code & mask], np.uint64(0xFFFF)) << np.uint64(48) | code >> np.uint64(16)
        prefix = np.partition(rank, kept[position] - 1)[: kept[position]]
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
    before = np.empty(len(ranks), np.int64)
    before[by_rank] = np.arange(len(ranks)) - first_in_order
    return _Index(size, size - kept, last, np.append(0, np.cumsum(kept)), before, first, text_of[by_rank])


def _candidates(index: _Index, where: np.ndarray, threshold: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of texts in different places that share so many rare n-grams that they may reach the threshold.

    Yields the longer and the shorter text of each, a batch at a time, so that memory stays bounded.
    """
    count = len(where)
    meetings = np.concatenate([[0], np.cumsum(index.before, dtype=np.int64)])[index.edges]
    edges = np.arange(0, meetings[-1] + MEETINGS_AT_ONCE, MEETINGS_AT_ONCE)
    batches = np.minimum(np.searchsorted(meetings, edges), count)
    for start, stop in zip(batches[:-1], batches[1:], strict=True):
        entries = slice(index.edges[start], index.edges[stop])
        before = index.before[entries]
        steps = np.arange(before.sum()) - np.repeat(np.cumsum(before) - before, before)
        shorter = index.holders[np.repeat(index.first[entries], before) + steps]
        longer = np.repeat(np.arange(start, stop), np.diff(meetings[start : stop + 1]))
        apart = (where[shorter] != where[longer]) & ((where[shorter] >= 0) | (where[longer] >= 0))
        near = apart & (index.size[shorter] >= threshold * index.size[longer] - 1e-9)
        codes, shared = np.unique(longer[near] * count + shorter[near], return_counts=True)
        longer, shorter = codes // count, codes % count
        beyond = np.where(index.last[shorter] < index.last[longer], index.rest[shorter], index.rest[longer])
        needed = threshold / (1 + threshold) * (index.size[shorter] + index.size[longer])
        enough = shared + beyond >= needed - 1e-9
        yield longer[enough], shorter[enough]
