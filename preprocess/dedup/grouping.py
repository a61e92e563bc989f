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

    def unite(self, root: int, other_root: int) -> None:
        """Unite the sets of two roots; the smaller root stays one."""
        smaller, larger = sorted((root, other_root))
        self._parents[larger] = smaller

    def list_roots(self) -> list[int]:
        """Return the root of every number."""
        return [self.find_root(member) for member in range(len(self._parents))]


@dataclass(frozen=True)
class Groups:
    """Prompts by group. Prompts are named by their position.

    `joined` has groups that existed before a later file joined them: the root that stayed, and the one
    that was given up.
    """

    root: np.ndarray  # int64 (prompts,): the earliest prompt of each prompt's group
    joined: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class _UniqueTexts:
    """Different texts in the order of their first positions: most copies never reach the search."""

    texts: list[str]
    first_position: np.ndarray  # int64 (texts,): where each stands first
    number: np.ndarray  # int64 (prompts,): of the prompt at each position, the number of its text


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
    unique = _number_texts(texts)
    signatures = compute_signatures(unique.texts, track)
    candidates = find_candidates(signatures, threshold, track)
    sets, unions = _unite_similar(unique.texts, candidates, threshold, track)

    # Back from numbers of texts to positions of prompts.
    roots = np.array(sets.list_roots(), dtype=np.int64)
    root_positions = unique.first_position[roots]
    root_by_prompt = root_positions[unique.number]

    joined = []
    if ages is not None:
        joined = _list_joined_groups(unions, unique.first_position.tolist(), ages)
    return Groups(root_by_prompt, tuple(joined))


def _number_texts(texts: Sequence[str]) -> _UniqueTexts:
    number_by_text: dict[str, int] = {}
    first_position = []
    number = np.zeros(len(texts), np.int64)

    for position, text in enumerate(texts):
        if text not in number_by_text:
            number_by_text[text] = len(number_by_text)
            first_position.append(position)
        number[position] = number_by_text[text]

    return _UniqueTexts(
        texts=list(number_by_text),
        first_position=np.array(first_position, dtype=np.int64),
        number=number,
    )


@dataclass(frozen=True)
class _Union:
    """Two roots whose groups were united because of a text, the later one of a similar pair."""

    root: int
    given_up: int
    text: int


def _unite_similar(
    texts: list[str], candidates: np.ndarray, threshold: float, track: Track
) -> tuple[UnionFind, list[_Union]]:
    """Unite the texts of all candidate pairs that are similar indeed; list what was united."""

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
        unions.append(_Union(root, given_up, later))

    return sets, unions


def _list_joined_groups(
    unions: list[_Union], first_position: list[int], ages: Sequence[int]
) -> list[tuple[int, int]]:
    """Return the unions, by positions of prompts, of groups that are older than the joining text."""
    joined = []
    for union in unions:
        root_position = first_position[union.root]
        given_up_position = first_position[union.given_up]
        age_of_text = ages[first_position[union.text]]

        # A group that begins in the text's own file is not known from an earlier run.
        if ages[given_up_position] < age_of_text:
            joined.append((root_position, given_up_position))
    return joined
