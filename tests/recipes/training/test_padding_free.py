"""Without padding, every model has the logits and the gradients that it has of padded batches."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from preprocess.core.errors import UserError
from recipes.pairwise.data.collators import PairCollator
from recipes.pairwise.training import padding_free
from recipes.pairwise.training.heads import replace_head_forward
from recipes.pairwise.training.losses import soft_cross_entropy
from recipes.pairwise.training.trainer import label_token_options
from tests import forked, tiny
from tests.recipes import comparable

TWO = ("model_a", "model_b")
ROWS = [
    {"id": "x", "sequences": [list(range(5, 55)), list(range(60, 67))], "labels": [0.7, 0.3], "weight": 2.0},
    {"id": "y", "sequences": [list(range(9, 40)), [5, 6, 9]], "labels": [0.0, 1.0], "weight": 1.0},
]
# Shorter than the longest sequence, so that some tokens are out of sight.
WINDOW = 16
MODELS = [
    ("gemma2", {"sliding_window": WINDOW}),
    ("llama", {}),
    ("qwen2", {}),
    ("qwen3", {}),
    ("mistral", {"sliding_window": WINDOW}),
    ("phi3", {}),
    ("bert", {}),
    ("modernbert", {"local_attention": 2 * WINDOW}),
    ("modernbert", {"classifier_pooling": "mean"}),
]


def load_classifier(folder, **config):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=2, pad_token_id=0, attn_implementation="sdpa", **config
    )
    return model.eval()


def loss_and_gradients(model, batch, **options):
    """The logits of a batch, and the gradients of all weights by its loss."""
    inputs = dict(batch)
    labels_pov = inputs.pop("labels")
    weight_p = inputs.pop("weight")
    logits = model(**inputs, **options).logits
    soft_cross_entropy(logits.view(labels_pov.shape).float(), labels_pov, weight_p).backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return logits.detach().reshape(labels_pov.shape), gradients


def assert_same(padded, joined):
    assert torch.allclose(padded[0], joined[0], atol=1e-6), (padded[0] - joined[0]).abs().max()
    assert joined[0].std() > 1e-3, "models whose logits are all alike would prove nothing"
    assert padded[1].keys() == joined[1].keys()
    for name, gradient in padded[1].items():
        assert torch.allclose(gradient, joined[1][name], atol=1e-6), name


@pytest.mark.parametrize(("kind", "config"), MODELS)
def test_a_classifier_s_logits_and_gradients_are_those_of_padded_batches(kind, config, tiny_models):
    collator = PairCollator(None, "score", TWO, "both", pad_token_id=0)
    padded = loss_and_gradients(load_classifier(tiny_models(kind), **config), collator(ROWS))

    model = load_classifier(tiny_models(kind), **config)
    padding_free.use_padding_free(model)
    collator = PairCollator(None, "score", TWO, "both", pad_token_id=0, padding_free=True)
    batch = collator(ROWS)
    assert batch["input_ids"].shape == (1, 50 + 7 + 31 + 3)
    assert batch["cu_seq_lens_q"].tolist() == [0, 50, 57, 88, 91]
    assert_same(padded, loss_and_gradients(model, batch))


def test_label_tokens_with_an_adapter_are_read_at_the_end_of_each_sequence(tiny_models):
    def load():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(tiny_models("gemma2"), attn_implementation="sdpa")
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        model = get_peft_model(model, config).eval()
        replace_head_forward(model, (7, 8))
        return model

    collator = PairCollator(None, "label_tokens", TWO, "both", pad_token_id=0)
    padded = loss_and_gradients(load(), collator(ROWS), **label_token_options(padding_free=False))

    model = load()
    padding_free.use_padding_free(model)
    collator = PairCollator(None, "label_tokens", TWO, "both", pad_token_id=0, padding_free=True)
    assert_same(padded, loss_and_gradients(model, collator(ROWS), **label_token_options(padding_free=True)))


def test_a_model_that_computes_attention_by_itself_is_refused(tiny_models):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_models("deberta-v2"), num_labels=2)
    with pytest.raises(UserError, match="DebertaV2ForSequenceClassification computes attention by itself.*; remove the key"):
        padding_free.use_padding_free(model)


def test_a_padding_free_training_ends_with_the_weights_of_a_padded_one(tiny_models, tmp_path):
    weights = []
    for is_padding_free in (False, True):
        folder = tmp_path / f"padding_free_{is_padding_free}"
        recipe = comparable.twin("demo", folder, tiny_models("gemma2"))
        forked.train(tiny.change(recipe, {"padding_free": is_padding_free}))
        weights.append(comparable.trained_weights(folder / "demo"))
    assert comparable.largest_difference(*weights) < comparable.ROUNDING
