"""Which run another one goes on from, and whether its head is kept."""

import json
from contextlib import nullcontext

import pytest
from transformers import BertConfig, LlamaConfig

from preprocess.core.errors import UserError
from preprocess.core.files import sha256
from recipes.pairwise.config.earlier_runs import check_adapter_start, choose_head_start, find_earlier_run, read_earlier_run
from tests.recipes.blocks import block_of

AB, BA = ("model_a", "model_b"), ("model_b", "model_a")


def write_run(folder, started_from=None, **changes):
    """Write the contract of a run, as far as a later one reads it."""
    recorded = {"started_from": started_from} if started_from else {}
    contract = {"head": "score", "verdicts": AB, "base_model": "org/first", "revision": "c0ffee", "recorded": recorded}
    folder.mkdir(parents=True)
    (folder / "contract.json").write_text(json.dumps(contract | changes))
    (folder / "adapter_config.json").write_text(json.dumps({"r": 8, "lora_alpha": 16, "target_modules": ["v_proj", "q_proj"]}))
    return folder


@pytest.mark.parametrize(("below", "is_adapter"), [("merged", False), ("", False), ("", True)])
def test_a_run_is_found_by_its_merged_model_its_weights_and_its_adapter(below, is_adapter, tmp_path):
    run = write_run(tmp_path / "stage1")
    found = find_earlier_run("org/first", str(run)) if is_adapter else find_earlier_run(str(run / below), None)
    assert found.describe() == {
        "run": str(run),
        "contract": sha256(run / "contract.json"),
        "first_base_model": "org/first",
        "first_revision": "c0ffee",
    }


def test_a_chain_of_runs_leads_back_to_the_first_base_model(tmp_path):
    first = read_earlier_run(write_run(tmp_path / "stage1"))
    second = write_run(tmp_path / "stage2", first.describe(), base_model=str(tmp_path / "stage1/merged"), revision=None)
    third = read_earlier_run(second)
    assert (third.base_model, third.first_base_model) == (str(tmp_path / "stage1/merged"), "org/first")


def test_a_base_model_without_a_contract_is_no_run(tmp_path):
    assert find_earlier_run("org/first", None) is None
    with pytest.raises(UserError, match=r"lora_model_dir: .* has no contract.json; name the run folder"):
        find_earlier_run("org/first", str(tmp_path))


@pytest.mark.parametrize(
    ("cfg", "keys", "message"),
    [
        ({}, {}, None),
        ({"adapter": None}, {}, "lora_model_dir: without the key adapter, .* set adapter: lora or qlora"),
        ({"base_model": "org/other"}, {}, "was trained on org/first; set base_model to that"),
        ({}, {"verdicts": BA}, "has the head score for model_a, model_b; set pairwise.head"),
        ({}, {"head": "reward"}, "has the head score for model_a, model_b; set pairwise.head"),
        ({"lora_r": 16}, {}, "lora_r: the recipe says 16, but the adapter in .* has 8"),
        ({"lora_target_modules": ["q_proj"]}, {}, "lora_target_modules: .* has "),
    ],
)
def test_an_adapter_goes_on_only_as_what_it_is(cfg, keys, message, tmp_path):
    earlier = read_earlier_run(write_run(tmp_path / "stage1"))
    cfg = {"adapter": "lora", "base_model": "org/first", "lora_r": 8, "lora_target_modules": ["q_proj", "v_proj"]} | cfg
    with pytest.raises(UserError, match=message) if message else nullcontext():
        check_adapter_start(cfg, block_of(**keys), earlier)


REWARD = LlamaConfig(architectures=["LlamaForSequenceClassification"], num_labels=1)
CLASSIFIER = BertConfig(architectures=["BertForSequenceClassification"], num_labels=2)
CAUSAL = LlamaConfig(architectures=["LlamaForCausalLM"])


@pytest.mark.parametrize(
    ("config", "head", "contract", "has_adapter", "outputs", "reason"),
    [
        (CAUSAL, "score", None, False, None, "the base model has none"),
        (REWARD, "reward", None, False, 1, None),
        (CLASSIFIER, "reward", None, False, 2, "the base model's has 2 outputs, a reward has one"),
        (REWARD, "score", None, False, 1, "no contract says which verdicts the base model's head has"),
        (CLASSIFIER, "score", {"head": "reward"}, False, 2, "no contract says which verdicts the base model's head has"),
        (CLASSIFIER, "score", {"verdicts": BA}, False, 2, "the base model's head has the verdicts model_b, model_a"),
        (CLASSIFIER, "score", {}, False, 2, None),
        (REWARD, "score", {}, True, 1, "the adapter in lora_model_dir replaces it"),
    ],
)
def test_a_head_is_kept_where_it_means_the_same(config, head, contract, has_adapter, outputs, reason, tmp_path):
    earlier = None if contract is None else read_earlier_run(write_run(tmp_path / "stage1", **contract))
    start = choose_head_start(config, block_of(head=head), earlier, has_adapter)
    assert (start.checkpoint_outputs, start.reason_for_new) == (outputs, reason)
