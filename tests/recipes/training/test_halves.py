"""A batch that is computed in halves has the logits and the gradients of the whole batch."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from recipes.pairwise.training.halves import split_forward


@pytest.mark.parametrize("kind", ["bert", "gemma2"])
def test_halves_have_the_logits_and_gradients_of_the_whole_batch(kind, tiny_models):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_models(kind), num_labels=1, pad_token_id=0).eval()
    lengths_b = torch.tensor([[5], [90], [12], [7], [33]])
    mask_bt = (torch.arange(96) < lengths_b).long()
    torch.manual_seed(0)
    batch = {"input_ids": torch.randint(10, 500, (5, 96)) * mask_bt, "attention_mask": mask_bt}

    def compute() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        logits = model(**batch).logits
        (logits**2).sum().backward()
        return logits, {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}

    whole_logits, whole_gradients = compute()
    shapes = []
    model.get_input_embeddings().register_forward_hook(lambda layer, ids, output: shapes.append(tuple(output.shape[:2])))
    split_forward(model)
    logits, gradients = compute()
    assert shapes == [(3, 96), (2, 8)]
    assert torch.allclose(logits, whole_logits, atol=1e-6)
    assert gradients.keys() == whole_gradients.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, whole_gradients[name], atol=1e-5, rtol=1e-5), name
