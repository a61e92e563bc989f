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

from preprocess.core.progress import show_progress
from preprocess.dedup.ngrams import gram_codes
from preprocess.dedup.partners import Partners, find_partners, list_pairs

# N-grams are counted in buckets, by the lowest bits of their hashes. Two n-grams in one bucket look
# more common than they are, which costs time, but no pair is missed. Within these limits there are
# at least as many buckets as the texts have characters.
LEAST_BUCKET_BITS = 22
MOST_BUCKET_BITS = 26

# Each n-gram has a rank, a number by which n-grams are sorted from rare to common. Its highest 16
# bits are the n-gram's frequency, its other 48 the highest bits of the n-gram's hash. For example,
# frequency 3 and hash 0x1234_5678_9ABC_DEF0 are the rank 0x0003_1234_5678_9ABC.
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


def count_grams(texts: pl.Series) -> GramCounts:
    """Count how many different n-grams each text has, and in how many texts each n-gram is.

    N-grams are counted in buckets (see find_buckets), so that there are never too many counters.
    """
    bucket_count = choose_bucket_count(texts)
    frequency = np.zeros(bucket_count, np.uint32)
    size = np.zeros(len(texts), np.int64)

    steps = show_progress(texts, "leak report: counting n-grams")
    for number, text in enumerate(steps):
        codes = gram_codes(text)
        size[number] = len(codes)

        # NumPy adds 1 only once to a bucket that is in the list twice. So a text counts once in
        # each of its buckets, however many of its n-grams are in there.
        buckets = find_buckets(codes, frequency)
        frequency[buckets] += 1
    return GramCounts(size, frequency)


def choose_bucket_count(texts: pl.Series) -> int:
    """Return in how many buckets to count n-grams: a power of two, about one a character."""
    # A number of n bits is below 2**n: 5 million has 23 bits, which makes 8.4 million buckets.
    character_count = texts.str.len_chars().sum()
    bits = character_count.bit_length()
    bits = max(bits, LEAST_BUCKET_BITS)
    bits = min(bits, MOST_BUCKET_BITS)
    return 2**bits


def find_buckets(codes: np.ndarray, frequency: np.ndarray) -> np.ndarray:
    """Return the bucket in which each n-gram is counted: the lowest bits of its hash."""
    # The number of buckets is a power of two, e.g. 0b1000. One less, 0b0111, masks the lowest bits.
    mask = np.uint64(len(frequency) - 1)
    return codes & mask


def count_prefix(size: np.ndarray, threshold: float) -> np.ndarray:
    """Return how many n-grams are in the prefixes of texts of some sizes.

    For example, a text of ten n-grams shares at least seven with any text of similarity 0.7. At
    most three are not shared, so that of any four one is shared: the prefix is the four rarest.
    """
    least_shared = np.ceil(threshold * size - ROUNDING).astype(np.int64)
    return size - least_shared + 1


def build_prefix_index(
    texts: pl.Series,
    counts: GramCounts,
    places: np.ndarray,
    threshold: float,
) -> PrefixIndex:
    """Build the index for one threshold.

    Args:
        texts: Normalised texts, those with the fewest n-grams first.
        counts: The sizes of these texts; the frequencies may be of more texts.
        places: The place of each text, e.g. its fold; texts of one place are not compared (texts,).
        threshold: The Jaccard similarity.
    """
    prefix_size = count_prefix(counts.size, threshold)
    last_rank = np.zeros(len(texts), np.uint64)
    entry_count = np.zeros(len(texts), np.int64)

    # The entries of all texts in one array, text after text.
    ranks = np.empty(prefix_size.sum(), np.uint64)
    filled = 0
    steps = show_progress(texts, "leak report: collecting rare n-grams")
    for number, text in enumerate(steps):
        prefix = _select_rarest(gram_codes(text), counts.frequency, prefix_size[number])
        last_rank[number] = prefix[-1]

        # An n-gram that only this text has is no entry, for it finds no other text.
        shared = prefix[prefix >= LEAST_RANK_OF_TWO]
        entry_count[number] = len(shared)
        ranks[filled : filled + len(shared)] = shared
        filled += len(shared)

    # Partners have the same key, the n-gram, and different labels, the places of their texts.
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
    """Return the ranks of the rarest n-grams of a text, of which the last is the largest.

    Args:
        codes: The hashes of the text's n-grams.
        frequency: In how many texts an n-gram of each bucket is.
        count: How many of the n-grams to return.
    """
    buckets = find_buckets(codes, frequency)
    gram_frequency = frequency[buckets].astype(np.uint64)

    # The frequency in the highest 16 bits, the hash in the other 48.
    high_bits = np.minimum(gram_frequency, MOST_FREQUENT) << HASH_BITS
    low_bits = codes >> HASH_SHIFT
    ranks = high_bits | low_bits

    # Cheaper than sorting: partition puts at count - 1 the rank that sorting would put there,
    # before it the smaller ones in any order, and behind it the larger ones.
    partly_sorted = np.partition(ranks, count - 1)
    return partly_sorted[:count]


