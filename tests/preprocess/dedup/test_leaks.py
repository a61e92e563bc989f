"""The leak report finds every leak, also those that a grouping gone wrong would hide."""

import numpy as np
import polars as pl
import pytest

from preprocess.dedup import leaks as leaks_module
from preprocess.dedup import prefix_filter
from preprocess.dedup.leaks import find_leaks
from tests.preprocess.dedup.test_grouping import exact_jaccard, similar_pairs, texts_with_near_copies


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.95, 1.0])
@pytest.mark.parametrize("at_once", [1, 100, 50_000_000])
def test_with_every_prompt_in_a_fold_of_its_own_it_finds_what_brute_force_finds(monkeypatch, threshold, at_once):
    monkeypatch.setattr(prefix_filter, "MEETINGS_AT_ONCE", at_once)
    monkeypatch.setattr(leaks_module, "ENTRIES_AT_ONCE", at_once)
    texts = texts_with_near_copies(seed=1, families=20)
    leaks = find_leaks(pl.Series(texts), np.arange(len(texts)), threshold)
    assert sorted((leak.first, leak.second) for leak in leaks) == sorted(similar_pairs(texts, threshold))
    assert [leak.similarity for leak in leaks] == sorted((leak.similarity for leak in leaks), reverse=True)
    assert all(leak.similarity == exact_jaccard(texts[leak.first], texts[leak.second]) for leak in leaks)


def test_a_near_copy_leaks_only_from_another_fold():
    question = "what is the tallest mountain on {} continent?"
    texts = [question.format("the"), "something else", question.format("this")]
    assert find_leaks(pl.Series(texts), np.array([0, 0, 0]), 0.7) == []
    (leak,) = find_leaks(pl.Series(texts), np.array([0, 0, 1]), 0.7)
    assert (leak.first, leak.second) == (0, 2)
    assert 0.7 <= leak.similarity < 1


def test_files_outside_of_the_folds_leak_into_folds_but_not_into_each_other():
    leaks = find_leaks(pl.Series(["the same prompt"] * 4), np.array([2, 2, -1, -2]), 0.7)
    assert [(leak.first, leak.second) for leak in leaks] == [(0, 2), (0, 3)]


@pytest.mark.parametrize(("places", "leaks"), [([0, -1], 1), ([-1, 0], 1), ([-1, -2], 0)])
def test_a_longer_copy_exactly_at_the_threshold_leaks_whichever_is_held_back(places, leaks):
    texts = ["abcdefghijklmnopqr", "abcdefghijklmnopqrstuvwx"]
    assert [leak.similarity for leak in find_leaks(pl.Series(texts), np.array(places), 0.7)] == [0.7] * leaks
