"""Prefix filtering: finds every pair of texts that may reach a Jaccard similarity, and misses none.

Sort the n-grams of each text from rare to common, and call the first n - ceil(t * n) + 1 of its n n-grams
its prefix. The prefixes of two texts of similarity t or more share an n-gram, so an inverted index of
prefixes finds every such pair (Chaudhuri et al. 2006; Xiao et al. 2008). leaks.py verifies the pairs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import polars as pl

from preprocess.dedup.ngrams import Track, gram_codes
from preprocess.dedup.partners import Partners, find_partners, list_pairs

# N-grams are counted by their lowest bits: a collision makes a rare one look more common, no more. There is
# a bucket for each character of the texts, within these limits.
LEAST_BUCKET_BITS = 22
MOST_BUCKET_BITS = 26

# A rank has the frequency in its highest 16 bits and the n-gram's hash below.
MOST_FREQUENT = np.uint64(0xFFFF)
HASH_BITS = np.uint64(48)
HASH_SHIFT = np.uint64(16)
LEAST_RANK_OF_TWO = np.uint64(2) << HASH_BITS

# Bounds memory: the pairs of texts that meet in one n-gram are listed in batches.
MEETINGS_AT_ONCE = 2_000_000

# Keeps rounding from ruling out a pair exactly at the threshold.
ROUNDING = 1e-9


@dataclass(frozen=True)
class PrefixIndex:
    """An inverted index of the prefixes of texts that are sorted by their number of n-grams.

    An entry is one n-gram in the prefix of one text, unless no other text has the n-gram. Entries are in
    the order of texts: text i has the entries first_entry[i]:first_entry[i + 1].
    """

    # By text.
    size: np.ndarray  # number of n-grams
    prefix_size: np.ndarray  # how many of these are in the prefix
    last_rank: np.ndarray  # rank of the commonest n-gram in the prefix
    first_entry: np.ndarray  # one more than there are texts

    # By entry.
    text: np.ndarray  # the text that it is of
    partners: Partners  # the entries of the same n-gram in other places


@dataclass(frozen=True)
class GramCounts:
    """What the index has to know of all texts before it is built."""

    size: np.ndarray  # int64 (texts,): how many different n-grams each has
    frequency: np.ndarray  # uint32 (buckets,): in how many texts an n-gram of the bucket is


def count_grams(texts: pl.Series, track: Track) -> GramCounts:
    """Count the n-grams of each text, and the texts of each n-gram."""
    characters = texts.str.len_chars().sum()
    bucket_bits = min(max(characters.bit_length(), LEAST_BUCKET_BITS), MOST_BUCKET_BITS)
    frequency = np.zeros(1 << bucket_bits, np.uint32)
    size = np.zeros(len(texts), np.int64)

    steps = track(texts, "leak report: counting n-grams")
    for number, text in enumerate(steps):
        codes = gram_codes(text)
        size[number] = len(codes)
        frequency[find_buckets(codes, frequency)] += 1
    return GramCounts(size, frequency)


def find_buckets(codes: np.ndarray, frequency: np.ndarray) -> np.ndarray:
    """Return the bucket in which each n-gram is counted."""
    return codes & np.uint64(len(frequency) - 1)


def count_prefix(size: np.ndarray, threshold: float) -> np.ndarray:
    """Return how many n-grams are in the prefixes of texts of some sizes."""
    # A similar text shares at least so many n-grams, hence one of the rarest of them.
    least_shared = np.ceil(threshold * size - ROUNDING).astype(np.int64)
    return size - least_shared + 1


def build_prefix_index(
    texts: pl.Series,
    counts: GramCounts,
    places: np.ndarray,
    threshold: float,
    track: Track,
) -> PrefixIndex:
    """Build the index for one threshold.

    Args:
        texts: Normalised texts, those with the fewest n-grams first.
        counts: The sizes of these texts; the frequencies may be of more texts.
        places: Of each text; those of one place are not compared (texts,).
        threshold: The Jaccard similarity.
        track: Shows the progress.
    """
    prefix_size = count_prefix(counts.size, threshold)
    last_rank = np.zeros(len(texts), np.uint64)
    entry_count = np.zeros(len(texts), np.int64)

    # All prefixes in one array, text after text.
    ranks = np.empty(prefix_size.sum(), np.uint64)
    filled = 0
    steps = track(texts, "leak report: collecting rare n-grams")
    for number, text in enumerate(steps):
        prefix = _select_rarest(gram_codes(text), counts.frequency, prefix_size[number])
        last_rank[number] = prefix[-1]

        # An n-gram that was counted once has no partner.
        shared = prefix[prefix >= LEAST_RANK_OF_TWO]
        entry_count[number] = len(shared)
        ranks[filled : filled + len(shared)] = shared
        filled += len(shared)

    text_of_entry = np.repeat(np.arange(len(texts), dtype=np.int32), entry_count)
    return PrefixIndex(
        size=counts.size,
        prefix_size=prefix_size,
        last_rank=last_rank,
        first_entry=np.append(0, np.cumsum(entry_count)),
        text=text_of_entry,
        partners=find_partners(ranks[:filled], places[text_of_entry]),
    )


def _select_rarest(codes: np.ndarray, frequency: np.ndarray, count: int) -> np.ndarray:
    """Return the ranks of the rarest n-grams of a text in any order, but for the largest, which comes last."""
    text_frequency = frequency[find_buckets(codes, frequency)].astype(np.uint64)
    high_bits = np.minimum(text_frequency, MOST_FREQUENT) << HASH_BITS
    ranks = high_bits | (codes >> HASH_SHIFT)
    return np.partition(ranks, count - 1)[:count]


def find_candidates(
    index: PrefixIndex, threshold: float, first_longer: int, track: Track
) -> Iterator[tuple[int, int]]:
    """Find the pairs of texts in different places that may reach a similarity.

    Args:
        index: Built with the same threshold.
        threshold: The Jaccard similarity.
        first_longer: The first text that is of interest as the longer one of a pair.
        track: Shows the progress.

    Yields:
        The longer and the shorter text of each pair.
    """
    text_count = len(index.size)

    ranges = track(_split_texts(index), "leak report: nearest neighbours")
    for start, stop in ranges:
        entries = np.arange(index.first_entry[start], index.first_entry[stop])
        first, second = list_pairs(index.partners, entries)
        first = index.text[first].astype(np.int64)
        second = index.text[second].astype(np.int64)

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


def _split_texts(index: PrefixIndex) -> list[tuple[int, int]]:
    """Return ranges of texts that have about MEETINGS_AT_ONCE meetings with their partners."""
    # How many meetings there are before each entry, and before each text.
    before_entry = np.append(0, np.cumsum(index.partners.count, dtype=np.int64))
    before_text = before_entry[index.first_entry]
    total = before_text[-1]

    # A range ends with the text that reaches the next multiple of the limit.
    limits = np.arange(0, total + MEETINGS_AT_ONCE, MEETINGS_AT_ONCE)
    edges = np.searchsorted(before_text, limits)
    edges = np.minimum(edges, len(index.size))
    return list(pairwise(edges.tolist()))


def _count_beyond_prefix(index: PrefixIndex, longer: np.ndarray, shorter: np.ndarray) -> np.ndarray:
    """Return how many n-grams of each pair may be shared and not be in both prefixes.

    Those stand behind the prefix that ends first, so no more than that text has left.
    """
    left_of_longer = index.size[longer] - index.prefix_size[longer]
    left_of_shorter = index.size[shorter] - index.prefix_size[shorter]
    ends_first = index.last_rank[shorter] < index.last_rank[longer]
    return np.where(ends_first, left_of_shorter, left_of_longer)
