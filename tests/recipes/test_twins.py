"""Every recipe trains: found by glob, checked strictly, and its twin run for a few steps on the CPU."""

import json
from pathlib import Path

import polars as pl
import pytest
import yaml

from preprocess.files import sha256
from preprocess.model_input import check_golden, read_contract
from recipes.pairwise.schema import read_recipe
from tests import forked, tiny
from tests.conftest import ROOT

RECIPES = sorted((ROOT / "recipes").glob("*.yml"))


def trains(recipe: Path) -> bool:
    return read_recipe(recipe).pairwise.train


def test_the_recipes_are_found():
    assert {"demo", "gemma2_cls", "minilm_cls"} <= {recipe.stem for recipe in RECIPES}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_passes_its_own_check_and_says_what_it_is(recipe):
    read_recipe(recipe)
    header = [line for line in recipe.read_text().splitlines() if line.startswith("#")]
    assert [line.split(":")[0] for line in header[1:4]] == ["# What", "# Command", "# Hardware"]
    assert None not in yaml.safe_load(recipe.read_text()).values()


@pytest.mark.parametrize("recipe", [r for r in RECIPES if trains(r)], ids=lambda path: path.stem)
def test_twin_trains_and_leaves_a_whole_run(recipe, tiny_models, tmp_path):
    values = yaml.safe_load(recipe.read_text())
    base = tiny_models(tiny.architecture(values["base_model"]))
    pairs = tiny.pairs_parquet(tmp_path / "pairs.parquet", 40)
    ended = forked.axolotl("train", tiny.twin(recipe, tmp_path, base, pairs))
    assert ended.code == 0, ended.output[-3000:]

    run = tmp_path / recipe.stem
    contract = read_contract(run)
    assert contract.base_model == str(base)
    assert contract.model_input_sha256 == sha256(run / "model_input.py") == sha256(ROOT / "preprocess/model_input.py")
    assert contract.tokenizer_sha256["tokenizer.json"] == sha256(run / "tokenizer.json")
    assert len(contract.golden) == 20
    from transformers import AutoTokenizer

    check_golden(AutoTokenizer.from_pretrained(run), contract)
    predictions = pl.read_parquet(run / "predictions.parquet")
    assert predictions["id"].to_list() == [f"row{number:05d}" for number in range(0, 40, 5)]
    verdicts = pl.sum_horizontal("p_model_a", "p_model_b", "p_tie")
    assert predictions.select((verdicts - 1).abs().max()).item() < 1e-6
    metrics = json.loads((run / "metrics.json").read_text())
    assert (metrics["rows"], metrics["training_rows"], metrics["fold"]) == (8, 32, 0)
    assert weights_in(run), "no weights were saved"


def weights_in(run: Path) -> list[str]:
    return [path.name for path in run.glob("*model*.safetensors")]


@pytest.mark.parametrize("recipe", [r for r in RECIPES if not trains(r)], ids=lambda path: path.stem)
def test_a_recipe_that_trains_nothing_says_so_and_stops(recipe, tiny_models, tmp_path):
    base = tiny_models(tiny.architecture(yaml.safe_load(recipe.read_text())["base_model"]))
    twin = tiny.twin(recipe, tmp_path, base, tiny.pairs_parquet(tmp_path / "pairs.parquet", 10))
    ended = forked.axolotl("train", twin)
    assert ended.code == 2
    assert f"pairwise.train is false, there is nothing to train; package the base model with python -m postprocess {twin}" in (
        ended.output
    )
    assert not (tmp_path / recipe.stem).exists()
