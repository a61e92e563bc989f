"""Causal LMs that answer with a label token, and reward models, through every stage."""

import copy
import json

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from kaggle_kernels.runtime.models.model import CLASSES, load_model
from kaggle_kernels.runtime.package import read_package
from postprocess.weights.merge import merge
from postprocess.weights.meta_model import head_modules
from preprocess.core.errors import UserError
from tests.postprocess import runs

LM_HEAD = {"target_modules": ["q_proj", "down_proj", "lm_head"]}
VARIANTS = [
    ("gemma2", "label_tokens", {}),
    ("llama", "label_tokens", {}),
    ("llama", "label_tokens", LM_HEAD),
    ("llama", "label_tokens", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    ("gemma2", "reward", {}),
    ("bert", "reward", {}),
]
IDS = torch.tensor([[2, 17, 200, 33, 4, 900], [2, 5, 6, 44, 71, 9]])


def logits(model):
    with torch.inference_mode():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize(("kind", "head", "lora"), VARIANTS, ids=lambda value: value if isinstance(value, str) else None)
def test_the_merged_model_is_the_one_that_peft_merges(kind, head, lora, made, opened, tmp_path):
    run = made(kind, head=head, lora=lora)
    merge(opened(run), tmp_path / "merged", dtype=torch.float32)
    expected = copy.deepcopy(run.model).merge_and_unload()
    found = load_file(tmp_path / "merged" / "model.safetensors")
    tensors = expected.state_dict()
    assert set(tensors) - set(found) == ({"lm_head.weight"} if (kind, head) == ("gemma2", "label_tokens") else set())
    assert [name for name in found if not torch.equal(found[name], tensors[name])] == []
    loaded = CLASSES[head].from_pretrained(tmp_path / "merged", attn_implementation="sdpa").eval()
    assert (logits(loaded) - logits(expected)).abs().max() < 1e-5
    untrained = CLASSES[head].from_pretrained(run.base, attn_implementation="sdpa", num_labels=1, pad_token_id=0).eval()
    assert (logits(untrained) - logits(expected)).abs().max() > 1e-2


def test_a_full_fine_tune_of_a_causal_model_passes_straight_through(made, opened, tmp_path):
    run = made("gemma2", head="label_tokens", full=True)
    merge(opened(run), tmp_path / "merged", dtype=torch.float32)
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert "lm_head.weight" not in found
    assert all(torch.equal(tensor, run.model.state_dict()[name]) for name, tensor in found.items())


def test_a_llama_without_its_lm_head_is_refused(copied, opened, tmp_path):
    run = copied("llama", head="label_tokens")
    weights = load_file(run.base / "model.safetensors")
    base = tmp_path / "base"
    base.mkdir()
    save_file({name: tensor for name, tensor in weights.items() if name != "lm_head.weight"}, base / "model.safetensors")
    (base / "config.json").write_bytes((run.base / "config.json").read_bytes())
    runs.set_base(run, base)
    with pytest.raises(UserError, match="the head lm_head.weight is not there"):
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


@pytest.mark.parametrize(
    ("lora", "stays_tied"), TIED, ids=lambda value: str(value) if isinstance(value, bool) else str(value)[:70]
)
def test_tied_weights_that_were_trained_apart_stay_apart(lora, stays_tied, made, opened, tmp_path):
    run = made("gemma2", head="label_tokens", lora=lora)
    merge(opened(run), tmp_path / "merged", dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="sdpa")
    assert merged.config.tie_word_embeddings is stays_tied
    assert ("lm_head.weight" in load_file(tmp_path / "merged" / "model.safetensors")) is not stays_tied
    ids = torch.tensor([[2, 17, 200, 33, 4, 900]])
    with torch.inference_mode():
        assert (merged(input_ids=ids).logits - run.model(input_ids=ids).logits).abs().max() < 1e-5


def test_tied_weights_that_were_trained_apart_cannot_be_packaged_unmerged(made, opened, tmp_path):
    run = made("gemma2", head="label_tokens", lora={"modules_to_save": ["lm_head"]})
    with pytest.raises(UserError, match="trained lm_head.weight, which is the embedding in this base; only adapter: merged"):
        merge(opened(run), tmp_path / "merged", apart=True)
    assert not list(tmp_path.glob("*merged*"))


def test_a_reward_model_has_one_output_with_a_name(made, opened, tmp_path):
    merge(opened(made("gemma2", head="reward")), tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert (config["architectures"], config["id2label"]) == (["Gemma2ForSequenceClassification"], {"0": "reward"})
    assert head_modules(tmp_path / "merged", "reward") == ["score"]


@pytest.mark.parametrize(("kind", "quantize"), [("llama", "nf4"), ("llama", "int8"), ("gemma2", "nf4"), ("gemma2", "int8")])
def test_a_causal_model_becomes_a_package_with_its_lm_head_in_16_bits(kind, quantize, packaged):
    run, _ = packaged(kind, head="label_tokens", quantize=quantize)
    folder = run.folder / "package"
    tensors = load_file(folder / "model.safetensors")
    assert tensors["model.layers.0.mlp.up_proj.weight"].dtype == {"nf4": torch.uint8, "int8": torch.int8}[quantize]
    assert tensors["model.embed_tokens.weight"].dtype == torch.float16
    assert tensors.get("lm_head.weight", torch.zeros(1).half()).dtype == torch.float16
    assert ("lm_head.weight" in tensors) == (kind == "llama")
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["llm_int8_skip_modules"] == ["lm_head"]
    package = read_package(folder)
    assert package.contract.num_labels == 0
    model = load_model(folder, package.contract, "cpu")
    assert type(model).__name__ == {"llama": "LlamaForCausalLM", "gemma2": "Gemma2ForCausalLM"}[kind]
    lines = {line["model"]: line for line in package.manifest["validation"]["models"]}
    assert lines["trained"]["against_recorded"]["largest"] < 1e-6
    assert 0 < lines["quantised"]["against_trained"]["mean"] < 0.02


def test_a_reward_model_becomes_a_package_whose_orders_agree(packaged):
    run, _ = packaged("gemma2", head="reward", quantize="nf4", tolerance=0.2)
    report = json.loads((run.folder / "agreement.json").read_text())
    assert [line["model"] for line in report["models"]] == ["recorded", "trained", "merged", "quantised"]
    assert {line["flip_rate"] for line in report["models"]} == {0.0}
    assert report["models"][1]["against_recorded"]["largest"] < 1e-6
    assert report["models"][2]["against_trained"]["largest"] < 2e-3
    predictions = pl.read_parquet(run.folder / "predictions.parquet")
    assert np.array_equal(predictions["p_model_a_as_given"], predictions["p_model_a_swapped"])
    assert predictions["p_model_a"].std() > 0.01
    assert read_package(run.folder / "package").contract.num_labels == 1
    assert all(sum(row["probabilities"]) == pytest.approx(1) for row in report["golden"])
