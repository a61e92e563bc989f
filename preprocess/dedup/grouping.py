"""Groups of prompts that are equal or nearly so: MinHash proposes pairs, exact Jaccard decides.

A group is what pairs at or above the threshold connect, however long the chain: sparing a single link
would put a near-copy into another fold. The root of a group is its earliest prompt, so that prompts that
are added later join a group without renaming it. `preprocess.pairs` calls this.

Only pairs of different groups are compared, some drawn at random first, so that thousands of like prompts
are one group after a few comparisons each. What stays quadratic are prompts that share a band of hashes and
are not similar.
"""

import numpy as np
import polars as pl

from preprocess.core.progress import show_progress
from preprocess.dedup.minhash import (
    PERMUTATIONS,
    SEED,
    Signatures,
    compute_signatures,
    count_band_rows,
    hash_band,
    select_likely,
)
from preprocess.dedup.ngrams import find_first_copies, jaccard
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
        """Return the root of a member's set: its smallest number, which stands for the set."""
        parents = self._parents
        while parents[member] != member:
            # Halve the path, so that later searches are short.
            parents[member] = parents[parents[member]]
            member = parents[member]
        return int(member)

    def find_roots(self) -> np.ndarray:
        """Return the roots of all members: int64 (members,)."""
        # Replace each parent by its own parent, until all parents are roots.
        is_flat = False
        while not is_flat:
            grandparents = self._parents[self._parents]
            is_flat = np.array_equal(grandparents, self._parents)
            self._parents = grandparents
        return self._parents.copy()

    def unite(self, root: int, given_up: int) -> None:
        """Unite the sets of two roots: `root`, the smaller one, becomes the root of both."""
        self._parents[given_up] = root


def group_prompts(texts: pl.Series, threshold: float) -> np.ndarray:
    """Group normalised prompts.

    Args:
        texts: Normalised prompts, in the order in which they were added.
        threshold: Jaccard similarity, 0.5 to 1, from which on two prompts share a group.

    Returns:
        The root of each prompt's group, the position of its earliest prompt: int64 (prompts,).
    """
    # Equal prompts are compared once: each different text has a number. For example:
    #     prompts            a  b  a  c
    #     first_copies       0  1  0  3     position of the first equal prompt
    #     text_positions     0  1  3        position of each text's first prompt
    #     text_of_prompt     0  1  0  2     number of each prompt's text
    first_copies = find_first_copies(texts)
    text_positions, text_of_prompt = np.unique(first_copies, return_inverse=True)

    grouping = _Grouping(texts.gather(text_positions), threshold)
    grouping.unite_similar_texts()

    # Back from numbers of texts to positions of prompts.
    root_of_text = text_positions[grouping.sets.find_roots()]
    return root_of_text[text_of_prompt]


