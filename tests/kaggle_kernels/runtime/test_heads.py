"""The three heads give the verdicts' logits: checked against plain forward passes, a row at a time."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from kaggle_kernels.runtime.models.scoring import score
from kaggle_kernels.runtime.models.shortcuts import take_shortcuts
from kaggle_kernels.runtime.package import read_tokenizer
from preprocess import model_input
from preprocess.model_input import Contract, Template
from tests import tiny

TURN = "# Prompt\n{prompt}\n# A\n{response_a}\n# B\n{response_b}\n"
CONTRACT = Contract(
    head="label_tokens",
    verdicts=("model_a", "model_b"),
    template=Template("<bos>", TURN, "A or B? "),
    budget_tokens=200,
    truncation="middle",
    pad_token_id=0,
    attention="sdpa",
    softcap=False,
    base_model="tiny",
    revision=None,
    num_labels=0,
    label_token_ids=(37, 38),
    logit_bias=(),
    model_input_sha256="",
    tokenizer_sha256={},
    golden=(),
    recorded={},
)
REWARD = replace(
    CONTRACT,
    head="reward",
    template=Template("<bos>", "{prompt}<start_of_turn>{response}<end_of_turn>", ""),
    num_labels=1,
    label_token_ids=(),
)
PAIRS = [model_input.pair_from_row(row) for row in tiny.pairs(12, seed=5).to_dicts()]


@pytest.fixture(scope="module")
def causal(tiny_models):
    torch.manual_seed(3)
    folder = tiny_models("gemma2")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.5)
    return model, read_tokenizer(folder)


def test_only_label_tokens_of_the_place_that_is_read_get_logits_and_the_cap_is_the_models_own(causal):
    model, tokenizer = copy.deepcopy(causal[0]), causal[1]
    model.config.final_logit_softcapping = 1.0
    expected = score(model, model_input, tokenizer, CONTRACT, PAIRS, tokens_per_batch=4096)
    take_shortcuts(model, CONTRACT.label_token_ids)
    shapes = set()
    model.get_output_embeddings().register_forward_hook(lambda _, inputs, output: shapes.add((*output.shape[1:], output.dtype)))
    scores = score(model, model_input, tokenizer, CONTRACT, PAIRS, tokens_per_batch=4096)
    assert shapes == {(1, 2, torch.float32)}
    for pair_id, by_order in expected.items():
        assert scores[pair_id]["as_given"] == pytest.approx(by_order["as_given"], abs=1e-5)
        assert 1 / (1 + math.e**2) < by_order["as_given"][0] < 1 / (1 + math.e**-2), "logits lie between -1 and 1"


def test_the_bias_is_added_before_the_answers_are_swapped_back(causal):
    model, tokenizer = causal
    plain = score(model, model_input, tokenizer, CONTRACT, PAIRS)
    biased = score(model, model_input, tokenizer, replace(CONTRACT, logit_bias=(100.0, 0.0)), PAIRS)
    assert all(values["as_given"] == pytest.approx([1, 0]) for values in biased.values())
    assert all(values["swapped"] == pytest.approx([0, 1]) for values in biased.values())
    assert not all(values["as_given"] == pytest.approx([1, 0]) for values in plain.values())


@pytest.mark.parametrize("verdicts", [("model_a", "model_b"), ("model_b", "model_a")])
def test_a_rewards_difference_is_the_logit_in_both_orders(tiny_models, verdicts):
    torch.manual_seed(3)
    folder = tiny_models("gemma2")
    tokenizer = read_tokenizer(folder)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(folder, num_labels=1, pad_token_id=0))
    torch.nn.init.normal_(model.eval().score.weight, std=0.5)
    scores = score(model, model_input, tokenizer, replace(REWARD, verdicts=verdicts), PAIRS[:4], tokens_per_batch=300)
    with torch.inference_mode():
        for pair in PAIRS[:4]:
            a, b = (model(torch.tensor([ids])).logits.item() for ids in model_input.encode(pair, tokenizer, REWARD))
            p_model_a = torch.sigmoid(torch.tensor(a - b)).item()
            expected = {"model_a": p_model_a, "model_b": 1 - p_model_a}
            assert scores[pair.id]["as_given"] == pytest.approx([expected[verdict] for verdict in verdicts], abs=1e-5)
            assert scores[pair.id]["swapped"] == scores[pair.id]["as_given"]
    assert len({round(by_order["as_given"][0], 3) for by_order in scores.values()}) == 4
