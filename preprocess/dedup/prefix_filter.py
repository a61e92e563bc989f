"""Prefix filtering: finds every pair of texts that may reach a Jaccard similarity, and misses none.

Sort the n-grams of each text from rare to common, and call the first n - ceil(t * n) + 1 of its n n-grams
its prefix. The prefixes of two texts of similarity t or more share an n-gram, so an inverted index of
prefixes finds every such pair (Chaudhuri et al. 2006; Xiao et al. 2008). leaks.py verifies the pairs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from preprocess.dedup.partners import Partners, find_partners, list_pairs

# N-grams are counted by their lowest 22 bits: a collision makes a rare one look more common, no more.
FREQUENCY_BUCKETS = 1 << 22

# A rank has the frequency in its highest 16 bits and the n-gram's hash below.
MOST_FREQUENT = np.uint64(0xFFFF)
HASH_BITS = np.uint64(48)
HASH_SHIFT = np.uint64(16)

# Bounds memory: the pairs of texts that meet in one n-gram are listed in batches.
MEETINGS_AT_ONCE = 2_000_000

# Keeps rounding from ruling out a pair exactly at the threshold.
ROUNDING = 1e-9


@dataclass(frozen=True)
class PrefixIndex:
    """An inverted index of the prefixes of texts that are sorted by their number of n-grams.

    An entry is one n-gram in the prefix of one text. Entries are in the order of texts: text i has the
    entries first_entry[i]:first_entry[i + 1].
    """

    # By text.
    size: np.ndarray  # number of n-grams
    prefix_size: np.ndarray  # how many of these are in the prefix
    last_rank: np.ndarray  # rank of the commonest n-gram in the prefix
    first_entry: np.ndarray  # one more than there are texts

    # By entry.
    text: np.ndarray  # the text that it is of
    partners: Partners  # the entries of the same n-gram in other places


def build_prefix_index(
    codes: list[np.ndarray], places: np.ndarray, threshold: float
) -> PrefixIndex:
    """Build the index for one threshold.

    Args:
        codes: The gram_codes of texts, shortest first.
        places: Of each text; those of one place are not compared (texts,).
        threshold: The Jaccard similarity.
    """
    size = np.array([len(text_codes) for text_codes in codes], dtype=np.int64)

    # A similar text shares at least so many n-grams, hence one of the rarest of them.
    least_shared = np.ceil(threshold * size - ROUNDING).astype(np.int64)
    prefix_size = size - least_shared + 1

    # All prefixes in one array, text after text.
    ranks, last_rank = _select_prefixes(codes, prefix_size)
    texts = np.repeat(np.arange(len(codes)), prefix_size)

    return PrefixIndex(
        size=size,
        prefix_size=prefix_size,
        last_rank=last_rank,
        first_entry=np.append(0, np.cumsum(prefix_size)),
        text=texts,
        partners=find_partners(ranks, places[texts]),
    )


def _select_prefixes(
    codes: list[np.ndarray], prefix_size: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ranks of the rarest n-grams of each text in one array, and each text's last rank."""
    frequency = np.zeros(FREQUENCY_BUCKETS, np.uint64)
    bucket_mask = np.uint64(FREQUENCY_BUCKETS - 1)
    for text_codes in codes:
        frequency[text_codes & bucket_mask] += np.uint64(1)

    prefixes = [np.zeros(0, np.uint64)]
    last_rank = np.zeros(len(codes), np.uint64)
    for text, text_codes in enumerate(codes):
        text_frequency = frequency[text_codes & bucket_mask]
        high_bits = np.minimum(text_frequency, MOST_FREQUENT) << HASH_BITS
        ranks = high_bits | (text_codes >> HASH_SHIFT)

        # The smallest ranks in any order, but for the largest of them, which comes last.
        last = prefix_size[text] - 1
        prefix = np.partition(ranks, last)[: last + 1]
        prefixes.append(prefix)
        last_rank[text] = prefix[-1]

    return np.concatenate(prefixes), last_rank


def find_candidates(
    index: PrefixIndex, threshold: float, first_longer: int = 0
) -> Iterator[tuple[int, int]]:
    """Find the pairs of texts in different places that may reach a similarity.

    Args:
        index: Built with the same threshold.
        threshold: The Jaccard similarity.
        first_longer: The first text that is of interest as the longer one of a pair.

    Yields:
        The longer and the shorter text of each pair.
    """
    text_count = len(index.size)

    for start, stop in _split_texts(index):
        entries = np.arange(index.first_entry[start], index.first_entry[stop])
        first, second = list_pairs(index.partners, entries)
        first = index.text[first]
        second = index.text[second]

        # Texts stand in the order of their sizes, and can share no more n-grams than they have.
        longer = np.maximum(first, second)
        shorter = np.minimum(first, second)
        least_size = threshold * index.size[longer] - ROUNDING
        is_relevant = (index.size[shorter] >= least_size) & (longer >= first_longer)

        # A pair meets in as many n-grams as the two prefixes share.
        longer = longer[is_relevant]
        shorter = shorter[is_relevant]
        pair_codes = longer * text_count + shorter
        unique_codes, shared = np.unique(pair_codes, return_counts=True)
        longer = unique_codes // text_count
        shorter = unique_codes % text_count

        most_shared = shared + _count_beyond_prefix(index, longer, shorter)
        total_size = index.size[longer] + index.size[shorter]
        least_shared = threshold / (1 + threshold) * total_size - ROUNDING
        is_candidate = most_shared >= least_shared
        yield from zip(longer[is_candidate].tolist(), shorter[is_candidate].tolist(), strict=True)


def _split_texts(index: PrefixIndex) -> Iterator[tuple[int, int]]:
    """Yield ranges of texts that have about MEETINGS_AT_ONCE meetings with their partners."""
    # How many meetings there are before each entry, and before each text.
    before_entry = np.append(0, np.cumsum(index.partners.count))
    before_text = before_entry[index.first_entry]
    total = before_text[-1]

    # A range ends with the text that reaches the next multiple of the limit.
    limits = np.arange(0, total + MEETINGS_AT_ONCE, MEETINGS_AT_ONCE)
    edges = np.searchsorted(before_text, limits)
    edges = np.minimum(edges, len(index.size))
    yield from pairwise(edges.tolist())


def _count_beyond_prefix(index: PrefixIndex, longer: np.ndarray, shorter: np.ndarray) -> np.ndarray:
    """Return how many n-grams of each pair may be shared and not be in both prefixes.

    Those stand behind the prefix that ends first, so no more than that text has left.
    """
    left_of_longer = index.size[longer] - index.prefix_size[longer]
    left_of_shorter = index.size[shorter] - index.prefix_size[shorter]
    ends_first = index.last_rank[shorter] < index.last_rank[longer]
    return np.where(ends_first, left_of_shorter, left_of_longer)
