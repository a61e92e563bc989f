"""The plugin inside Axolotl: what it refuses, and what it leaves behind."""

import json
import shutil

import pytest
from safetensors import safe_open

from preprocess.core import ledger
from preprocess.core.files import read_json, sha256
from preprocess.model_input import read_contract
from tests import forked, tiny
from tests.conftest import ROOT


@pytest.fixture
def demo_twin(tiny_models, tmp_path):
    """The demo's twin on forty pairs, with changes to its keys: demo_twin(adapter="qlora")."""
    pairs = tiny.pairs_parquet(tmp_path / "pairs.parquet", 40)

    def write(block: dict | None = None, **changes):
        path = tiny.twin(ROOT / "recipes/demo.yml", tmp_path, tiny_models("gemma2"), pairs)
        return tiny.change(path, block, **changes)

    return write


def last_line(output: str) -> str:
    return output.strip().splitlines()[-1]


def test_a_command_that_would_lose_the_head_is_refused(demo_twin, tmp_path):
    ended = forked.axolotl("merge-lora", demo_twin())
    assert ended.code == 2
    assert last_line(ended.output).startswith("error: axolotl merge-lora: refused, it would lose the head without a word")
    assert not (tmp_path / "demo").exists()


def test_a_template_that_ends_with_the_pad_token_is_refused(demo_twin, tiny_models, tmp_path):
    """Without a pad token of its own a tokenizer pads with <eos>; a template that ends with it would pool the token before."""
    base = shutil.copytree(tiny_models("llama"), tmp_path / "unpadded")
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": None}))
    template = {"start": "<bos>", "turn": "{prompt} {response_a} {response_b}", "end": "<eos>"}
    ended = forked.axolotl("train", demo_twin({"template": template}, base_model=str(base)))
    assert ended.code == 2
    assert last_line(ended.output).startswith("error: ")
    assert "demo.yml: pairwise.template: rows end with '<eos>', the pad token" in last_line(ended.output)


def test_full_fine_tuning_leaves_weights_with_a_head_and_the_soft_cap_in_config_and_contract(demo_twin, tmp_path):
    without_adapter = dict.fromkeys(("adapter", "lora_r", "lora_alpha", "lora_target_modules"))
    forked.train(demo_twin({"softcap": True}, **without_adapter))
    run = tmp_path / "demo"
    with safe_open(run / "model.safetensors", "pt") as tensors:
        assert tensors.get_slice("score.weight").get_shape() == [2, 64]
    records = [record for record in read_json(run / "history.json") if "loss" in record]
    assert [record["step"] for record in records] == [1, 2, 3]
    assert all(record["learning_rate"] >= 0 for record in records)
    contract = read_contract(run)
    assert (contract.softcap, contract.attention) == (True, "eager")
    assert read_json(run / "config.json")["attn_logit_softcapping"] == 50.0


def test_training_again_removes_what_vouched_for_the_old_weights(demo_twin, tmp_path):
    recipe = demo_twin()
    run = tmp_path / "demo"
    run.mkdir()
    vouching = ("contract.json", "metrics.json", "predictions.parquet", "history.json")
    for name in vouching:
        (run / name).write_text("of an earlier run")
    ended = forked.axolotl("train", recipe, learning_rate=1e30)
    assert ended.code == 1
    assert "the gradient is not finite" in ended.output
    assert [name for name in vouching if (run / name).exists()] == []


def test_a_run_says_what_it_is_and_enters_the_ledger_and_nothing_of_wandb(demo_twin, tmp_path, ledger_file):
    recipe = demo_twin()
    wandb = {"WANDB_MODE": "online", "WANDB_API_KEY": "0123456789" * 4, "WANDB_PROJECT": "mine", "WANDB_DIR": str(tmp_path)}
    printed = forked.train(recipe, {"PAIRWISE_LEDGER": str(ledger_file), "HOME": str(tmp_path / "home")} | wandb)
    assert "validation: accuracy " in printed
    assert [line for line in printed.replace(str(tmp_path), "").splitlines() if "wandb" in line.lower()] == []
    assert [path for path in tmp_path.rglob("*wandb*")] == []

    run = tmp_path / "demo"
    assert read_contract(run).attention == "sdpa"
    assert read_json(run / "config.json")["attn_logit_softcapping"] is None
    [entry] = ledger.read()
    metrics = read_json(run / "metrics.json")
    assert (entry["event"], entry["recipe"], entry["run"]) == ("train", str(recipe), str(run))
    assert entry["recipe_sha256"] == sha256(recipe)
    assert entry["contract"] == sha256(run / "contract.json")
    assert (entry["pairs"], entry["pairs_sha256"]) == (str(tmp_path / "pairs.parquet"), sha256(tmp_path / "pairs.parquet"))
    assert (entry["fold"], entry["metrics"]["accuracy"]) == (0, metrics["accuracy"])
    assert entry["metrics"].keys() | {"fold", "pairs_sha256"} == metrics.keys()
