"""A run goes on from a reward model, from a merged model and from an adapter, and ends in a kernel that submits."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from postprocess.pipeline import Options, package_recipe
from preprocess.core import ledger
from preprocess.model_input import read_contract
from recipes.pairwise.config.schema import read_recipe
from tests import forked, tiny
from tests.conftest import ROOT
from tests.test_every_architecture import largest_loading_error, rehearse_twelve_rows, write_spec

pytestmark = pytest.mark.slow

HEAD = "base_model.model.score.weight"


def write_recipe(name: str, base, block: dict, **keys):
    """Write a recipe like the demo's, for three steps that hardly move the head."""
    package = {"slug": "pairwise-demo", "quantize": "nf4" if keys.get("load_in_4bit") else "none", "tolerance": 0.3}
    block = {"pairs": "pairs.parquet", "package": package} | block
    keys |= {"base_model": str(base), "max_steps": 3, "learning_rate": 0.001, "bf16": False}
    return tiny.change(ROOT / "recipes/demo.yml", block, Path(f"recipes/{name}.yml"), **keys)


def train(recipe) -> str:
    return forked.train(recipe, {"PAIRWISE_LEDGER": str(ledger.ledger_path())})


def test_three_runs_go_on_from_a_reward_model_to_a_submission(tiny_models, tmp_path, monkeypatch, ledger_file):
    monkeypatch.chdir(tmp_path)
    tiny.pairs_parquet(tmp_path / "pairs.parquet", 40)
    checkpoint = tiny.reward_model(tiny_models("gemma2"), tmp_path / "checkpoint")
    trained_head = load_file(checkpoint / "model.safetensors")["score.weight"]

    # A reward model goes on with its own head; its merged model keeps 16 bits.
    first = write_recipe("first", checkpoint, {"head": "reward"})
    assert "head score: goes on from the base model's" in train(first)
    first_head = load_file("outputs/first/adapter_model.safetensors")[HEAD]
    assert torch.allclose(first_head, trained_head, atol=0.02)
    package_recipe(read_recipe(first), Options(keep_merged=True))

    # Two verdicts need a new head.
    second = write_recipe("second", "outputs/first/merged", {})
    assert "head score: new, because no contract says which verdicts the base model's head has" in train(second)
    assert load_file("outputs/second/adapter_model.safetensors")[HEAD].shape == (2, 64)

    # The same adapter goes on.
    third = write_recipe("third", "outputs/first/merged", {}, lora_model_dir="outputs/second")
    train(third)
    second_head, third_head = (load_file(f"outputs/{run}/adapter_model.safetensors")[HEAD] for run in ("second", "third"))
    assert 0 < (third_head - second_head).abs().max().item() < 0.02
    started_from = read_contract("outputs/third").recorded["started_from"]
    assert (started_from["run"], started_from["first_base_model"]) == ("outputs/second", str(checkpoint))
    trainings = [entry for entry in ledger.read() if entry["event"] == "train"]
    assert [entry["started_from"] and entry["started_from"]["run"] for entry in trainings] == [
        None,
        "outputs/first",
        "outputs/second",
    ]

    # What is served is what was trained, up to the float16 in which the merged model is read again.
    assert largest_loading_error(package_recipe(read_recipe(third))) < 2e-3
    rehearse_twelve_rows(write_spec(tmp_path / "specs/third.yml", "third"), tmp_path)


def test_a_one_label_checkpoint_is_packaged_with_two_verdicts(tiny_models, tmp_path, monkeypatch):
    """In 4 bits too, where transformers does not compare the shapes that it loads."""
    monkeypatch.chdir(tmp_path)
    tiny.pairs_parquet(tmp_path / "pairs.parquet", 40)
    checkpoint = tiny.reward_model(tiny_models("gemma2"), tmp_path / "checkpoint")
    kwargs = {"bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": ["score"]}
    recipe = write_recipe("qlora", checkpoint, {}, adapter="qlora", load_in_4bit=True, bnb_config_kwargs=kwargs)
    train(recipe)
    assert largest_loading_error(package_recipe(read_recipe(recipe))) < 1e-4
