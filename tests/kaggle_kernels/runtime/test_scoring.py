"""A row's probabilities depend on that row alone: not on its batch, its place in the file, or the budget."""

import random
from types import SimpleNamespace

import pytest
import torch

from kaggle_kernels.runtime.models.model import load_model
from kaggle_kernels.runtime.models.scoring import (
    BatchScores,
    Request,
    group_by_length,
    make_batches,
    mean_of_orders,
    padded_tokens,
    score,
    score_batch,
)
from kaggle_kernels.runtime.package import read_package
from tests import tiny
from tests.kaggle_kernels.packages import AWKWARD_ROWS


@pytest.fixture(scope="module")
def loaded(package_folder):
    package = read_package(package_folder)
    return package, load_model(package_folder, package.contract, "cpu")


@pytest.fixture(scope="module")
def pairs(loaded):
    rows = tiny.pairs(20, seed=5).to_dicts() + AWKWARD_ROWS
    return [loaded[0].model_input.pair_from_row(row) for row in rows]


def score_all(loaded, pairs, **options):
    package, model = loaded
    return score(model, package.model_input, package.tokenizer, package.contract, pairs, **options)


def test_the_second_order_is_the_swapped_pairs_score_with_a_and_b_swapped_back(three_verdict_folder, pairs):
    package = read_package(three_verdict_folder)
    loaded = package, load_model(three_verdict_folder, package.contract, "cpu")
    scores = score_all(loaded, pairs[:4])
    swapped = score_all(loaded, [package.model_input.swap(pair) for pair in pairs[:4]], orders=["as_given"])
    for pair in pairs[:4]:
        tie, b, a = swapped[pair.id]["as_given"]
        assert scores[pair.id]["swapped"] == pytest.approx([tie, a, b], abs=1e-5)
        assert scores[pair.id]["swapped"] != pytest.approx(scores[pair.id]["as_given"], abs=1e-3)


@pytest.mark.parametrize("tokens_per_batch", [64, 1000, 4096])
def test_the_token_budget_is_never_exceeded_and_no_request_is_lost(tokens_per_batch):
    rng = random.Random(0)
    requests = requests_of([rng.randint(1, 64) for _ in range(500)])
    batches = make_batches(requests, tokens_per_batch)
    assert max(map(padded_tokens, batches)) <= tokens_per_batch
    assert sorted(r.id for batch in batches for r in batch) == sorted(r.id for r in requests)
    lengths = [r.length for batch in batches for r in batch]
    assert lengths == sorted(lengths, reverse=True)


def requests_of(lengths):
    return [Request(str(number), "as_given", ([5] * length,)) for number, length in enumerate(lengths)]


def test_batches_hold_as_many_rows_as_the_budget_allows_and_a_longer_row_alone():
    batches = make_batches(requests_of([10] * 7 + [90]), 30)
    assert [[request.length for request in batch] for batch in batches] == [[90], [10] * 3, [10] * 3, [10]]


def test_lengths_that_are_not_alike_go_through_the_model_apart():
    assert group_by_length([10, 1000, 990, 12, 985]) == [[1, 2, 4], [3, 0]]
    assert group_by_length([1000, 900, 800]) == [[0, 1], [2]], "128 tokens of padding are allowed, 300 are not"
    assert group_by_length([1000, 900, 800], padding_limit=512) == [[0, 1, 2]], "a costly pass is worth more padding"
    rewards = [Request("1", "as_given", ([5] * 1000, [5] * 300)), Request("2", "as_given", ([5] * 990, [5] * 200))]
    assert padded_tokens(rewards) == 2 * 1000 + 2 * 300


def test_probabilities_that_are_not_finite_are_an_error(loaded, pairs):
    package, _ = loaded

    def overflowing(input_ids):
        return SimpleNamespace(logits=torch.full((len(input_ids), 2), float("nan")))

    overflowing.dtype = torch.float16
    with pytest.raises(FloatingPointError, match="row row00000, "):
        score_all((package, overflowing), pairs[:1])


def test_the_model_sees_padding_on_the_right_under_a_mask(loaded):
    package, _ = loaded
    seen = {}

    def model(input_ids, attention_mask):
        seen.update(ids=input_ids.tolist(), mask=attention_mask.tolist())
        return SimpleNamespace(logits=torch.tensor([[0.0, 0.0], [1.0, 1.0]]))

    model.dtype = torch.float32

    batch = [Request("1", "as_given", ([5, 6, 7],)), Request("2", "as_given", ([8],))]
    assert score_batch(model, package.model_input, package.contract, batch, "cpu") == BatchScores([[0.5, 0.5], [0.5, 0.5]])
    assert seen == {"ids": [[5, 6, 7], [8, 0, 0]], "mask": [[1, 1, 1], [1, 0, 0]]}


def test_the_mean_of_orders_is_over_the_orders_that_were_scored():
    scores = {"both": {"as_given": [0.75, 0.25], "swapped": [0.25, 0.75]}, "one": {"as_given": [0.9, 0.1]}, "none": {}}
    assert mean_of_orders(scores) == {"both": [0.5, 0.5], "one": [0.9, 0.1]}
