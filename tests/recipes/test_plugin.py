"""The plugin inside Axolotl: what it refuses, and what it leaves behind."""

import json
import shutil

import pytest
import yaml

from preprocess.core import ledger
from preprocess.core.files import sha256
from preprocess.model_input import read_contract
from tests import forked, tiny
from tests.conftest import ROOT


@pytest.fixture
def demo_twin(tiny_models, tmp_path):
    """The demo's twin on forty pairs, with changes to its keys: demo_twin(adapter="qlora")."""
    pairs = tiny.pairs_parquet(tmp_path / "pairs.parquet", 40)

    def write(block: dict | None = None, base: str = "gemma2", **changes):
        path = tiny.twin(ROOT / "recipes/demo.yml", tmp_path, tiny_models(base), pairs)
        values = yaml.safe_load(path.read_text()) | changes
        values["pairwise"] |= block or {}
        path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
        return path

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


def test_full_fine_tuning_of_a_decoder_leaves_weights_with_a_head(demo_twin, tmp_path):
    from safetensors import safe_open

    without_adapter = dict.fromkeys(("adapter", "lora_r", "lora_alpha", "lora_target_modules"))
    ended = forked.axolotl("train", demo_twin(base="qwen2", **without_adapter))
    assert ended.code == 0, ended.output[-3000:]
    run = tmp_path / "demo"
    with safe_open(run / "model.safetensors", "pt") as tensors:
        assert tensors.get_slice("score.weight").get_shape() == [2, 64]
    history = json.loads((run / "history.json").read_text())
    assert [record["step"] for record in history if "loss" in record] == [1, 2, 3]
    assert all(record["learning_rate"] >= 0 for record in history if "loss" in record)


def test_the_soft_cap_is_written_into_config_and_contract(demo_twin, tmp_path):
    ended = forked.axolotl("train", demo_twin({"softcap": True}))
    assert ended.code == 0, ended.output[-3000:]
    contract = read_contract(tmp_path / "demo")
    assert (contract.softcap, contract.attention) == (True, "eager")
    config = json.loads((tmp_path / "demo/config.json").read_text())
    assert config["attn_logit_softcapping"] == 50.0


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


def test_a_run_without_a_soft_cap_says_so_and_enters_the_ledger_with_what_it_was_trained_from(demo_twin, tmp_path, ledger_file):
    recipe = demo_twin()
    ended = forked.axolotl("train", recipe, {"PAIRWISE_LEDGER": str(ledger_file)})
    assert ended.code == 0, ended.output[-3000:]
    assert "validation: accuracy " in ended.output
    assert read_contract(tmp_path / "demo").attention == "sdpa"
    assert json.loads((tmp_path / "demo/config.json").read_text())["attn_logit_softcapping"] is None
    [entry] = ledger.read()
    metrics = json.loads((tmp_path / "demo/metrics.json").read_text())
    assert (entry["event"], entry["recipe"], entry["run"]) == ("train", str(recipe), str(tmp_path / "demo"))
    assert entry["recipe_sha256"] == sha256(recipe)
    assert entry["contract"] == sha256(tmp_path / "demo/contract.json")
    assert (entry["pairs"], entry["pairs_sha256"]) == (str(tmp_path / "pairs.parquet"), sha256(tmp_path / "pairs.parquet"))
    assert (entry["fold"], entry["metrics"]["accuracy"]) == (0, metrics["accuracy"])
    assert entry["metrics"].keys() | {"fold", "pairs_sha256"} == metrics.keys()
