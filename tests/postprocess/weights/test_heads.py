"""The head of a causal LM, which may be tied to its embedding."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from postprocess.weights.merge import Form, merge
from preprocess.core.errors import UserError
from tests.postprocess import runs


def test_a_llama_without_its_lm_head_is_refused(copied, opened, tmp_path):
    run = copied("llama", head="label_tokens")
    runs.change_base(run, tmp_path / "base", lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(UserError, match="the head lm_head.weight is neither here nor in an adapter"):
        merge(opened(run), tmp_path / "merged")


TIED = [
    ({"target_modules": ["q_proj", "lm_head"]}, False),
    ({"target_modules": ["q_proj", "embed_tokens"]}, False),
    ({"modules_to_save": ["embed_tokens"]}, False),
    ({"modules_to_save": ["lm_head"]}, False),
    ({"modules_to_save": ["embed_tokens", "lm_head"]}, False),
    ({"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, True),
    ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
    ({}, True),
]


@pytest.mark.parametrize(("lora", "stays_tied"), TIED)
def test_tied_weights_that_were_trained_apart_stay_apart(lora, stays_tied, made, opened, tmp_path):
    run = made("gemma2", head="label_tokens", lora=lora)
    merge(opened(run), tmp_path / "merged", Form(dtype=torch.float32))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="sdpa")
    assert merged.config.tie_word_embeddings is stays_tied
    assert ("lm_head.weight" in load_file(tmp_path / "merged" / "model.safetensors")) is not stays_tied
    ids = torch.tensor([[2, 17, 200, 33, 4, 900]])
    with torch.inference_mode():
        assert (merged(input_ids=ids).logits - run.model(input_ids=ids).logits).abs().max() < 1e-5


def test_tied_weights_that_were_trained_apart_cannot_be_packaged_unmerged(made, opened, tmp_path):
    run = made("gemma2", head="label_tokens", lora={"modules_to_save": ["lm_head"]})
    with pytest.raises(UserError, match="has trained lm_head.weight, which is one tensor with the embedding in this base"):
        merge(opened(run), tmp_path / "merged", Form(keeps_adapter_apart=True))
    assert not list(tmp_path.glob("*merged*"))
