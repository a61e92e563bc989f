"""A recipe with train: false: its run folder made from a base model, and packaged like any other."""

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from kaggle_kernels.runtime.package import read_package
from postprocess.pipeline import make_untrained_run
from postprocess.run_folder import hub_commit
from postprocess.staleness import RECORD
from postprocess.zero_shot.base_model_run import choose_calibration_rows
from preprocess.core import ledger
from preprocess.core.errors import UserError
from preprocess.core.files import sha256
from recipes.pairwise.config.axolotl_keys import PLUGIN
from recipes.pairwise.config.schema import read_recipe
from tests import tiny
from tests.postprocess import runs

STAGES = ["untrained", "merge", "quantise", "scores", "agreement", "package"]


@pytest.fixture(scope="module")
def biased(tiny_models, tmp_path_factory):
    """A tiny Llama that has opinions, and answers A far too often: the row of A in its lm_head is that of B pushed up."""
    folder = tmp_path_factory.mktemp("biased")
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_pretrained(tiny_models("llama"))
    tokens = model_tokens(tiny_models("llama"))
    with torch.no_grad():
        model.model.norm.weight.fill_(1.0)
        model.model.embed_tokens.weight[:, 0] = 3.0  # a dimension that is large whatever the text
        model.lm_head.weight[tokens["B"]].normal_(0, 0.1)
        model.lm_head.weight[tokens["A"]].normal_(0, 0.1)
        model.lm_head.weight[tokens["A"], 0] = model.lm_head.weight[tokens["B"], 0] + 1.0
    model.save_pretrained(folder)
    copy_tokenizer(tiny_models("llama"), folder)
    return folder


def copy_tokenizer(source: Path, folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, folder / name)


def model_tokens(folder: Path) -> dict[str, int]:
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    return {letter: vocabulary[letter] for letter in "AB"}


def recipe_file(folder: Path, base: Path, rows: int = 120, **keys) -> Path:
    """Write a recipe with train: false, and pairs of which a fifth is for validation."""
    folder.mkdir(exist_ok=True)
    tiny.pairs_parquet(folder / "pairs.parquet", rows)
    block = {
        "pairs": str(folder / "pairs.parquet"),
        "head": "label_tokens",
        "train": False,
        "template": "gemma",
        "budget_tokens": 192,
        "package": {"quantize": "nf4", "slug": "tiny-zeroshot", **runs.FEW_ROWS},
    }
    block |= keys.pop("pairwise", {})
    values = {"base_model": str(base), "plugins": [PLUGIN], "output_dir": str(folder / "run"), "pairwise": block}
    path = folder / "recipe.yml"
    path.write_text(yaml.safe_dump(values | keys))
    return path


@pytest.fixture(scope="module")
def packaged(biased, tmp_path_factory):
    recipe = recipe_file(tmp_path_factory.mktemp("zeroshot"), biased)
    printed = runs.succeed(recipe)
    return recipe.parent / "run", recipe, printed


def first_answer(predictions: pl.DataFrame) -> float:
    """The mean probability of the answer that stood first, over both orders."""
    return (predictions["p_model_a_as_given"].mean() + predictions["p_model_b_swapped"].mean()) / 2


def test_a_base_model_larger_than_the_memory_is_told_before_it_is_loaded(biased, tmp_path, monkeypatch):
    monkeypatch.setattr("postprocess.memory.comparison_fit.memory", lambda: (10_000, "the GPU"))
    assert "the base model takes 0.0 GB" in runs.refuse(recipe_file(tmp_path, biased))
    assert not (tmp_path / "run" / "contract.json").exists()


def test_every_stage_is_made_and_the_run_is_whole(packaged):
    run, _, printed = packaged
    assert runs.made_stages(printed) == STAGES
    assert {path.name for path in run.iterdir() if path.is_file()} == {
        *("contract.json", "model_input.py", "metrics.json", "predictions.parquet", "tokenizer.json", "tokenizer_config.json"),
        *("scores.json", "agreement.json", "agreement.parquet", RECORD),
    }
    metrics = json.loads((run / "metrics.json").read_text())
    counts = [metrics[name] for name in ("rows", "training_rows", "calibration_rows", "fold", "steps")]
    assert counts == [24, 0, 96, 0, 0]
    contract = read_package(run / "package").contract
    assert contract.label_token_ids == tuple(model_tokens(Path(contract.base_model)).values())
    assert len(contract.golden) == 20
    models = {line["model"]: line for line in json.loads((run / "agreement.json").read_text())["models"]}
    assert models["trained"]["against_recorded"]["largest"] < 1e-5
    assert models["merged"]["against_trained"]["largest"] < 1e-2


def test_a_run_that_nothing_was_trained_for_enters_the_ledger_as_one(packaged):
    run, recipe, _ = packaged
    contract = sha256(run / "contract.json")
    [entry] = [entry for entry in ledger.read() if entry["event"] == "train" and entry["contract"] == contract]
    assert (entry["recipe"], entry["recipe_sha256"], entry["run"]) == (str(recipe), sha256(recipe), str(run))
    assert (entry["metrics"]["training_rows"], entry["pairs_sha256"]) == (0, sha256(recipe.parent / "pairs.parquet"))


