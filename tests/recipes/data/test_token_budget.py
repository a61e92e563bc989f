"""Micro-batches under a token budget: full, balanced over processes, the same again, and each pair counts once."""

import numpy as np
import pytest
import torch

from preprocess.core.errors import UserError
from recipes.pairwise.data.token_budget import StepShape, TokenBudgetBatches
from recipes.pairwise.training.losses import soft_cross_entropy
from recipes.pairwise.training.trainer import weigh_by_pair

BUDGET = 8192


def draw_lengths(rows: int) -> np.ndarray:
    """Draw lengths like those of human votes: many short rows, a tail that is cut at 2,048 tokens."""
    lengths = np.random.default_rng(0).lognormal(6.5, 0.8, rows)
    return np.minimum(lengths.astype(int) + 40, 2048)


def make_batches(lengths: np.ndarray, processes: int, seed: int = 1) -> TokenBudgetBatches:
    shape = StepShape(mean_pairs=2, turns=4, processes=processes, sequences_per_pair=2)
    return TokenBudgetBatches(lengths, shape, BUDGET, seed)


@pytest.mark.parametrize("is_padded", [True, False], ids=["padded", "padding-free, unlike responses"])
@pytest.mark.parametrize("processes", [1, 2, 8])
def test_a_step_costs_at_most_a_twentieth_more_than_its_tokens_shared_evenly(processes, is_padded):
    """All processes wait for the slowest one at each turn, the one with most tokens."""
    share_of_shorter = 1 if is_padded else np.random.default_rng(1).uniform(0.1, 1, 3000)
    tokens_r = (draw_lengths(3000) * (1 + share_of_shorter)).astype(int)
    batches = make_batches(tokens_r / 2, processes)

    tokens_computed = []
    for rows in batches:
        padded_tokens = batches.widths_r[rows].max() * 2 * len(rows)
        tokens_computed.append(padded_tokens if is_padded else tokens_r[rows].sum())
    cost = np.reshape(tokens_computed, (-1, processes)).max(axis=1).sum()
    real_tokens = tokens_r[np.concatenate(list(batches))].sum()
    assert 1.0 <= cost / (real_tokens / processes) <= 1.05


@pytest.mark.parametrize(("rows", "processes"), [(3001, 1), (3001, 8), (5, 2)])
def test_every_step_has_as_many_pairs_and_every_row_is_read_within_the_budget(rows, processes):
    batches = make_batches(draw_lengths(rows), processes)
    micro_batches = list(batches)
    assert len(micro_batches) == len(batches)
    assert set(np.concatenate(micro_batches)) == set(range(rows))
    per_step = 4 * processes
    for start in range(0, len(micro_batches), per_step):
        assert sum(len(batch) for batch in micro_batches[start : start + per_step]) == 8 * processes
    for batch in micro_batches:
        assert max(batches.widths_r[batch]) * len(batch) * 2 <= batches.most_tokens <= BUDGET


def test_the_order_follows_from_the_seed_and_the_epoch():
    lengths = draw_lengths(100)
    batches = make_batches(lengths, 2)
    first_epoch = list(batches)
    batches.epoch = 1
    second_epoch = list(batches)
    assert second_epoch != first_epoch
    again = make_batches(lengths, 2)
    again.epoch = 1
    assert list(again) == second_epoch
    assert list(make_batches(lengths, 2, seed=2)) != first_epoch


def test_long_and_short_rows_are_mixed_in_every_step():
    lengths = draw_lengths(3000)
    micro_batches = list(make_batches(lengths, 1))
    means = [lengths[np.concatenate(micro_batches[start : start + 4])].mean() for start in range(0, 1500, 4)]
    # Random steps of 8 pairs have a standard deviation of 0.25 of the mean; steps grouped by length one of 0.65.
    assert np.std(means) / np.mean(means) < 0.15


def test_a_budget_that_the_longest_rows_exceed_is_refused():
    shape = StepShape(mean_pairs=2, turns=1, processes=1, sequences_per_pair=2)
    with pytest.raises(
        UserError, match="tokens_per_micro_batch: 4,096, but 2 pairs in 1 .* need up to 8,192 tokens in one; raise"
    ):
        TokenBudgetBatches(draw_lengths(3000), shape, 4096, seed=1)


def test_unequal_micro_batches_give_the_gradient_of_one_large_batch():
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 4)
    inputs, labels, weight = torch.randn(12, 8), torch.rand(12, 2, 2).softmax(dim=-1), torch.rand(12) + 0.5

    def gradient(batches: list[dict]) -> torch.Tensor:
        head.zero_grad()
        for batch in batches:
            logits = head(batch["inputs"]).view(-1, 2, 2)
            loss = soft_cross_entropy(logits, batch["labels"], batch["weight"])
            (loss / len(batches)).backward()
        return head.weight.grad.clone()

    micro_batches = []
    for rows in (slice(0, 1), slice(1, 4), slice(4, 12)):
        micro_batches.append({"inputs": inputs[rows], "labels": labels[rows], "weight": weight[rows]})
    weigh_by_pair(micro_batches)
    whole = gradient([{"inputs": inputs, "labels": labels, "weight": weight}])
    assert torch.allclose(gradient(micro_batches), whole, atol=1e-6)
