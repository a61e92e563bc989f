"""Grouping joins exactly what exact Jaccard connects, in any script; brute force is the judge."""

import random

import numpy as np
import pytest

from preprocess.dedup.grouping import _pairs_in, band_rows, group_prompts
from preprocess.dedup.ngrams import codes_jaccard, gram_codes, grams, jaccard, normalise

ALPHABET = list("abcdefgh 河流窗户音乐面包花かわまどنافذة😀")


def texts_with_near_copies(seed: int = 0, families: int = 50) -> list[str]:
    """Random texts of 1 to 120 characters in mixed scripts, each with three copies that a few edits set apart."""
    rng = random.Random(seed)
    texts = []
    for _ in range(families):
        base = rng.choices(ALPHABET, k=rng.randint(1, 120))
        texts.append("".join(base))
        for _ in range(3):
            copy = list(base)
            for _ in range(rng.randint(0, 3)):
                copy[rng.randrange(len(copy))] = rng.choice(ALPHABET)
            texts.append("".join(copy) + "z" * rng.choice([0, 0, 5, 15]))
    rng.shuffle(texts)
    return texts


def alike(texts: list[str], threshold: float) -> set[tuple[int, int]]:
    return {(a, b) for b in range(len(texts)) for a in range(b) if jaccard(texts[a], texts[b]) >= threshold}


def test_all_pairs_in_a_bucket_are_candidates():
    order, edges = np.array([5, 3, 9, 1, *range(100, 170)]), np.array([0, 3, 4, 74])
    found = [pair for one, other in _pairs_in(order, edges) for pair in zip(one.tolist(), other.tolist(), strict=True)]
    assert sorted(found[:3]) == [(3, 9), (5, 3), (5, 9)]
    assert set(found[3:]) == {(a, b) for b in range(100, 170) for a in range(100, b)}


def connected(count: int, edges: set[tuple[int, int]]) -> list[int]:
    root = list(range(count))
    for a, b in sorted(edges):
        low, high = sorted((root[a], root[b]))
        root = [low if one == high else one for one in root]
    return root


@pytest.mark.parametrize("threshold", [0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
def test_groups_are_what_brute_force_connects(threshold):
    texts = texts_with_near_copies()
    expected = connected(len(texts), alike(texts, threshold))
    assert group_prompts(texts, threshold).root.tolist() == expected


def test_a_bucket_of_many_near_copies_is_one_group():
    texts = [f"write an introduction of two hundred words for a chemical company called {at}" for at in range(300)]
    assert set(group_prompts(texts, 0.7).root.tolist()) == {0}


def test_texts_that_share_a_phrase_only_stay_apart():
    texts = ["translate to french: good morning", "translate to french: the ship sails", "translate to german: bread"]
    assert group_prompts(texts, 0.7).root.tolist() == [0, 1, 2]


def test_short_prompts_in_chinese_join_when_equal_after_normalising():
    texts = [normalise([text]) for text in ("你好", "你好 ", "您好", "ＨＥＬＬＯ", "hello", "hi", "hi!")]
    assert group_prompts(texts, 0.7).root.tolist() == [0, 0, 2, 3, 3, 5, 6]


def test_a_later_file_that_joins_two_groups_is_reported():
    one, other, between = "abcdefghijklmnopqrst", "cdefghijklmnopqrstuvwx", "abcdefghijklmnopqrstuvwx"
    alone = group_prompts([one, other], 0.75, [0, 0])
    assert (alone.root.tolist(), alone.joined) == ([0, 1], ())
    later = group_prompts([one, other, between], 0.75, [0, 0, 1])
    assert (later.root.tolist(), later.joined) == ([0, 0, 0], ((0, 1),))
    assert group_prompts([one, other, between], 0.75, [0, 0, 0]).joined == ()


def test_no_prompts_are_no_groups():
    assert len(group_prompts([], 0.7).root) == 0


def test_bands_miss_less_than_two_in_a_hundred_thousand():
    assert {threshold: band_rows(threshold) for threshold in (0.5, 0.6, 0.7, 0.8, 0.9)} == {
        0.5: 3,
        0.6: 3,
        0.7: 4,
        0.8: 6,
        0.9: 9,
    }
    for threshold in np.arange(0.5, 1, 0.01):
        rows = band_rows(threshold)
        assert (1 - threshold**rows) ** (256 // rows) <= 2e-5


def test_hashed_and_literal_n_grams_agree():
    texts = texts_with_near_copies(seed=3, families=20)
    assert jaccard("abcdef", "abcdeg") == 1 / 3
    assert grams("ab") == {"ab"}
    for one, other in zip(texts, texts[1:], strict=False):
        assert len(gram_codes(one)) == len(grams(one))
        assert codes_jaccard(gram_codes(one), gram_codes(other)) == jaccard(one, other)
