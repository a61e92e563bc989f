"""Pairs that share a key and differ in a label, listed without those that share both.

grouping.py pairs texts of one hash that are in different groups, prefix_filter.py those of one n-gram that
are in different folds. A large group costs next to nothing in either, for its members share the label.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Partners:
    """The partners of each entry: order[start[i] : start[i] + count[i]], each pair under one of its two."""

    # int32 (entries,) each, since there are tens of millions of entries.
    order: np.ndarray  # all entries by key, then by label
    start: np.ndarray
    count: np.ndarray


def find_partners(keys: np.ndarray, labels: np.ndarray) -> Partners:
    """Find for each entry the entries of its key that have a smaller label.

    Args:
        keys: Of each entry (entries,).
        labels: Of each entry (entries,).
    """
    order = np.lexsort((labels, keys)).astype(np.int32)
    is_new_key = _mark_changes(keys[order])
    is_new_label = is_new_key | _mark_changes(labels[order])

    # Partners reach from the first entry of the key to the first one of the label.
    key_start = _repeat_starts(is_new_key)
    label_start = _repeat_starts(is_new_label)

    # Back to the order of entries.
    start = np.empty(len(keys), np.int32)
    start[order] = key_start
    count = np.empty(len(keys), np.int32)
    count[order] = label_start - key_start
    return Partners(order, start, count)


def list_pairs(partners: Partners, entries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """List the pairs of some entries with all their partners: each entry as often as it has partners."""
    counts = partners.count[entries]
    first = np.repeat(entries, counts)

    # The place of each pair among those of its entry: 0, 1, …
    pairs_before = np.cumsum(counts, dtype=np.int64) - counts
    place = np.arange(len(first)) - np.repeat(pairs_before, counts)
    second = partners.order[np.repeat(partners.start[entries], counts) + place]
    return first, second


def _mark_changes(values: np.ndarray) -> np.ndarray:
    """Return for each value whether it differs from the one before it; the first does."""
    is_change = np.ones(len(values), bool)
    is_change[1:] = values[1:] != values[:-1]
    return is_change


def _repeat_starts(is_start: np.ndarray) -> np.ndarray:
    """Return for each place the last one, up to it, that is a start."""
    starts = np.flatnonzero(is_start).astype(np.int32)
    lengths = np.diff(starts, append=len(is_start))
    return np.repeat(starts, lengths)
