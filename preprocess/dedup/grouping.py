"""Groups of prompts that are equal or nearly so: MinHash proposes pairs, exact Jaccard decides.

A group is what pairs at or above the threshold connect, however long the chain: sparing a single link
would put a near-copy into another fold. The root of a group is its earliest prompt, so that prompts that
are added later join a group without renaming it. `preprocess.pairs` calls this.

Only pairs of different groups are compared, some drawn at random first, so that thousands of like prompts
are one group after a few comparisons each. What stays quadratic are prompts that share a band of hashes and
are not similar.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from preprocess.dedup.minhash import (
    PERMUTATIONS,
    SEED,
    Signatures,
    compute_signatures,
    count_band_rows,
    hash_band,
    select_likely,
)
from preprocess.dedup.ngrams import (
    Track,
    fast_jaccard,
    find_first_copies,
    show_nothing,
)
from preprocess.dedup.partners import find_partners, list_pairs

# Pairs are drawn at random as long as more of them than this are united.
LEAST_SHARE_UNITED = 0.02

# Bounds memory: the pairs that are listed at once.
LISTED_PAIRS = 2_000_000


class UnionFind:
    """Disjoint sets of the numbers from 0 to `size` - 1, at first each in a set of its own."""

    def __init__(self, size: int):
        # The parent of a root is the root itself.
        self._parents = np.arange(size)

    def find_root(self, member: int) -> int:
        """Return the number that stands for the set of a member: the smallest in it."""
        parents = self._parents
        while parents[member] != member:
            # Halve the path, so that later searches are short.
            parents[member] = parents[parents[member]]
            member = parents[member]
        return int(member)

    def find_roots(self) -> np.ndarray:
        """Return the roots of all members: int64 (members,)."""
        is_flat = False
        while not is_flat:
            grandparents = self._parents[self._parents]
            is_flat = np.array_equal(grandparents, self._parents)
            self._parents = grandparents
        return self._parents.copy()

    def unite(self, root: int, given_up: int) -> None:
        """Unite the sets of two roots, of which the first is smaller and stays one."""
        self._parents[given_up] = root


@dataclass(frozen=True)
class Groups:
    """Prompts by group. Prompts are named by their position.

    `joined` has groups that existed before a later file joined them: the root that stayed, and the one
    that was given up.
    """

    root: np.ndarray  # int64 (prompts,): the earliest prompt of each prompt's group
    joined: tuple[tuple[int, int], ...]


def group_prompts(
    texts: pl.Series,
    threshold: float,
    file_numbers: Sequence[int] | None = None,
    track: Track = show_nothing,
) -> Groups:
    """Group normalised prompts.

    Args:
        texts: Normalised prompts, in the order in which they were added.
        threshold: Jaccard similarity, 0.5 to 1, from which on two prompts share a group.
        file_numbers: Of each prompt, the number of the file that it is from, in ascending order; None
            where all are from one file.
        track: Shows the progress.

    Returns:
        The root of each prompt's group, and the groups that a later file joined.
    """
    # Equal prompts are compared once: each different text has a number. For example:
    #     prompts            a  b  a  c
    #     first_copies       0  1  0  3     position of the first equal prompt
    #     text_positions     0  1  3        position of each text's first prompt
    #     text_of_prompt     0  1  0  2     number of each prompt's text
    first_copies = find_first_copies(texts)
    text_positions, text_of_prompt = np.unique(first_copies, return_inverse=True)

    # File after file, so that it is known which groups a later one joins.
    grouping = _Grouping(texts.gather(text_positions), threshold, track)
    for text_end in count_texts_by_file(text_positions, file_numbers):
        grouping.add_texts_before(text_end, track)

    # Back from numbers of texts to positions of prompts.
    root_of_text = text_positions[grouping.sets.find_roots()]
    joined = []
    for root, given_up in grouping.joined:
        joined.append((int(text_positions[root]), int(text_positions[given_up])))
    return Groups(root_of_text[text_of_prompt], tuple(joined))


def count_texts_by_file(
    text_positions: np.ndarray, file_numbers: Sequence[int] | None
) -> list[int]:
    """Count for each file the texts that it and those before it have."""
    if file_numbers is None:
        return [len(text_positions)]
    file_of_text = np.asarray(file_numbers)[text_positions]
    _, texts_of_file = np.unique(file_of_text, return_counts=True)
    return np.cumsum(texts_of_file).tolist()


class _Grouping:
    """The groups of texts, to which files are added one by one.

    Attributes:
        sets: The groups, as sets of the texts' numbers.
        joined: Roots of groups that a later file joined: the one that stayed, and the one given up.
    """

    def __init__(self, texts: pl.Series, threshold: float, track: Track):
        self.sets = UnionFind(len(texts))
        self.joined: list[tuple[int, int]] = []
        self._signatures: Signatures = compute_signatures(texts, track)
        self._threshold = threshold
        self._texts = texts
        self._text_count = len(texts)
        self._added = 0
        self._rng = np.random.default_rng(SEED)

        # Pairs that were compared and are not similar. A pair is one number, later * texts + earlier.
        self._unlike = np.zeros(0, np.int64)

    def add_texts_before(self, text_end: int, track: Track) -> None:
        """Add the texts with numbers below `text_end`, and unite those that are similar.

        A text's signature is cut into bands, and each band is hashed to a key. Texts that share a key in
        any band look alike and are compared (see minhash.py).
        """
        hashes = self._signatures.hashes[:text_end]
        band_rows = count_band_rows(self._threshold)
        band_starts = range(0, PERMUTATIONS - band_rows + 1, band_rows)

        # Where most texts of a key are alike, a few partners drawn at random unite them.
        for band_start in track(band_starts, "finding prompts that look alike"):
            self._unite_drawn_pairs(hash_band(hashes, band_start, band_rows))

        # What these left apart is compared in full.
        for band_start in track(band_starts, "comparing prompts that look alike"):
            self._unite_all_pairs(hash_band(hashes, band_start, band_rows))
        self._added = text_end

    def _unite_drawn_pairs(self, keys: np.ndarray) -> None:
        """Unite similar texts of equal keys, as long as a fair share of random pairs is similar."""
        share_united = 1.0
        while share_united > LEAST_SHARE_UNITED:
            first, second = self._draw_pairs(keys)
            pairs_united = self._unite_pairs(first, second)
            share_united = pairs_united / max(len(first), 1)

    def _unite_all_pairs(self, keys: np.ndarray) -> None:
        """Unite all similar texts of equal keys."""
        roots = self.sets.find_roots()[: len(keys)]
        partners = find_partners(keys, roots)
        texts = np.flatnonzero(partners.count)
        if len(texts) == 0:
            return

        # The texts in batches of about LISTED_PAIRS pairs.
        pairs_up_to = np.cumsum(partners.count[texts])
        limits = np.arange(LISTED_PAIRS, pairs_up_to[-1], LISTED_PAIRS)
        batch_ends = np.searchsorted(pairs_up_to, limits)
        for batch in np.split(texts, batch_ends):
            first, second = list_pairs(partners, batch)
            self._unite_pairs(first, second)

    def _draw_pairs(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pair each text with two others of its key at random; leave out pairs within a group."""
        # Sorting by key keeps the random order among equal keys.
        shuffled = self._rng.permutation(len(keys))
        by_key = np.argsort(keys[shuffled], kind="stable")
        order = shuffled[by_key]
        roots = self.sets.find_roots()

        # Each text is paired with the next one.
        first = order[:-1]
        second = order[1:]
        is_pair = (keys[first] == keys[second]) & (roots[first] != roots[second])
        return first[is_pair], second[is_pair]

    def _unite_pairs(self, first: np.ndarray, second: np.ndarray) -> int:
        """Compare pairs of texts exactly, and unite the groups of those that are similar.

        Pairs that are not similar are remembered, and not compared again.

        Args:
            first: The number of one text of each pair.
            second: The number of the other.

        Returns:
            How many of the pairs united two groups.
        """
        unlike = []
        pairs_united = 0
        for pair in self._select_open_pairs(first, second).tolist():
            later, earlier = divmod(pair, self._text_count)
            root = self.sets.find_root(earlier)
            other_root = self.sets.find_root(later)
            # A pair before this one may have connected them.
            if root == other_root:
                continue

            similarity = fast_jaccard(self._texts[earlier], self._texts[later])
            if similarity >= self._threshold:
                self._unite_groups(root, other_root)
                pairs_united += 1
            else:
                unlike.append(pair)

        self._unlike = np.union1d(self._unlike, np.array(unlike, np.int64))
        return pairs_united

    def _unite_groups(self, root: int, other_root: int) -> None:
        """Unite two groups. The root with the smaller number, of the older group, stays one."""
        root, given_up = sorted((root, other_root))
        self.sets.unite(root, given_up)

        # Both groups existed before the file that is being added.
        if given_up < self._added:
            self.joined.append((root, given_up))

    def _select_open_pairs(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Return the pairs that have to be compared exactly, without duplicates.

        A pair is one number, later * texts + earlier.
        """
        earlier = np.minimum(first, second)
        later = np.maximum(first, second)

        # At least one of the two must be new, and texts of one group need not be compared any more.
        has_new_text = later >= self._added
        roots = self.sets.find_roots()
        is_open = has_new_text & (roots[earlier] != roots[later])
        earlier = earlier[is_open]
        later = later[is_open]

        # Most pairs have signatures that rule them out.
        is_likely = select_likely(self._signatures, earlier, later, self._threshold)
        pairs = later[is_likely] * self._text_count + earlier[is_likely]

        # setdiff1d removes duplicates as well.
        return np.setdiff1d(pairs, self._unlike)