class _Grouping:
    """The groups of texts: `sets` has them as sets of the texts' numbers."""

    def __init__(self, texts: pl.Series, threshold: float):
        self.sets = UnionFind(len(texts))
        self._signatures: Signatures = compute_signatures(texts)
        self._threshold = threshold
        self._texts = texts
        self._text_count = len(texts)
        self._rng = np.random.default_rng(SEED)

        # Pairs that were compared and are not similar. A pair is one number, later * texts +
        # earlier: of 100 texts, 12 and 7 are the pair 1207.
        self._unlike = np.zeros(0, np.int64)

    def unite_similar_texts(self) -> None:
        """Unite the texts that are similar.

        A text's signature is cut into bands, and each band is hashed to a key. Texts that share a key in
        any band look alike and are compared (see minhash.py).
        """
        # Only whole bands: 256 hashes in bands of 9 begin at 0, 9, …, 243, and the last four are
        # left out.
        band_rows = count_band_rows(self._threshold)
        latest_start = PERMUTATIONS - band_rows
        band_starts = range(0, latest_start + 1, band_rows)

        # Where most texts of a key are alike, a few partners drawn at random unite them.
        for band_start in show_progress(band_starts, "finding prompts that look alike"):
            keys = hash_band(self._signatures.hashes, band_start, band_rows)
            self._unite_drawn_pairs(keys)

        # What these left apart is compared in full.
        for band_start in show_progress(band_starts, "comparing prompts that look alike"):
            keys = hash_band(self._signatures.hashes, band_start, band_rows)
            self._unite_all_pairs(keys)

    def _unite_drawn_pairs(self, keys: np.ndarray) -> None:
        """Draw random pairs of texts that have equal keys, and unite those that are similar.

        Draw again for as long as more than LEAST_SHARE_UNITED of the drawn pairs unite two groups.
        """
        share_united = 1.0
        while share_united > LEAST_SHARE_UNITED:
            first, second = self._draw_pairs(keys)
            if len(first) == 0:
                return
            pairs_united = self._unite_pairs(first, second)
            share_united = pairs_united / len(first)

    def _unite_all_pairs(self, keys: np.ndarray) -> None:
        """Compare all texts of equal keys that are in different groups, and unite the similar ones."""
        # A text's partners have the same key, and are in a group with a smaller root.
        partners = find_partners(keys, self.sets.find_roots())
        has_partners = partners.count > 0
        if not has_partners.any():
            return

        texts = np.flatnonzero(has_partners)
        for batch in split_into_batches(texts, partners.count[texts]):
            first, second = list_pairs(partners, batch)
            self._unite_pairs(first, second)

    def _draw_pairs(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Draw random pairs of texts that have equal keys and are in different groups.

        Returns:
            The numbers of the first and of the second text of each pair. A text is in two pairs at
            most.
        """
        # Shuffle the texts, then sort them by key; a stable sort keeps the random order within a
        # key. Then neighbours of equal keys are pairs. For example, of the texts 0 to 4:
        #     keys        5  7  5  7  5
        #     shuffled    3  0  4  1  2
        #     by key      0  4  2  3  1      the keys of these are 5 5 5 7 7
        #     pairs       (0, 4), (4, 2), (3, 1), but not (2, 3), whose keys differ
        shuffled = self._rng.permutation(len(keys))
        places_by_key = np.argsort(keys[shuffled], kind="stable")
        by_key = shuffled[places_by_key]
        first = by_key[:-1]
        second = by_key[1:]

        roots = self.sets.find_roots()
        has_equal_keys = keys[first] == keys[second]
        is_in_two_groups = roots[first] != roots[second]
        is_pair = has_equal_keys & is_in_two_groups
        return first[is_pair], second[is_pair]

    def _unite_pairs(self, first: np.ndarray, second: np.ndarray) -> int:
        """Compare pairs of texts exactly, and unite the groups of those that are similar.

        Pairs that are not similar are remembered in `_unlike`, and not compared again.

        Returns:
            How many of the pairs united two groups.
        """
        unlike = []
        pairs_united = 0
        for pair in self._select_pairs_to_compare(first, second).tolist():
            # A pair is one number, later * texts + earlier.
            later, earlier = divmod(pair, self._text_count)
            root = self.sets.find_root(earlier)
            other_root = self.sets.find_root(later)
            # A pair that came before in this loop may have put the two into one group.
            if root == other_root:
                continue

            similarity = jaccard(self._texts[earlier], self._texts[later])
            if similarity >= self._threshold:
                # The older group has the smaller root, which becomes that of both.
                self.sets.unite(min(root, other_root), max(root, other_root))
                pairs_united += 1
            else:
                unlike.append(pair)

        self._unlike = np.union1d(self._unlike, np.array(unlike, np.int64))
        return pairs_united

    def _select_pairs_to_compare(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Return those of some pairs that have to be compared exactly, without duplicates.

        Returns:
            Each pair as one number, later * texts + earlier: of 100 texts, 12 and 7 are the pair
            1207.
        """
        earlier = np.minimum(first, second)
        later = np.maximum(first, second)

        # Texts of one group need not be compared any more.
        roots = self.sets.find_roots()
        is_in_two_groups = roots[earlier] != roots[later]
        earlier = earlier[is_in_two_groups]
        later = later[is_in_two_groups]

        # The signatures of most pairs show that they are not similar.
        is_likely = select_likely(self._signatures, earlier, later, self._threshold)
        pairs = later[is_likely] * self._text_count + earlier[is_likely]

        # Without the pairs that were found not to be similar; setdiff1d removes duplicates as well.
        return np.setdiff1d(pairs, self._unlike)


def split_into_batches(texts: np.ndarray, pair_counts: np.ndarray) -> list[np.ndarray]:
    """Split texts into batches that have about LISTED_PAIRS pairs each.

    Args:
        texts: The numbers of the texts (texts,); at least one.
        pair_counts: How many pairs each is in (texts,).
    """
    # For example, if LISTED_PAIRS was 10, these texts would make three batches:
    #     pair_counts    4   4 |  4   4 |  9
    #     pairs_up_to    4   8 | 12  16 | 25      a batch begins where 10, 20, … is reached
    pairs_up_to = np.cumsum(pair_counts)
    limits = np.arange(LISTED_PAIRS, pairs_up_to[-1], LISTED_PAIRS)
    batch_starts = np.searchsorted(pairs_up_to, limits)
    return np.split(texts, batch_starts)
