"""What each head makes of a row: its batches, its targets, its contract, its loss."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from preprocess.core.errors import UserError
from recipes.pairwise.config.schema import PairwiseBlock
from recipes.pairwise.contract import find_label_tokens, new_contract
from recipes.pairwise.data import datasets
from recipes.pairwise.data.collators import PairCollator
from recipes.pairwise.tracking import metrics
from recipes.pairwise.training.heads import compute_logits_in_float32
from recipes.pairwise.training.losses import soft_cross_entropy
from recipes.pairwise.training.trainer import label_token_options
from tests import tiny

TWO = ("model_a", "model_b")
ROWS = [
    {"id": "x", "sequences": [[5, 6, 7], [5, 7, 6, 8]], "labels": [0.75, 0.25], "weight": 2.0},
    {"id": "y", "sequences": [[9], [8]], "labels": [0.0, 1.0], "weight": 1.0},
]


def test_label_tokens_are_read_at_the_last_place_of_every_row():
    batch = PairCollator(None, "label_tokens", TWO, "both", pad_token_id=1, pad_to_multiple_of=4)(ROWS)
    assert batch["input_ids"].tolist() == [[1, 5, 6, 7], [5, 7, 6, 8], [1, 1, 1, 9], [1, 1, 1, 8]]
    assert batch["position_ids"].tolist() == [[0, 0, 1, 2], [0, 1, 2, 3], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert batch["labels"].tolist() == [[[0.75, 0.25], [0.25, 0.75]], [[0.0, 1.0], [1.0, 0.0]]]


def test_a_reward_batch_holds_each_response_in_the_order_of_the_verdicts():
    batch = PairCollator(None, "reward", TWO, "both", pad_token_id=1, pad_to_multiple_of=4)(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 1], [5, 7, 6, 8], [9, 1, 1, 1], [8, 1, 1, 1]]
    assert batch["labels"].tolist() == [[[0.75, 0.25]], [[0.0, 1.0]]]
    other = PairCollator(None, "reward", ("model_b", "model_a"), "both", pad_token_id=1, pad_to_multiple_of=4)(ROWS)
    assert other["input_ids"].tolist() == [[5, 7, 6, 8], [5, 6, 7, 1], [8, 1, 1, 1], [9, 1, 1, 1]]


def test_the_loss_of_rewards_is_bradley_and_terrys():
    rewards = torch.tensor([2.0, 0.5, -1.0, 1.0])
    labels = torch.tensor([[[1.0, 0.0]], [[0.5, 0.5]]])
    first = math.log(1 + math.exp(-1.5))
    second = (math.log(1 + math.exp(2)) + math.log(1 + math.exp(-2))) / 2
    expected = (first + second) / 2
    assert soft_cross_entropy(rewards.view(labels.shape), labels, torch.ones(2)).item() == pytest.approx(expected, abs=1e-6)


def test_logits_are_float32_though_head_and_autocast_are_bf16():
    model = nn.ModuleDict({"score": nn.Linear(4, 2, bias=False, dtype=torch.bfloat16)})
    weight_vd = torch.tensor([[16.0, 0.0, 0.0, 0.0625], [1.0, 0.0, 0.0, 0.0]])
    model["score"].weight.data = weight_vd.bfloat16()
    compute_logits_in_float32(model)
    with torch.autocast("cpu", torch.bfloat16):
        logits_v = model["score"](torch.ones(4, dtype=torch.bfloat16))
    assert logits_v.tolist() == [16.0625, 1.0]


def test_a_model_without_a_linear_head_is_no_model_to_train():
    with pytest.raises(RuntimeError, match="ModuleDict: no linear layer named score or classifier"):
        compute_logits_in_float32(nn.ModuleDict({"decoder": nn.Linear(4, 2)}))


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]])
def test_only_label_tokens_have_logits_and_they_are_those_of_the_whole_vocabulary(tiny_models, targets):
    model = AutoModelForCausalLM.from_pretrained(tiny_models("gemma2"))
    model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False)).eval()
    inputs = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 10]])}
    all_logits_btv = model(**inputs).logits
    compute_logits_in_float32(model, (20, 30))
    logits_b1v = model(**inputs, **label_token_options(padding_free=False)).logits
    assert torch.allclose(logits_b1v, all_logits_btv[:, -1:, [20, 30]], atol=1e-5)


def test_label_tokens_learn_the_share_of_the_votes(tiny_models):
    model = AutoModelForCausalLM.from_pretrained(tiny_models("llama"))
    compute_logits_in_float32(model, (20, 30))
    row = {"id": "x", "sequences": [[5, 6, 7], [5, 7, 6, 8]], "labels": [0.7, 0.3], "weight": 1.0}
    batch = PairCollator(None, "label_tokens", TWO, "both", pad_token_id=0)([row])
    labels_pov, weight_p = batch.pop("labels"), batch.pop("weight")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
    for _ in range(40):
        logits_pov = model(**batch, **label_token_options(padding_free=False)).logits.view(labels_pov.shape)
        soft_cross_entropy(logits_pov, labels_pov, weight_p).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.allclose(logits_pov.softmax(-1), torch.tensor([[[0.7, 0.3], [0.3, 0.7]]]), atol=0.03)


def test_a_reward_models_second_order_is_its_first():
    both = metrics.probabilities(np.array([[[1.0, 0.0]]]), TWO)
    assert np.allclose(both, [[[0.731059, 0.268941], [0.731059, 0.268941]]], atol=1e-6)


@pytest.fixture(scope="module")
def tokenizer(tiny_models):
    return AutoTokenizer.from_pretrained(tiny_models("gemma2"))


def contract_of(tokenizer, **block):
    block = PairwiseBlock(**{"template": "gemma", "budget_tokens": 200, "package": {"slug": "some-model"}} | block)
    return new_contract(block, tokenizer, attention="sdpa", base_model="m", revision=None, pad_token_id=0)


def test_the_contract_names_the_answers_tokens(tokenizer):
    causal_contract = contract_of(tokenizer, head="label_tokens", verdicts=("model_b", "tie", "model_a"))
    assert [tokenizer.decode([token]) for token in causal_contract.label_token_ids] == ["B", "C", "A"]
    reward_contract = contract_of(tokenizer, head="reward")
    assert (causal_contract.num_labels, reward_contract.num_labels, contract_of(tokenizer).num_labels) == (0, 1, 2)
    assert [len(row["ids"]) for row in reward_contract.golden] == [2] * 20


def test_an_answer_that_runs_into_the_template_is_refused():
    vocabulary = {"x": 0, "y": 1, "A": 2, "B": 3, "xA": 4}
    merges_x_and_a = SimpleNamespace(backend_tokenizer=Tokenizer(models.BPE(vocabulary, [("x", "A")])))

    def block(end: str) -> PairwiseBlock:
        template = {"start": "", "turn": "{prompt}{response_a}{response_b}", "end": end}
        return PairwiseBlock(head="label_tokens", template=template, budget_tokens=128, package={"slug": "some-model"})

    assert find_label_tokens(merges_x_and_a, block("y")) == (2, 3)
    with pytest.raises(UserError, match="the answer 'A' is not one token of its own after 'x'"):
        find_label_tokens(merges_x_and_a, block("x"))


def test_reward_rows_hold_one_sequence_for_each_response(tokenizer, tmp_path):
    frame = datasets.read_pairs(tiny.pairs_parquet(tmp_path / "pairs.parquet", 4))
    rows = datasets.tokenise(frame, tokenizer, contract_of(tokenizer, head="reward"), tmp_path / "rows.arrow")
    text = [tokenizer.decode(ids) for ids in rows["sequences"][0]]
    assert frame["response_a"][0][0] in text[0] and frame["response_b"][0][0] not in text[0]
    assert frame["response_b"][0][0] in text[1] and frame["response_a"][0][0] not in text[1]
