"""MinHash with banding: proposes pairs of texts that may be similar, without comparing all with all.

Two signatures agree in a share of their hashes that estimates the Jaccard similarity of the texts. Texts
with an equal band of hashes are compared by their whole signatures (Broder 1997; Leskovec, Rajaraman and
Ullman, Mining of Massive Datasets, chapter 3). grouping.py verifies what this proposes.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from rensa import RMinHash

from preprocess.dedup.ngrams import Track, gram_codes

PERMUTATIONS = 256
SEED = 42

# Accepted probability that two texts exactly at the threshold share no band.
MISS_PROBABILITY = 2e-5
MOST_BAND_ROWS = 32

# How far an estimate may lie below the similarity: five standard deviations with 256 permutations.
ESTIMATE_SLACK = 0.15

# Bounds on memory: texts that are hashed at once, and pairs of signatures that are compared at once.
BATCH_TEXTS = 2048
BATCH_PAIRS = 16_384


def compute_signatures(texts: Sequence[str], track: Track) -> np.ndarray:
    """Compute the MinHash signatures of normalised texts: uint32 (texts, PERMUTATIONS)."""
    signatures = np.zeros((len(texts), PERMUTATIONS), np.uint32)

    for start in track(range(0, len(texts), BATCH_TEXTS), "hashing prompts"):
        batch = texts[start : start + BATCH_TEXTS]
        codes = [gram_codes(text) for text in batch]

        # All codes in one array: those of text i stand at offsets[i]:offsets[i + 1].
        flat_codes = np.concatenate(codes)
        sizes = [len(text_codes) for text_codes in codes]
        offsets = np.append(0, np.cumsum(sizes)).astype(np.uint64)

        matrix = RMinHash.digest_matrix_from_flat_token_hashes(
            flat_codes, offsets, PERMUTATIONS, SEED
        )
        signatures[start : start + len(batch)] = matrix.to_rows()

    return signatures


def count_band_rows(threshold: float) -> int:
    """Return how many hashes a band may have: the more, the fewer texts share one by accident."""
    best = 1
    for rows in range(1, MOST_BAND_ROWS + 1):
        bands = PERMUTATIONS // rows
        miss_probability = (1 - threshold**rows) ** bands
        if miss_probability <= MISS_PROBABILITY:
            best = rows
    return best


def find_candidates(signatures: np.ndarray, threshold: float, track: Track) -> np.ndarray:
    """Find the pairs of texts that may reach a similarity.

    Args:
        signatures: From compute_signatures.
        threshold: The Jaccard similarity, 0.5 to 1.
        track: Shows the progress.

    Returns:
        int64 (candidates, 2): the numbers of the earlier and of the later text, sorted by the later
        one, as if the texts arrived one by one.
    """
    text_count = len(signatures)
    band_rows = count_band_rows(threshold)
    band_starts = range(0, PERMUTATIONS - band_rows + 1, band_rows)
    least_agreement = (threshold - ESTIMATE_SLACK) * PERMUTATIONS

    # A pair is one number, later * text_count + earlier, so that sorting drops duplicates.
    pair_codes = [np.zeros(0, np.int64)]
    for band_start in track(band_starts, "finding prompts that look alike"):
        band = signatures[:, band_start : band_start + band_rows]
        for first, second in _pair_equal_rows(band):
            agreement = (signatures[first] == signatures[second]).sum(axis=1)
            is_candidate = agreement >= least_agreement
            earlier = np.minimum(first, second)[is_candidate]
            later = np.maximum(first, second)[is_candidate]
            pair_codes.append(later * text_count + earlier)

    unique_codes = np.unique(np.concatenate(pair_codes))
    return np.stack([unique_codes % text_count, unique_codes // text_count], axis=1)


def _pair_equal_rows(rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the numbers of all pairs of equal rows of a matrix, at most BATCH_PAIRS at a time."""
    # View each row as one opaque value; equal ones form a bucket.
    rows = np.ascontiguousarray(rows)
    row_bytes = rows.shape[1] * rows.itemsize
    keys = rows.view(np.dtype((np.void, row_bytes))).ravel()
    _, buckets, bucket_sizes = np.unique(keys, return_inverse=True, return_counts=True)

    # Row numbers, bucket after bucket, so that the members of a bucket stand side by side.
    members = np.argsort(buckets, kind="stable")
    buckets = buckets[members]
    largest_bucket = bucket_sizes.max()

    # First all pairs of neighbours, then those two places apart, and so on.
    for distance in range(1, largest_bucket):
        # Smaller buckets have no pairs so far apart.
        has_pairs = bucket_sizes[buckets] > distance
        members = members[has_pairs]
        buckets = buckets[has_pairs]

        is_pair = buckets[distance:] == buckets[:-distance]
        first = members[:-distance][is_pair]
        second = members[distance:][is_pair]
        for start in range(0, len(first), BATCH_PAIRS):
            batch = slice(start, start + BATCH_PAIRS)
            yield first[batch], second[batch]
