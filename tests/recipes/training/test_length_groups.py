"""A micro-batch that is computed in groups of like lengths has the logits and gradients of the whole."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from recipes.pairwise.data.collators import PairCollator
from recipes.pairwise.training.heads import compute_logits_in_float32
from recipes.pairwise.training.length_groups import compute_logits_by_length, group_by_length
from recipes.pairwise.training.trainer import LABEL_TOKEN_OPTIONS

LENGTHS = [(50, 7), (3, 31), (48, 8)]
ROWS = [{"sequences": [list(range(5, 5 + a)), list(range(9, 9 + b))], "labels": [1, 0], "weight": 1.0} for a, b in LENGTHS]


def test_a_group_holds_sequences_that_are_at_most_an_eighth_shorter_than_its_longest():
    assert group_by_length([80, 7, 70, 8, 69, 80]) == [[0, 5, 2], [4], [3, 1]]


@pytest.mark.parametrize(("kind", "head"), [("bert", "reward"), ("gemma2", "label_tokens")])
def test_logits_and_gradients_are_those_of_the_whole_batch(kind, head, tiny_models):
    torch.manual_seed(0)
    if head == "reward":
        model = AutoModelForSequenceClassification.from_pretrained(tiny_models(kind), num_labels=1)
        options = {}
    else:
        model = AutoModelForCausalLM.from_pretrained(tiny_models(kind))
        compute_logits_in_float32(model, label_token_ids=(20, 21))
        options = LABEL_TOKEN_OPTIONS
    model.eval()
    batch = PairCollator(None, head, ("model_a", "model_b"), "both", pad_token_id=0)(ROWS)
    del batch["labels"], batch["weight"]

    logits_whole = model(**batch, **options).logits
    logits_grouped = compute_logits_by_length(model, batch, options)
    assert logits_whole.std() > 1e-3
    assert torch.allclose(logits_whole, logits_grouped, atol=1e-6)

    gradients_whole = compute_gradients(model, logits_whole)
    gradients_grouped = compute_gradients(model, logits_grouped)
    largest = gradients_whole.abs().max()
    assert (gradients_whole - gradients_grouped).abs().max() < 1e-6 * largest


def compute_gradients(model, logits):
    """The gradients of all weights by a sum in which each logit counts differently."""
    model.zero_grad()
    factors = torch.arange(1.0, 1 + logits.numel()).view(logits.shape)
    (logits * factors).sum().backward()
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    return torch.cat([gradient.flatten() for gradient in gradients])
