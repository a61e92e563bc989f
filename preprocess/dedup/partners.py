"""Pairs of entries that share a key and differ in a label, listed without those that share both.

An entry is a number from 0 on, with a key and a label. In grouping.py entries are texts, keys are
hashes, and labels are groups. In prefix_filter.py entries are n-grams of texts, keys are the
n-grams, and labels are folds. A large group costs next to nothing in either, for its members share
the label.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Partners:
    """The partners of each entry: those of entry i are order[start[i] : start[i] + count[i]].

    Each pair is listed once, at its entry with the larger label.
    """

    # int32 (entries,) each, since there are tens of millions of entries.
    order: np.ndarray  # the entries, sorted by key, then by label
    start: np.ndarray  # where in `order` the partners of each entry begin
    count: np.ndarray  # how many partners each entry has


def find_partners(keys: np.ndarray, labels: np.ndarray) -> Partners:
    """Find for each entry its partners: the entries with the same key and a smaller label."""
    # For example, entries 0 and 3 have one partner here, entry 2:
    #     entry           0  1  2  3  4
    #     key             7  5  7  7  5
    #     label           2  1  1  2  1
    #
    #     order           1  4  2  0  3      the entries by key, then by label
    #     their key       5  5  7  7  7
    #     their label     1  1  1  2  2
    #     key_start       0  0  2  2  2      where in `order` the key begins
    #     label_start     0  0  2  3  3      where the label begins within the key
    #
    # np.lexsort sorts by its last argument first: here by key, and within a key by label.
    order = np.lexsort((labels, keys)).astype(np.int32)
    is_new_key = _mark_changes(keys[order])
    is_new_label = is_new_key | _mark_changes(labels[order])
    key_start = _repeat_starts(is_new_key)
    label_start = _repeat_starts(is_new_label)

    # What stands between the two starts has the same key and a smaller label. Both arrays so far go
    # by the place in `order`; the result goes by entry.
    start = np.empty(len(keys), np.int32)
    start[order] = key_start
    count = np.empty(len(keys), np.int32)
    count[order] = label_start - key_start
    return Partners(order, start, count)


def list_pairs(partners: Partners, entries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """List the pairs of some entries with all their partners.

    Returns:
        The entry of each pair, and its partner: two arrays (pairs,).
    """
    # For example, entry 8 has three partners, which begin at order[20], and entry 9 has two, at
    # order[40]:
    #     first             8   8   8   9   9
    #     step              0   1   2   0   1      number of the pair among those of its entry
    #     place            20  21  22  40  41      where in `order` the partner stands
    counts = partners.count[entries]
    first = np.repeat(entries, counts)

    pairs_before_entry = np.cumsum(counts, dtype=np.int64) - counts
    step = np.arange(len(first)) - np.repeat(pairs_before_entry, counts)
    place = np.repeat(partners.start[entries], counts) + step
    second = partners.order[place]
    return first, second


def _mark_changes(values: np.ndarray) -> np.ndarray:
    """Return for each value whether it differs from the one before it; the first one does."""
    is_change = np.ones(len(values), bool)
    is_change[1:] = values[1:] != values[:-1]
    return is_change


def _repeat_starts(is_start: np.ndarray) -> np.ndarray:
    """Return for each place where its run starts: for the flags 1 0 0 1 0 that is 0 0 0 3 3."""
    starts = np.flatnonzero(is_start).astype(np.int32)
    lengths = np.diff(starts, append=len(is_start))
    return np.repeat(starts, lengths)
