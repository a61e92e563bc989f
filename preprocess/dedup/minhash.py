"""MinHash with banding: proposes pairs of texts that may be similar, without comparing all with all.

Two signatures agree in a share of their hashes that estimates the Jaccard similarity of the texts. Texts
with an equal band of hashes are compared by their whole signatures (Broder 1997; Leskovec, Rajaraman and
Ullman, Mining of Massive Datasets, chapter 3). grouping.py chooses the pairs, and verifies what passes here.
"""

from dataclasses import dataclass

import numpy as np
import polars as pl
from rensa import RMinHash

from preprocess.dedup.ngrams import FACTOR, Track, gram_codes

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


@dataclass(frozen=True)
class Signatures:
    """What the search needs to know of texts."""

    # uint16 (texts, PERMUTATIONS): the low bits of the hashes. Two that differ are equal once in 65,536.
    hashes: np.ndarray
    gram_counts: np.ndarray  # int32 (texts,): how many different n-grams each has


def compute_signatures(texts: pl.Series, track: Track) -> Signatures:
    """Compute the MinHash signatures of normalised texts."""
    hashes = np.zeros((len(texts), PERMUTATIONS), np.uint16)
    gram_counts = np.zeros(len(texts), np.int32)

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
        stop = start + len(batch)
        hashes[start:stop] = np.asarray(matrix.to_rows(), np.uint32) & 0xFFFF
        gram_counts[start:stop] = sizes

    return Signatures(hashes, gram_counts)


def count_band_rows(threshold: float) -> int:
    """Return how many hashes a band may have: the more, the fewer texts share one by accident."""
    best = 1
    for rows in range(1, MOST_BAND_ROWS + 1):
        bands = PERMUTATIONS // rows
        miss_probability = (1 - threshold**rows) ** bands
        if miss_probability <= MISS_PROBABILITY:
            best = rows
    return best


def hash_band(hashes: np.ndarray, start: int, rows: int) -> np.ndarray:
    """Hash the columns start:start + rows of signatures: uint64 (texts,), equal where these all are."""
    keys = np.zeros(len(hashes), np.uint64)
    for column in range(start, start + rows):
        keys *= FACTOR
        keys += hashes[:, column]
    return keys


def select_likely(
    signatures: Signatures, first: np.ndarray, second: np.ndarray, threshold: float
) -> np.ndarray:
    """Return for each pair of texts whether it may reach a similarity, by sizes and signatures: bool (pairs,).

    Args:
        signatures: Of all texts.
        first: The number of a text of each pair (pairs,).
        second: The number of the other one (pairs,).
        threshold: The Jaccard similarity, 0.5 to 1.
    """
    # The smaller set of n-grams cannot share more than it has.
    first_counts = signatures.gram_counts[first]
    second_counts = signatures.gram_counts[second]
    larger = np.maximum(first_counts, second_counts)
    is_likely = np.minimum(first_counts, second_counts) >= threshold * larger

    least_agreement = (threshold - ESTIMATE_SLACK) * PERMUTATIONS
    open_pairs = np.flatnonzero(is_likely)
    for start in range(0, len(open_pairs), BATCH_PAIRS):
        batch = open_pairs[start : start + BATCH_PAIRS]
        is_equal = signatures.hashes[first[batch]] == signatures.hashes[second[batch]]
        is_likely[batch] = is_equal.sum(axis=1) >= least_agreement
    return is_likely
