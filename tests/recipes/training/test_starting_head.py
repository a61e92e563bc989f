"""The head that a run starts with: the base model's own, or a new one of the run's size."""

import logging

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from preprocess.core.errors import UserError
from recipes.pairwise.config.earlier_runs import HeadStart
from recipes.pairwise.training.heads import start_head
from recipes.pairwise.training.output_layer import replace_output_layer

TRAINED_SPREAD = 0.4


def classifier(folder, outputs: int) -> torch.nn.Module:
    """Build a classifier whose head has large, trained weights."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=outputs, pad_token_id=0)
    head = getattr(model, "score", None) or model.classifier
    torch.nn.init.normal_(head.weight, std=TRAINED_SPREAD)
    return model


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_trained_head_is_kept_or_replaced_by_one_of_the_runs_size(kind, tiny_models, caplog):
    caplog.set_level(logging.INFO, "axolotl.pairwise")
    model = classifier(tiny_models(kind), outputs=1)
    name = "score" if kind == "llama" else "classifier"
    trained_weight = getattr(model, name).weight.detach().clone()

    start_head(model, HeadStart(1, None), outputs=1)
    assert torch.equal(getattr(model, name).weight, trained_weight)
    assert f"head {name}: goes on from the base model's" in caplog.text

    start_head(model, HeadStart(1, "no contract says so"), outputs=2)
    new_weight = getattr(model, name).weight
    assert new_weight.shape == (2, 64) and 0.01 < new_weight.std().item() < 0.03
    assert f"head {name}: new, because no contract says so" in caplog.text
    assert model(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.shape == (1, 2)
    assert model.config.num_labels == 2


def test_the_last_layer_of_a_head_of_several_is_the_one_that_is_replaced():
    config = AutoConfig.for_model(
        "roberta", vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    model = AutoModelForSequenceClassification.from_config(config)
    dense_weight = model.classifier.dense.weight.detach().clone()
    replace_output_layer(model, 3)
    assert model.classifier.out_proj.out_features == 3
    assert torch.equal(model.classifier.dense.weight, dense_weight)


@pytest.mark.parametrize("spoilt", [0.0, float("nan")])
def test_a_head_without_numbers_is_not_gone_on_from(spoilt, tiny_models):
    model = classifier(tiny_models("llama"), outputs=1)
    torch.nn.init.constant_(model.score.weight, spoilt)
    with pytest.raises(UserError, match="the head score.weight has the standard deviation .* nothing to go on from"):
        start_head(model, HeadStart(1, None), outputs=1)