def find_candidates(
    index: PrefixIndex, threshold: float, first_longer: int
) -> Iterator[tuple[int, int]]:
    """Find the pairs of texts in different places, such as two folds, that may be similar.

    Texts are named by their number in the index, which has them in the order of their sizes.

    Args:
        index: Built with the same threshold. Texts of one place are no partners in it.
        threshold: The Jaccard similarity.
        first_longer: The first text that is of interest as the longer one of a pair.

    Yields:
        The longer and the shorter text of each pair.
    """
    ranges = show_progress(_split_texts(index), "leak report: nearest neighbours")
    for start, stop in ranges:
        longer, shorter = _list_meetings(index, start, stop)

        # Two texts are at most as similar as smaller size / larger size. Besides, the caller wants
        # only pairs with certain longer texts.
        least_size = threshold * index.size[longer] - ROUNDING
        is_large_enough = index.size[shorter] >= least_size
        is_wanted = longer >= first_longer
        is_relevant = is_large_enough & is_wanted

        longer, shorter, shared_in_prefixes = _count_meetings(
            longer[is_relevant], shorter[is_relevant], len(index.size)
        )

        # The similarity of two texts is shared / (total_size - shared). It is the threshold if
        # shared = threshold / (1 + threshold) * total_size: with fewer, a pair is no candidate.
        most_shared = shared_in_prefixes + _count_beyond_prefix(index, longer, shorter)
        total_size = index.size[longer] + index.size[shorter]
        least_shared = threshold / (1 + threshold) * total_size - ROUNDING
        is_candidate = most_shared >= least_shared
        yield from zip(longer[is_candidate].tolist(), shorter[is_candidate].tolist(), strict=True)


def _split_texts(index: PrefixIndex) -> list[tuple[int, int]]:
    """Split the texts into ranges, start and stop, that have about MEETINGS_AT_ONCE meetings each.

    Two texts meet in each n-gram that the prefixes of both have.
    """
    # For example, if MEETINGS_AT_ONCE was 10, four texts of four meetings each would make two
    # ranges:
    #     before_text    0  4  8  12  16      the meetings of all texts before text 0, 1, …; of all
    #     limits         0  10  20
    #     edges          0   3   4            the first text that has so many before it, or the end
    #     ranges         (0, 3), (3, 4)
    before_entry = np.append(0, np.cumsum(index.partners.count, dtype=np.int64))
    before_text = before_entry[index.first_entry]
    total = before_text[-1]

    limits = np.arange(0, total + MEETINGS_AT_ONCE, MEETINGS_AT_ONCE)
    edges = np.searchsorted(before_text, limits)
    edges = np.minimum(edges, len(index.size))
    return list(pairwise(edges.tolist()))


def _list_meetings(index: PrefixIndex, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """List the pairs that the texts start:stop make with the partners of their entries.

    Returns:
        The longer and the shorter text of each pair: int64 (meetings,). A pair is listed once for
        each n-gram that both prefixes have, always at the same one of its texts (see Partners).
    """
    entries = np.arange(index.first_entry[start], index.first_entry[stop])
    first_entries, second_entries = list_pairs(index.partners, entries)
    first = index.text[first_entries].astype(np.int64)
    second = index.text[second_entries].astype(np.int64)

    # Texts are in the order of their sizes: the longer one has the larger number.
    longer = np.maximum(first, second)
    shorter = np.minimum(first, second)
    return longer, shorter


def _count_meetings(
    longer: np.ndarray, shorter: np.ndarray, text_count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Count how often each pair of texts is listed.

    Returns:
        The longer text of each different pair, the shorter one, and how often the pair is listed.
    """
    # A pair is one number: of 100 texts, 12 and 7 are 1207.
    pairs = longer * text_count + shorter
    unique_pairs, meetings = np.unique(pairs, return_counts=True)
    return unique_pairs // text_count, unique_pairs % text_count, meetings


def _count_beyond_prefix(index: PrefixIndex, longer: np.ndarray, shorter: np.ndarray) -> np.ndarray:
    """Return how many n-grams each pair may share at most besides those that are in both prefixes.

    The n-grams of both texts are sorted from rare to common. Take the text whose prefix ends first,
    with the rarer n-gram. If a shared n-gram is in this prefix, it is in the other one as well,
    which reaches further. So all other shared n-grams stand behind this prefix: at most as many as
    stand there.
    """
    behind_longer = index.size[longer] - index.prefix_size[longer]
    behind_shorter = index.size[shorter] - index.prefix_size[shorter]
    shorter_ends_first = index.last_rank[shorter] < index.last_rank[longer]
    return np.where(shorter_ends_first, behind_shorter, behind_longer)
