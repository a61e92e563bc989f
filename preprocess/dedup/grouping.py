"""Groups of prompts that are equal or nearly so: MinHash proposes pairs, exact Jaccard decides.

A group is what pairs at or above the threshold connect, however long the chain: sparing a single link
would put a near-copy into another fold. The root of a group is its earliest prompt, so that prompts that
are added later join a group without renaming it. `preprocess.pairs` calls this.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from preprocess.dedup.minhash import compute_signatures, find_candidates
from preprocess.dedup.ngrams import Track, codes_jaccard, gram_codes, show_nothing

# Candidates are sorted by the later text, whose n-grams are needed many times in a row.
CACHED_TEXTS = 4096


class UnionFind:
    """Disjoint sets of the numbers from 0 to `size` - 1, at first each in a set of its own."""

    def __init__(self, size: int):
        # The parent of a root is the root itself.
        self._parents = list(range(size))

    def find_root(self, member: int) -> int:
        """Return the number that stands for the set of a member: the smallest in it."""
        parents = self._parents
        while parents[member] != member:
            # Halve the path, so that later searches are short.
            parents[member] = parents[parents[member]]
            member = parents[member]
        return member

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
    texts: Sequence[str],
    threshold: float,
    ages: Sequence[int] | None = None,
    track: Track = show_nothing,
) -> Groups:
    """Group normalised prompts.

    Args:
        texts: Normalised prompts, in the order in which they were added.
        threshold: Jaccard similarity, 0.5 to 1, from which on two prompts share a group.
        ages: Of each prompt, the number of the file that it is from, which increases; None where it is
            of no interest which groups were joined.
        track: Shows the progress.
    """
    # Most copies never reach the search: only different texts do, in the order of their first positions.
    first_position: dict[str, int] = {}
    for position, text in enumerate(texts):
        first_position.setdefault(text, position)
    unique_texts = list(first_position)
    positions = list(first_position.values())

    signatures = compute_signatures(unique_texts, track)
    candidates = find_candidates(signatures, threshold, track)
    sets, unions = _unite_similar(unique_texts, candidates, threshold, track)

    # Back from numbers of texts to positions of prompts.
    root_by_text = {}
    for number, text in enumerate(unique_texts):
        root_by_text[text] = positions[sets.find_root(number)]
    roots = [root_by_text[text] for text in texts]

    # A group that begins in the file of the text that joins it is not known from an earlier run.
    joined = []
    if ages is not None:
        for root, given_up, joining_text in unions:
            age_of_group = ages[positions[given_up]]
            age_of_text = ages[positions[joining_text]]
            if age_of_group < age_of_text:
                joined.append((positions[root], positions[given_up]))

    root_by_prompt = np.array(roots, dtype=np.int64)
    return Groups(root_by_prompt, tuple(joined))


def _unite_similar(
    texts: list[str], candidates: np.ndarray, threshold: float, track: Track
) -> tuple[UnionFind, list[tuple[int, int, int]]]:
    """Unite the texts of all candidate pairs that are similar indeed.

    Returns:
        The sets; and for each union the root that stayed, the one that was given up, and the later text
        of the similar pair.
    """

    @lru_cache(maxsize=CACHED_TEXTS)
    def codes_of(number: int) -> np.ndarray:
        return gram_codes(texts[number])

    sets = UnionFind(len(texts))
    unions = []
    for earlier, later in track(candidates.tolist(), "comparing prompts that look alike"):
        root, given_up = sorted((sets.find_root(earlier), sets.find_root(later)))
        # Texts that others have connected already need no comparison.
        if root == given_up:
            continue
        if codes_jaccard(codes_of(earlier), codes_of(later)) < threshold:
            continue
        sets.unite(root, given_up)
        unions.append((root, given_up, later))

    return sets, unions
