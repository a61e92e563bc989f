"""Cross-validation goes on where it stopped, and joins only what belongs together."""

import json
from types import SimpleNamespace

import polars as pl
import pytest
from click.testing import CliRunner

from preprocess import model_input
from preprocess.core.errors import UserError
from preprocess.core.files import sha256
from recipes.pairwise import cv
from recipes.pairwise.config.schema import read_recipe
from recipes.pairwise.data.datasets import list_folds, read_pairs
from tests import tiny
from tests.conftest import ROOT

CONTRACT = {"base_model": "gemma", "model_input_sha256": sha256(model_input.__file__)}


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """The demo's recipe on twenty pairs, with a complete run for each of its five folds."""
    pairs = tiny.pairs_parquet(tmp_path / "pairs.parquet", 20)
    path = tiny.twin(ROOT / "recipes/demo.yml", tmp_path, tmp_path, pairs)
    for fold in range(5):
        folder = tmp_path / f"demo/fold-{fold}"
        folder.mkdir(parents=True)
        rows = pl.read_parquet(pairs).filter(pl.col("fold") == fold).select("id", "fold", "winner")
        rows.write_parquet(folder / "predictions.parquet")
        values = dict.fromkeys(cv.AVERAGED, fold / 10) | {"rows": 4, "pairs_sha256": sha256(pairs)}
        (folder / "metrics.json").write_text(json.dumps(values))
        (folder / "contract.json").write_text(json.dumps(CONTRACT))
    return read_recipe(path)


def test_all_rows_are_joined_once_and_the_mean_is_over_rows(recipe):
    pairs = recipe.run_folder.parent / "pairs.parquet"
    table = pl.read_parquet(pairs)
    lockbox = table.head(2).with_columns(id="lockbox" + pl.col("id"), fold=pl.lit(None, pl.Int8), role=pl.lit("test"))
    pl.concat([table.with_columns(role=pl.lit("train")), lockbox]).write_parquet(pairs)
    cv.collect(recipe.run_folder, list_folds(read_pairs(pairs)), pairs)
    joined = pl.read_parquet(recipe.run_folder / "oof.parquet")
    assert joined["id"].to_list() == [f"row{number:05d}" for number in range(20)]
    assert json.loads((recipe.run_folder / "cv.json").read_text())["mean"]["accuracy"] == pytest.approx(0.2)


def test_a_fold_is_complete_only_on_the_same_pairs_and_model_input(recipe):
    folder = recipe.run_folder / "fold-0"
    assert cv.is_complete(folder, recipe, "gemma")
    assert not cv.is_complete(folder, recipe, "another base model")
    contract = (folder / "contract.json").read_text()
    (folder / "contract.json").write_text(json.dumps(CONTRACT | {"model_input_sha256": "other"}))
    assert not cv.is_complete(folder, recipe, "gemma")
    (folder / "contract.json").write_text(contract)
    tiny.pairs_parquet(recipe.run_folder.parent / "pairs.parquet", 20, seed=2)
    assert not cv.is_complete(folder, recipe, "gemma")


def test_predictions_of_other_rows_are_refused(recipe):
    pairs = tiny.pairs_parquet(recipe.run_folder.parent / "pairs.parquet", 25)
    with pytest.raises(UserError, match="the folds' predictions are not of the rows in"):
        cv.collect(recipe.run_folder, [0, 1, 2, 3, 4], pairs)
    assert not (recipe.run_folder / "oof.parquet").exists()


def test_axolotls_options_are_passed_on_to_every_fold(recipe, monkeypatch):
    commands = []

    def run(command, env, check):
        commands.append((command, env["PAIRWISE_FOLD"]))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr("recipes.pairwise.cv.subprocess.run", run)
    ended = CliRunner().invoke(cv.main, [str(recipe.path), "--base-model", "new", "--launcher", "torchrun"])
    assert ended.exit_code == 0, ended.output
    options = ["--base-model", "new", "--launcher", "torchrun"]
    assert commands == [(["axolotl", "train", str(recipe.path), *options], str(fold)) for fold in range(5)]