def test_a_strong_position_bias_is_cancelled(packaged):
    run, _, printed = packaged
    contract = json.loads((run / "contract.json").read_text())
    predictions = pl.read_parquet(run / "predictions.parquet")
    assert contract["logit_bias"][0] < -1
    assert contract["logit_bias"][0] == -contract["logit_bias"][1]
    assert f"position bias: {-2 * contract['logit_bias'][0]:+.3f} on the first answer's logit" in printed
    assert first_answer(predictions) == pytest.approx(0.5, abs=0.05)
    bias = np.array(contract["logit_bias"])
    odds = np.exp(bias[1] - bias[0])
    without = [p * odds / (p * odds + 1 - p) for p in predictions["p_model_a_as_given"]]
    assert np.mean(without) > 0.9


def test_labels_and_validation_rows_have_no_part_in_the_calibration():
    frame = pl.DataFrame({name: ["1", "2", "3"] for name in ("id", "prompt", "response_a", "response_b", "winner")})
    calibration = choose_calibration_rows(frame, frame[1:2])
    assert calibration.columns == ["id", "prompt", "response_a", "response_b"]
    assert calibration["id"].to_list() == ["1", "3"]
    assert choose_calibration_rows(frame, frame)["id"].to_list() == ["1", "2", "3"]  # fold: all


def test_a_second_run_does_nothing_and_another_block_does_it_again(biased, tmp_path):
    pad = {"pad_token": "<|reserved_special_token_0|>"}
    recipe = recipe_file(tmp_path / "again", biased, rows=20, special_tokens=pad)
    run = recipe.parent / "run"
    runs.succeed(recipe)
    assert json.loads((run / "contract.json").read_text())["pad_token_id"] == 6
    assert runs.current_stages(runs.succeed(recipe)) == ["untrained", "quantise", "agreement", "package"]
    (run / "predictions.parquet").unlink()
    assert "untrained" not in runs.current_stages(runs.succeed(recipe))
    recipe.write_text(recipe.read_text().replace("fold: 0", "fold: 1").replace("budget_tokens: 192", "budget_tokens: 200"))
    assert runs.current_stages(runs.succeed(recipe)) == []
    assert json.loads((run / "contract.json").read_text())["budget_tokens"] == 200


def test_a_reward_model_of_another_is_packaged_as_it_is_without_a_bias(tiny_models, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_models("gemma2"), num_labels=1, pad_token_id=0)
    model.save_pretrained(tmp_path / "rewards")
    copy_tokenizer(tiny_models("gemma2"), tmp_path / "rewards")
    block = {"head": "reward", "package": {"quantize": "none", "slug": "tiny-zeroshot"}}
    recipe = recipe_file(tmp_path / "reward", tmp_path / "rewards", rows=20, pairwise=block)
    runs.succeed(recipe)
    assert json.loads((recipe.parent / "run" / "contract.json").read_text())["logit_bias"] == []
    metrics = json.loads((recipe.parent / "run" / "metrics.json").read_text())
    assert (metrics["flip_rate"], metrics["calibration_rows"]) == (0.0, 0)


def leave_weights(recipe: Path):
    run = recipe.parent / "run"
    run.mkdir()
    save_file({"a": torch.zeros(1)}, run / "adapter_model.safetensors")


def overflow(recipe: Path):
    base = recipe.parent / "base"
    shutil.copytree(yaml.safe_load(recipe.read_text())["base_model"], base)
    runs.change_tensors(base / "model.safetensors", lambda tensors: tensors["lm_head.weight"].fill_(float("inf")))
    with_keys(base_model=str(base))(recipe)


def with_keys(**keys):
    """A change of the recipe's keys."""
    return lambda recipe: recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | keys))


def with_block(**keys):
    """A change of the recipe's block `pairwise`."""
    return lambda recipe: with_keys(pairwise=yaml.safe_load(recipe.read_text())["pairwise"] | keys)(recipe)


DAMAGE = [
    (leave_weights, "holds adapter_model.safetensors of a training, but"),
    (with_keys(base_model="./gone"), "names this as the base model"),
    (with_keys(special_tokens={"pad_token": "<new>"}), "are not all in the vocabulary of"),
    (with_block(head="score"), "has no score.weight, so that its answers would be random"),
    (with_block(budget_tokens=5000), "budget_tokens: 5000, but the base model has 4096 positions"),
    (with_block(budget_tokens=70), "leaves no room beside the template"),
    (with_block(pairs="gone.parquet"), "gone.parquet: no such file"),
    (overflow, "probabilities [nan, nan] in torch.float32; choose another base"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE, ids=[message[:30] for _, message in DAMAGE])
def test_a_base_that_cannot_be_used_as_it_is_is_one_line_and_exit_code_2(damage, message, biased, tmp_path):
    recipe = recipe_file(tmp_path / "damaged", biased, rows=20)
    damage(recipe)
    assert message in runs.refuse(recipe)
    assert not (recipe.parent / "run" / "contract.json").exists()


def test_the_hubs_commit_is_the_snapshots_name():
    assert hub_commit(Path("models--a--b/snapshots/0123abcd")) == "0123abcd"
    assert hub_commit(Path("models/gemma")) is None


def test_the_recipes_revision_of_the_base_is_the_one_that_is_fetched(biased, tmp_path, monkeypatch):
    def fetch(name, revision, source):
        raise UserError(f"{name} at {revision}")

    monkeypatch.setattr("postprocess.pipeline.find_base", fetch)
    recipe = recipe_file(tmp_path / "run", biased, model_revision="0123abcd")
    with pytest.raises(UserError, match=f"{biased} at 0123abcd"):
        make_untrained_run(read_recipe(recipe))
