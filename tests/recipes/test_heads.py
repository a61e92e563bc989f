"""What each head makes of a row: its batches, its targets, its contract, its loss."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from preprocess.core.errors import UserError
from recipes.pairwise.contract import find_label_tokens
from recipes.pairwise.data import datasets
from recipes.pairwise.data.collators import PairCollator
from recipes.pairwise.tracking import metrics
from recipes.pairwise.training.heads import replace_head_forward
from recipes.pairwise.training.trainer import label_token_options
from tests import tiny
from tests.recipes.blocks import ROWS, TWO, block_of, contract_of

AS_GIVEN, BOTH = [[[0.75, 0.25]], [[0.0, 1.0]]], [[[0.75, 0.25], [0.25, 0.75]], [[0.0, 1.0], [1.0, 0.0]]]


@pytest.mark.parametrize(
    ("head", "verdicts", "orders", "ids", "labels"),
    [
        ("score", TWO, "both", [[5, 6, 7, 1], [5, 7, 6, 8], [9, 1, 1, 1], [8, 1, 1, 1]], BOTH),
        ("score", TWO, "as_given", [[5, 6, 7, 1], [9, 1, 1, 1]], AS_GIVEN),
        # The answer is read at the last place.
        ("label_tokens", TWO, "both", [[1, 5, 6, 7], [5, 7, 6, 8], [1, 1, 1, 9], [1, 1, 1, 8]], BOTH),
        # Each response is read alone.
        ("reward", TWO, "both", [[5, 6, 7, 1], [5, 7, 6, 8], [9, 1, 1, 1], [8, 1, 1, 1]], AS_GIVEN),
        ("reward", TWO[::-1], "both", [[5, 7, 6, 8], [5, 6, 7, 1], [8, 1, 1, 1], [9, 1, 1, 1]], AS_GIVEN),
    ],
)
def test_a_batch_holds_the_sequences_and_labels_of_each_pair_side_by_side(head, verdicts, orders, ids, labels):
    batch = PairCollator(None, head, verdicts, orders, pad_token_id=1, pad_to_multiple_of=4)(ROWS)
    assert batch["input_ids"].tolist() == ids
    assert batch["attention_mask"].tolist() == [[int(token != 1) for token in row] for row in ids]
    assert (batch["labels"].tolist(), batch["weight"].tolist()) == (labels, [2.0, 1.0])
    if head == "label_tokens":
        assert batch["position_ids"].tolist() == [[0, 0, 1, 2], [0, 1, 2, 3], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_logits_are_float32_though_head_and_autocast_are_bf16():
    model = nn.ModuleDict({"score": nn.Linear(4, 2, bias=False, dtype=torch.bfloat16)})
    weight_vd = torch.tensor([[16.0, 0.0, 0.0, 0.0625], [1.0, 0.0, 0.0, 0.0]])
    model["score"].weight.data = weight_vd.bfloat16()
    replace_head_forward(model)
    with torch.autocast("cpu", torch.bfloat16):
        logits_v = model["score"](torch.ones(4, dtype=torch.bfloat16))
    assert logits_v.tolist() == [16.0625, 1.0]


def test_a_model_without_a_linear_head_is_no_model_to_train():
    with pytest.raises(RuntimeError, match="ModuleDict: no linear layer named score or classifier"):
        replace_head_forward(nn.ModuleDict({"decoder": nn.Linear(4, 2)}))


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]])
def test_only_label_tokens_have_logits_and_they_are_those_of_the_whole_vocabulary(tiny_models, targets):
    model = AutoModelForCausalLM.from_pretrained(tiny_models("gemma2"))
    model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False)).eval()
    inputs = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 10]])}
    all_logits_btv = model(**inputs).logits
    replace_head_forward(model, (20, 30))
    logits_b1v = model(**inputs, **label_token_options(padding_free=False)).logits
    assert torch.allclose(logits_b1v, all_logits_btv[:, -1:, [20, 30]], atol=1e-5)


def test_a_reward_models_second_order_is_its_first():
    both = metrics.probabilities(np.array([[[1.0, 0.0]]]), TWO)
    assert np.allclose(both, [[[0.731059, 0.268941], [0.731059, 0.268941]]], atol=1e-6)


@pytest.fixture(scope="module")
def tokenizer(tiny_models):
    return AutoTokenizer.from_pretrained(tiny_models("gemma2"))


def test_the_contract_names_the_answers_tokens(tokenizer):
    causal_contract = contract_of(tokenizer, head="label_tokens", verdicts=("model_b", "tie", "model_a"))
    assert [tokenizer.decode([token]) for token in causal_contract.label_token_ids] == ["B", "C", "A"]
    reward_contract = contract_of(tokenizer, head="reward")
    assert (causal_contract.num_labels, reward_contract.num_labels, contract_of(tokenizer).num_labels) == (0, 1, 2)
    assert [len(row["ids"]) for row in reward_contract.golden] == [2] * 20


def test_an_answer_that_runs_into_the_template_is_refused():
    vocabulary = {"x": 0, "y": 1, "A": 2, "B": 3, "xA": 4}
    merges_x_and_a = SimpleNamespace(backend_tokenizer=Tokenizer(models.BPE(vocabulary, [("x", "A")])))

    template = {"start": "", "turn": "{prompt}{response_a}{response_b}"}
    good, bad = (block_of(head="label_tokens", template=template | {"end": end}) for end in ("y", "x"))
    assert find_label_tokens(merges_x_and_a, good) == (2, 3)
    with pytest.raises(UserError, match="after 'x' the tokenizer has no single token for the answer 'A' alone"):
        find_label_tokens(merges_x_and_a, bad)


def test_reward_rows_hold_one_sequence_for_each_response(tokenizer, tmp_path):
    frame = datasets.read_pairs(tiny.pairs_parquet(tmp_path / "pairs.parquet", 4))
    rows = datasets.tokenise(frame, tokenizer, contract_of(tokenizer, head="reward"), tmp_path / "rows.arrow")
    text = [tokenizer.decode(ids) for ids in rows["sequences"][0]]
    assert frame["response_a"][0][0] in text[0] and frame["response_b"][0][0] not in text[0]
    assert frame["response_b"][0][0] in text[1] and frame["response_a"][0][0] not in text[1]
