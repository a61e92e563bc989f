"""Grouping joins exactly what exact Jaccard connects, in any script; brute force is the judge."""

import random
from itertools import combinations

import numpy as np
import polars as pl
import pytest

from preprocess.dedup import grouping, minhash
from preprocess.dedup.grouping import group_prompts
from preprocess.dedup.ngrams import GRAM, jaccard, normalise

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


def exact_jaccard(first: str, second: str) -> float:
    """The similarity of two texts by the n-grams themselves, of which the search compares hashes."""
    grams = []
    for text in (first, second):
        count = max(len(text) - GRAM + 1, 1)
        grams.append({text[start : start + GRAM] for start in range(count)})
    return len(grams[0] & grams[1]) / len(grams[0] | grams[1])


def similar_pairs(texts: list[str], threshold: float) -> set[tuple[int, int]]:
    pairs = combinations(range(len(texts)), 2)
    return {(first, second) for first, second in pairs if exact_jaccard(texts[first], texts[second]) >= threshold}


def roots_of(count: int, pairs: set[tuple[int, int]]) -> list[int]:
    roots = list(range(count))
    for first, second in sorted(pairs):
        low, high = sorted((roots[first], roots[second]))
        roots = [low if root == high else root for root in roots]
    return roots


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.9, 1.0])
@pytest.mark.parametrize("least_share_united", [0.02, 2], ids=["drawn pairs first", "all pairs"])
def test_groups_are_what_brute_force_connects(monkeypatch, threshold, least_share_united):
    monkeypatch.setattr(grouping, "LEAST_SHARE_UNITED", least_share_united)
    texts = texts_with_near_copies()
    expected = roots_of(len(texts), similar_pairs(texts, threshold))
    assert group_prompts(pl.Series(texts), threshold).tolist() == expected


def test_thousands_of_like_prompts_are_grouped_after_a_few_comparisons_each(monkeypatch):
    ending = "explain each step of the sum to a child of six"
    texts = [f"what is {number} plus {number * 7919 % 10_000}? {ending}" for number in range(3000)]
    compared = []

    def count_comparisons(signatures, first, second, threshold):
        compared.append(len(first))
        return minhash.select_likely(signatures, first, second, threshold)

    monkeypatch.setattr(grouping, "select_likely", count_comparisons)
    assert set(group_prompts(pl.Series(texts), 0.7).tolist()) == {0}
    assert sum(compared) < 20 * len(texts)


def test_short_prompts_in_chinese_join_when_equal_after_normalising():
    texts = [normalise([text]) for text in ("你好", "你好 ", "您好", "ＨＥＬＬＯ", "hello", "hi", "hi!")]
    assert group_prompts(pl.Series(texts), 0.7).tolist() == [0, 0, 2, 3, 3, 5, 6]


def test_bands_miss_less_than_two_in_a_hundred_thousand():
    for threshold in np.arange(0.5, 1, 0.01):
        rows = minhash.count_band_rows(threshold)
        assert (1 - threshold**rows) ** (256 // rows) <= 2e-5


def test_similarity_is_the_share_of_common_n_grams():
    assert jaccard("abcdef", "abcdeg") == exact_jaccard("abcdef", "abcdeg") == 1 / 3
    assert jaccard("ab", "ab") == 1
