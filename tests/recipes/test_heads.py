"""What each head makes of a row: its batches, its targets, its contract, its loss."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

from preprocess.core.errors import UserError
from recipes.pairwise.config.schema import PairwiseBlock
from recipes.pairwise.contract import label_tokens, new_contract
from recipes.pairwise.data import datasets
from recipes.pairwise.data.collators import LabelTokenCollator, PairCollator
from recipes.pairwise.tracking import metrics
from recipes.pairwise.training.trainer import soft_cross_entropy
from tests import tiny

TWO = ("model_a", "model_b")
ROWS = [
    {"id": "x", "sequences": [[5, 6, 7], [5, 7, 6, 8]], "labels": [0.75, 0.25], "weight": 2.0},
    {"id": "y", "sequences": [[9], [8]], "labels": [0.0, 1.0], "weight": 1.0},
]
TIES = [{"id": name, "sequences": [[5], [6]], "labels": [0.5, 0.5], "weight": 1.0} for name in "abcdefgh"]


def causal(orders: str = "both", verdicts: tuple = TWO, answers: tuple = (20, 30)) -> LabelTokenCollator:
    return LabelTokenCollator(
        None, "label_tokens", verdicts, orders, pad_token_id=1, pad_to_multiple_of=1, label_token_ids=answers
    )


def test_the_answer_follows_the_sequence_and_is_all_that_is_learnt():
    batch = causal()(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 20, 1], [5, 7, 6, 8, 30], [9, 30, 1, 1, 1], [8, 20, 1, 1, 1]]
    assert batch["labels"].tolist() == [
        [-100, -100, -100, 20, -100],
        [-100, -100, -100, -100, 30],
        [-100, 30, -100, -100, -100],
        [-100, 20, -100, -100, -100],
    ]
    assert batch["attention_mask"].sum(dim=1).tolist() == [4, 5, 2, 2]
    assert sorted(batch) == ["attention_mask", "input_ids", "labels"]


def test_one_order_alone_keeps_its_own_answer():
    assert causal("as_given")(ROWS)["input_ids"].tolist() == [[5, 6, 7, 20], [9, 30, 1, 1]]


def test_a_tie_is_answered_half_and_half_and_favours_no_place():
    answers = causal()(TIES)["input_ids"][:, 1].view(-1, 2)
    assert (answers[:, 0] == answers[:, 1]).all(), "the same place in both orders is the other response"
    assert 0 < (answers[:, 0] == 20).sum() < len(TIES)


def test_a_tie_with_a_token_of_its_own_is_answered_with_it():
    row = {"id": "x", "sequences": [[5], [6]], "labels": [0.2, 0.6, 0.2], "weight": 1.0}
    batch = causal(verdicts=("model_a", "tie", "model_b"), answers=(20, 40, 30))([row])
    assert batch["input_ids"].tolist() == [[5, 40], [6, 40]]


def test_what_is_predicted_from_ends_at_the_last_place():
    batch = PairCollator(None, "label_tokens", TWO, "both", pad_token_id=1, pad_to_multiple_of=4)(ROWS)
    assert batch["input_ids"].tolist() == [[1, 5, 6, 7], [5, 7, 6, 8], [1, 1, 1, 9], [1, 1, 1, 8]]
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

    assert label_tokens(merges_x_and_a, block("y")) == (2, 3)
    with pytest.raises(UserError, match="the answer 'A' is not one token of its own after 'x'"):
        label_tokens(merges_x_and_a, block("x"))


def test_reward_rows_hold_one_sequence_for_each_response(tokenizer, tmp_path):
    frame = datasets.read_pairs(tiny.pairs_parquet(tmp_path / "pairs.parquet", 4))
    rows = datasets.tokenise(frame, tokenizer, contract_of(tokenizer, head="reward"), "rows")
    text = [tokenizer.decode(ids) for ids in rows["sequences"][0]]
    assert frame["response_a"][0][0] in text[0] and frame["response_b"][0][0] not in text[0]
    assert frame["response_b"][0][0] in text[1] and frame["response_a"][0][0] not in text[1]
