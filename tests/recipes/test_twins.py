"""Every recipe is found by glob, checked strictly, and says what it is; tests/test_every_approach.py trains their twins."""

from pathlib import Path

import pytest
import yaml

from recipes.pairwise.config.schema import read_recipe
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
