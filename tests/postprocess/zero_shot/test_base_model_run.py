"""A recipe with train: false: its run folder made from a base model, and packaged like any other."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from kaggle_kernels.runtime.package import read_package
from postprocess.__main__ import main
from postprocess.pipeline import make_untrained_run
from postprocess.run_folder import hub_commit
from postprocess.staleness import RECORD
from postprocess.zero_shot.base_model_run import untrained
from preprocess.core import ledger
from preprocess.core.files import sha256
from recipes.pairwise.config.axolotl_keys import PLUGIN
from recipes.pairwise.config.schema import read_recipe
from tests import tiny

STAGES = ["untrained", "quantise", "agreement", "package"]


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
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny_models("llama") / name).read_bytes())
    return folder


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
        "package": {"quantize": "nf4", "slug": "tiny-zeroshot"},
    }
    block |= keys.pop("pairwise", {})
    values = {"base_model": str(base), "plugins": [PLUGIN], "output_dir": str(folder / "run"), "pairwise": block}
    path = folder / "recipe.yml"
    path.write_text(yaml.safe_dump(values | keys))
    return path


def invoke(recipe: Path):
    return CliRunner().invoke(main, [str(recipe)])


@pytest.fixture(scope="module")
def packaged(biased, tmp_path_factory):
    recipe = recipe_file(tmp_path_factory.mktemp("zeroshot"), biased)
    result = invoke(recipe)
    assert result.exit_code == 0, result.output
    return recipe.parent / "run", recipe, result


def first_answer(predictions: pl.DataFrame) -> float:
    """The mean probability of the answer that stood first, over both orders."""
    return (predictions["p_model_a_as_given"].mean() + predictions["p_model_b_swapped"].mean()) / 2


def test_every_stage_is_made_and_the_run_is_whole(packaged):
    run, _, result = packaged
    assert [line.split()[0] for line in result.stdout.splitlines() if " s   /" in line] == STAGES
    assert {path.name for path in run.iterdir() if path.is_file()} == {
        *("contract.json", "model_input.py", "metrics.json", "predictions.parquet", "tokenizer.json", "tokenizer_config.json"),
        *("agreement.json", "agreement.parquet", "agreement.png", RECORD),
    }
    metrics = json.loads((run / "metrics.json").read_text())
    assert {name: metrics[name] for name in ("rows", "training_rows", "calibration_rows", "fold", "steps")} == {
        **{"rows": 24, "training_rows": 0, "calibration_rows": 96},
        **{"fold": 0, "steps": 0},
    }
    package = read_package(run / "package")
    assert package.contract.label_token_ids == tuple(model_tokens(Path(package.contract.base_model)).values())
    assert len(package.contract.golden) == 20
    report = json.loads((run / "agreement.json").read_text())
    by_name = {line["model"]: line for line in report["models"]}
    assert by_name["trained"]["against_recorded"]["largest"] < 1e-5
    assert by_name["merged"]["against_trained"]["largest"] < 1e-2


def test_a_run_that_nothing_was_trained_for_enters_the_ledger_as_one(packaged):
    run, recipe, _ = packaged
    contract = sha256(run / "contract.json")
    [entry] = [entry for entry in ledger.read() if entry["event"] == "train" and entry["contract"] == contract]
    assert (entry["recipe"], entry["recipe_sha256"], entry["run"]) == (str(recipe), sha256(recipe), str(run))
    assert (entry["metrics"]["training_rows"], entry["pairs_sha256"]) == (0, sha256(recipe.parent / "pairs.parquet"))
    assert [entry["trained"] for entry in ledger.read() if entry.get("run") == str(run) and entry["event"] == "package"] == [
        {str(run): contract}
    ]


def test_a_strong_position_bias_is_cancelled(packaged):
    run, _, _ = packaged
    metrics = json.loads((run / "metrics.json").read_text())
    contract = json.loads((run / "contract.json").read_text())
    predictions = pl.read_parquet(run / "predictions.parquet")
    assert metrics["before_calibration"]["flip_rate"] == 1.0
    assert contract["logit_bias"][0] < -1
    assert contract["logit_bias"][0] == -contract["logit_bias"][1]
    assert f"flip rate  1.0000 before, {metrics['flip_rate']:.4f} after" in packaged[2].stdout
    assert first_answer(predictions) == pytest.approx(0.5, abs=0.05)
    bias = np.array(contract["logit_bias"])
    odds = np.exp(bias[1] - bias[0])
    without = [p * odds / (p * odds + 1 - p) for p in predictions["p_model_a_as_given"]]
    assert np.mean(without) > 0.9


def test_the_bias_of_a_model_that_prefers_longer_answers_and_the_first_is_what_was_built_in(biased, tmp_path, monkeypatch):
    """The model is a stand-in: a token more in an answer is worth 0.1, the first place 3."""
    recipe = read_recipe(recipe_file(tmp_path / "stand-in", biased))
    tokenizer = AutoTokenizer.from_pretrained(biased)

    def logits(model, contract, sequences, device):
        texts = [tokenizer.decode(ids).split("# Response A")[1].split("Which response")[0] for ids in sequences]
        lengths = [[len(tokenizer.encode(text)) for text in both.split("# Response B")] for both in texts]
        return torch.tensor([[3 + 0.1 * (first - second), 0.0] for first, second in lengths])

    monkeypatch.setattr("postprocess.zero_shot.base_model_run.load_base", lambda base, contract: (torch.nn.Identity(), "cpu"))
    monkeypatch.setattr("postprocess.zero_shot.base_model_run.verdict_logits", logits)
    untrained(recipe, biased, None)
    assert json.loads((recipe.run_folder / "contract.json").read_text())["logit_bias"] == pytest.approx([-1.5, 1.5], abs=1e-5)
    metrics = json.loads((recipe.run_folder / "metrics.json").read_text())
    assert metrics["before_calibration"]["flip_rate"] > 0.7
    assert metrics["flip_rate"] < 0.1  # answers of the same length
    predictions = pl.read_parquet(recipe.run_folder / "predictions.parquet")
    assert predictions["p_model_a_as_given"].to_list() == pytest.approx(predictions["p_model_a_swapped"].to_list(), abs=1e-5)


def test_labels_have_no_influence_on_the_calibration(packaged, biased, tmp_path):
    run, _, _ = packaged
    recipe = recipe_file(tmp_path / "shuffled", biased, pairwise={"package": {"quantize": "none", "slug": "tiny-zeroshot"}})
    pairs = recipe.parent / "pairs.parquet"
    frame = pl.read_parquet(pairs)
    labels = ["winner", "p_model_a", "p_model_b", "p_tie"]
    shuffled = frame.with_columns(frame.select(labels).sample(fraction=1, shuffle=True, seed=3))
    assert not shuffled["winner"].equals(frame["winner"])
    shuffled.write_parquet(pairs)
    assert invoke(recipe).exit_code == 0
    contracts = [json.loads((folder / "contract.json").read_text()) for folder in (run, recipe.parent / "run")]
    assert contracts[0]["logit_bias"] == contracts[1]["logit_bias"]
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (run, recipe.parent / "run")]
    assert metrics[0]["log_loss"] != metrics[1]["log_loss"]
    assert metrics[0]["flip_rate"] == metrics[1]["flip_rate"]


def test_a_second_run_does_nothing_and_another_block_does_it_again(biased, tmp_path):
    recipe = recipe_file(tmp_path / "again", biased, rows=20)
    assert invoke(recipe).exit_code == 0
    assert [line[:21] for line in invoke(recipe).stdout.splitlines()] == [f"{stage:<10} up to date" for stage in STAGES]
    recipe.write_text(recipe.read_text().replace("tiny-zeroshot", "other-slug"))
    up_to_date = [line.split()[0] for line in invoke(recipe).stdout.splitlines() if "up to date" in line]
    assert up_to_date == STAGES[:3]
    (recipe.parent / "run" / "predictions.parquet").unlink()
    assert "untrained  up to date" not in invoke(recipe).stdout
    recipe.write_text(recipe.read_text().replace("fold: 0", "fold: 1").replace("budget_tokens: 192", "budget_tokens: 200"))
    assert "up to date" not in invoke(recipe).stdout
    assert json.loads((recipe.parent / "run" / "contract.json").read_text())["budget_tokens"] == 200


def test_special_tokens_of_the_recipe_are_applied(biased, tmp_path):
    recipe = recipe_file(tmp_path / "special", biased, rows=20, special_tokens={"pad_token": "<|reserved_special_token_0|>"})
    assert invoke(recipe).exit_code == 0
    contract = json.loads((recipe.parent / "run" / "contract.json").read_text())
    assert contract["pad_token_id"] == 6
    config = json.loads((recipe.parent / "run" / "package" / "config.json").read_text())
    assert config["pad_token_id"] == 6


def test_a_reward_model_of_another_is_packaged_as_it_is_without_a_bias(tiny_models, tmp_path):
    base = tmp_path / "rewards"
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_models("gemma2"), num_labels=1, pad_token_id=0)
    model.save_pretrained(base)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).write_bytes((tiny_models("gemma2") / name).read_bytes())
    block = {"head": "reward", "package": {"quantize": "none", "slug": "tiny-zeroshot"}}
    recipe = recipe_file(tmp_path / "reward", base, rows=20, pairwise=block)
    result = invoke(recipe)
    assert result.exit_code == 0, result.output
    assert json.loads((recipe.parent / "run" / "contract.json").read_text())["logit_bias"] == []
    metrics = json.loads((recipe.parent / "run" / "metrics.json").read_text())
    assert (metrics["flip_rate"], metrics["calibration_rows"]) == (0.0, 0)


def leave_weights(recipe: Path):
    run = recipe.parent / "run"
    run.mkdir()
    save_file({"a": torch.zeros(1)}, run / "adapter_model.safetensors")


def change(recipe: Path, **keys):
    recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | keys))


def change_block(recipe: Path, **keys):
    change(recipe, pairwise=yaml.safe_load(recipe.read_text())["pairwise"] | keys)


def overflow(recipe: Path):
    base = recipe.parent / "base"
    base.mkdir()
    for path in Path(yaml.safe_load(recipe.read_text())["base_model"]).iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"].fill_(float("inf"))
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    change(recipe, base_model=str(base))


DAMAGE = [
    (leave_weights, "holds adapter_model.safetensors of a training, but"),
    (lambda recipe: change(recipe, base_model="./gone"), "./gone: the base model in"),
    (lambda recipe: change(recipe, special_tokens={"pad_token": "<new>"}), "are not all in the vocabulary of"),
    (
        lambda recipe: change(recipe, special_tokens={"colour": "<pad>"}),
        "recipe.yml: special_tokens.colour: unknown key; remove it",
    ),
    (lambda recipe: change_block(recipe, head="score"), "has no score.weight, so that its answers would be random"),
    (lambda recipe: change_block(recipe, budget_tokens=5000), "budget_tokens: 5000, but the base model has 4096 positions"),
    (lambda recipe: change_block(recipe, budget_tokens=70), "leaves no room beside the template"),
    (lambda recipe: change_block(recipe, fold=9), "pairwise.fold is 9, but the folds in the file are 0, 1, 2, 3, 4"),
    (lambda recipe: change_block(recipe, pairs="gone.parquet"), "gone.parquet: no such file"),
    (overflow, "its logits are not finite"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE, ids=[message[:30] for _, message in DAMAGE])
def test_a_base_that_cannot_be_used_as_it_is_is_one_line_and_exit_code_2(damage, message, biased, tmp_path):
    recipe = recipe_file(tmp_path / "damaged", biased, rows=20)
    damage(recipe)
    result = invoke(recipe)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert not (recipe.parent / "run" / "contract.json").exists()


def test_the_hubs_commit_is_the_snapshots_name():
    assert hub_commit(Path("models--a--b/snapshots/0123abcd")) == "0123abcd"
    assert hub_commit(Path("models/gemma")) is None


def test_the_recipes_revision_of_the_base_is_the_one_that_is_fetched(biased, tmp_path, monkeypatch):
    asked = []

    def fetch(name, revision, source):
        asked.append((name, revision))
        return biased

    monkeypatch.setattr("postprocess.pipeline.find_base", fetch)
    recipe = recipe_file(tmp_path / "run", biased, model_revision="0123abcd")
    monkeypatch.setattr("postprocess.pipeline.import_torch", lambda: pytest.fail("far enough"))
    with pytest.raises(pytest.fail.Exception, match="far enough"):
        make_untrained_run(read_recipe(recipe))
    assert asked == [(str(biased), "0123abcd")]
