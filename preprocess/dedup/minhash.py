"""MinHash with banding: proposes pairs of texts that may be similar, without comparing all with all.

Two signatures agree in a share of their hashes that estimates the Jaccard similarity of the texts. Texts
with an equal band of hashes are compared by their whole signatures (Broder 1997; Leskovec, Rajaraman and
Ullman, Mining of Massive Datasets, chapter 3). grouping.py chooses the pairs, and verifies what passes here.
"""

from dataclasses import dataclass

import numpy as np
import polars as pl
from rensa import RMinHash

from preprocess.core.progress import show_progress
from preprocess.dedup.ngrams import FACTOR, gram_codes

PERMUTATIONS = 256
SEED = 42

# Accepted probability that two texts exactly at the threshold share no band.
MISS_PROBABILITY = 2e-5
MOST_BAND_ROWS = 32

# How far an estimate may lie below the similarity: five standard deviations with 256 permutations.
ESTIMATE_SLACK = 0.15

LOW_16_BITS = 0xFFFF

# Bounds on memory: texts that are hashed at once, and pairs of signatures that are compared at once.
BATCH_TEXTS = 2048
BATCH_PAIRS = 16_384


@dataclass(frozen=True)
class Signatures:
    """What the search needs to know of texts."""

    # uint16 (texts, PERMUTATIONS): the lowest 16 bits of the hashes, to save memory. Of hashes that
    # differ, one pair in 65,536 has these bits in common.
    hashes: np.ndarray
    gram_counts: np.ndarray  # int32 (texts,): how many different n-grams each has


def compute_signatures(texts: pl.Series) -> Signatures:
    """Compute the MinHash signatures of normalised texts."""
    hashes = np.zeros((len(texts), PERMUTATIONS), np.uint16)
    gram_counts = np.zeros(len(texts), np.int32)

    for start in show_progress(range(0, len(texts), BATCH_TEXTS), "hashing prompts"):
        batch = texts[start : start + BATCH_TEXTS]
        codes = [gram_codes(text) for text in batch]

        # rensa takes the codes of all texts as one array: those of text i stand at
        # offsets[i]:offsets[i + 1]. Texts of 3, 2 and 4 codes have the offsets 0, 3, 5, 9.
        flat_codes = np.concatenate(codes)
        sizes = [len(text_codes) for text_codes in codes]
        offsets = np.append(0, np.cumsum(sizes)).astype(np.uint64)
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(
            flat_codes, offsets, PERMUTATIONS, SEED
        )

        # A row a text, of hashes of 32 bits.
        hashes_32 = np.asarray(matrix.to_rows(), np.uint32)
        stop = start + len(batch)
        hashes[start:stop] = hashes_32 & LOW_16_BITS
        gram_counts[start:stop] = sizes

    return Signatures(hashes, gram_counts)


def count_band_rows(threshold: float) -> int:
    """Return how many hashes a band has, so that similar texts nearly always share a band.

    Texts that share a band are compared. Long bands are shared by fewer texts that are not similar, which
    saves time; but more similar texts then share no band and are missed. So this is the largest number
    of hashes with which a similar pair is missed with a probability of at most MISS_PROBABILITY.
    """
    best = 1
    for rows in range(1, MOST_BAND_ROWS + 1):
        bands = PERMUTATIONS // rows

        # Two texts whose similarity is the threshold have one hash in common with that probability, and
        # all `rows` hashes of a band with its power.
        band_probability = threshold**rows
        miss_probability = (1 - band_probability) ** bands
        if miss_probability <= MISS_PROBABILITY:
            best = rows
    return best


def hash_band(hashes: np.ndarray, start: int, rows: int) -> np.ndarray:
    """Hash a band of each signature, its columns start:start + rows, to a key.

    Returns:
        The keys: uint64 (texts,). Texts have the same key if all hashes of the band are equal.
    """
    # Of a band of three hashes h0, h1 and h2, the key is (h0 F + h1) F + h2 modulo 2**64, where F
    # is FACTOR.
    keys = np.zeros(len(hashes), np.uint64)
    for column in range(start, start + rows):
        keys *= FACTOR
        keys += hashes[:, column]
    return keys


def select_likely(
    signatures: Signatures, first: np.ndarray, second: np.ndarray, threshold: float
) -> np.ndarray:
    """Find out which pairs of texts, first[i] and second[i], may be as similar as the threshold."""
    # By sizes: at best, all n-grams of the smaller text are in the larger one, and the similarity
    # is smaller / larger.
    first_counts = signatures.gram_counts[first]
    second_counts = signatures.gram_counts[second]
    smaller = np.minimum(first_counts, second_counts)
    larger = np.maximum(first_counts, second_counts)
    is_likely = smaller >= threshold * larger

    # By signatures, of those pairs that are left: the share of equal hashes estimates the
    # similarity.
    least_equal = (threshold - ESTIMATE_SLACK) * PERMUTATIONS
    pairs_left = np.flatnonzero(is_likely)
    for start in range(0, len(pairs_left), BATCH_PAIRS):
        batch = pairs_left[start : start + BATCH_PAIRS]
        is_equal = signatures.hashes[first[batch]] == signatures.hashes[second[batch]]
        equal_hashes = is_equal.sum(axis=1)
        is_likely[batch] = equal_hashes >= least_equal
    return is_likely
