"""Focal loss and R-Drop: their values and gradients against references in numpy, and how the trainer adds them."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from preprocess.core.errors import UserError
from recipes.pairwise.training.losses import soft_cross_entropy
from recipes.pairwise.training.regularisers import r_drop_penalty, repeat_batch, require_dropout
from recipes.pairwise.training.trainer import PairwiseTrainer
from tests.recipes.blocks import block_of

STEP = 1e-5  # of the numerical derivatives
# Four pairs in two orders with three verdicts; the first two and the last two are each other's copies.
RANDOM = np.random.default_rng(0)
LOGITS_POV = RANDOM.normal(size=(4, 2, 3))
LABELS_POV = RANDOM.dirichlet([1, 1, 1], size=(4, 2))
WEIGHT_P = np.array([0.5, 2.0, 0.5, 2.0])


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def focal_reference(logits: np.ndarray) -> float:
    log_p = log_softmax(logits)
    losses_po = -(LABELS_POV * (1 - np.exp(log_p)) ** 1.5 * log_p).sum(axis=-1)
    return float((losses_po.mean(axis=1) * WEIGHT_P).mean())


def r_drop_reference(logits: np.ndarray) -> float:
    first, second = np.split(log_softmax(logits), 2)
    divergences_po = ((np.exp(first) - np.exp(second)) * (first - second)).sum(axis=-1) / 2
    return float((divergences_po.mean(axis=1) * WEIGHT_P[:2]).mean())


def numerical_gradient(function, values: np.ndarray) -> np.ndarray:
    gradient = np.zeros_like(values)
    for place in np.ndindex(values.shape):
        change = np.zeros_like(values)
        change[place] = STEP
        gradient[place] = (function(values + change) - function(values - change)) / (2 * STEP)
    return gradient


def focal_loss(logits: torch.Tensor) -> torch.Tensor:
    return soft_cross_entropy(logits, torch.tensor(LABELS_POV), torch.tensor(WEIGHT_P), focal_gamma=1.5)


def r_drop_loss(logits: torch.Tensor) -> torch.Tensor:
    return r_drop_penalty(logits, torch.tensor(WEIGHT_P))


@pytest.mark.parametrize(("loss", "reference"), [(focal_loss, focal_reference), (r_drop_loss, r_drop_reference)])
def test_value_and_gradient_are_those_of_a_reference(loss, reference):
    logits = torch.tensor(LOGITS_POV, dtype=torch.float32, requires_grad=True)
    value = loss(logits)
    value.backward()
    assert value.item() == pytest.approx(reference(LOGITS_POV), rel=1e-5)
    assert logits.grad.numpy() == pytest.approx(numerical_gradient(reference, LOGITS_POV), abs=1e-5)


def test_focal_loss_stays_finite_where_the_model_is_sure():
    logits = torch.tensor([[[200.0, 0.0]]], requires_grad=True)
    loss = soft_cross_entropy(logits, torch.tensor([[[0.9, 0.1]]]), torch.ones(1), focal_gamma=0.5)
    loss.backward()
    assert loss.item() == pytest.approx(20.0)
    assert torch.isfinite(logits.grad).all()


class Scorer(nn.Module):
    """Scores a sequence by its token ids alone; in training, the second half of a batch has other logits."""

    def forward(self, input_ids):
        logits = input_ids[:, :2].float()
        if self.training:
            logits = logits * torch.linspace(1, 2, len(logits)).round().unsqueeze(1)
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize(
    ("is_training", "expected"),
    # Sigmoids of 1 and 2, and their cross-entropies; in training with gamma 1, and with 3 times the divergence of the two.
    [(False, 0.313262), (True, (0.313262 * 0.268941 + 0.126928 * 0.119203) / 2 + 3 * (0.880797 - 0.731059) * (2 - 1) / 2)],
)
def test_the_trainer_adds_them_in_training_only(is_training, expected):
    trainer = PairwiseTrainer.__new__(PairwiseTrainer)
    trainer.block = block_of(focal_gamma=1.0, r_drop=3.0)
    batch = {"input_ids": torch.tensor([[1, 0]]), "labels": torch.tensor([[[1.0, 0.0]]]), "weight": torch.ones(1)}
    loss, outputs = trainer.compute_loss(Scorer().train(is_training), batch, return_outputs=True)
    assert loss.item() == pytest.approx(expected, abs=1e-5)
    assert len(outputs["logits"]) == (2 if is_training else 1), "predictions are one for each pair"
    assert list(batch) == ["input_ids", "labels", "weight"]


def test_a_repeated_batch_holds_all_pairs_and_then_all_again():
    assert repeat_batch({"weight": torch.tensor([1.0, 2.0])})["weight"].tolist() == [1.0, 2.0, 1.0, 2.0]


class Attention(nn.Module):
    """A decoder's attention, which holds its dropout as a number."""

    def __init__(self, attention_dropout):
        super().__init__()
        self.attention_dropout = attention_dropout


@pytest.mark.parametrize(
    ("layer", "has_dropout"),
    [(nn.Dropout(0.1), True), (nn.Dropout(0.0), False), (Attention(0.1), True), (Attention(0.0), False)],
)
def test_r_drop_is_refused_without_dropout(layer, has_dropout):
    refused = pytest.raises(UserError, match="pairwise.r_drop: the model has no dropout")
    with nullcontext() if has_dropout else refused:
        require_dropout(nn.Sequential(layer))
