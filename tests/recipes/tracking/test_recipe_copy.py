"""The recipe that a run folder keeps: the file with what the command line and the environment changed."""

import tempfile
from pathlib import Path

import pytest
import yaml
from axolotl.utils.dict import DictDefault

from preprocess.core.errors import UserError
from recipes.pairwise.config.schema import read_recipe
from recipes.pairwise.tracking import recipe_copy
from tests import tiny
from tests.conftest import ROOT


@pytest.fixture
def trial(monkeypatch, tmp_path):
    """A trial's temporary recipe as Axolotl writes one: trial(lora_r=0)."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))

    def write(**changes) -> tuple[DictDefault, Path]:
        changes |= {"output_dir": str(tmp_path / "swept/sweep0001")}
        path = tiny.change(ROOT / "recipes/demo.yml", path=tmp_path / "tmp/sweep0001.yaml", **changes)
        return DictDefault(yaml.safe_load(path.read_text()) | {"axolotl_config_path": str(path)}), path

    return write


def test_the_copy_has_the_recipe_s_order_the_command_line_s_values_and_the_environment_s(tmp_path, monkeypatch):
    file = ROOT / "recipes/demo.yml"
    asked = {"learning_rate": 0.5, "lora_dropout": 0.1, "debug": False, "axolotl_config_path": str(file)}
    cfg = DictDefault(yaml.safe_load(file.read_text()) | {"output_dir": str(tmp_path / "run")} | asked)
    monkeypatch.setenv("PAIRWISE_FOLD", "3")
    monkeypatch.setenv("PAIRWISE_PAIRS", "other.parquet")
    values = recipe_copy.resolve_recipe(cfg, file)
    assert list(values)[:3] == ["base_model", "plugins", "pairwise"]
    assert (values["learning_rate"], values["lora_r"], values["lora_dropout"]) == (0.5, 16, 0.1)
    assert values.keys() & {"debug", "axolotl_config_path", "num_labels"} == set()
    assert (values["pairwise"]["fold"], values["pairwise"]["pairs"]) == (3, "other.parquet")
    assert values["output_dir"] == str(tmp_path / "run" / "fold-3")
    recipe_copy.write_copy(values)
    monkeypatch.delenv("PAIRWISE_FOLD")
    monkeypatch.delenv("PAIRWISE_PAIRS")
    copy = read_recipe(tmp_path / "run/fold-3/recipe.yml")
    assert (copy.run_folder, copy.pairwise.fold, copy.axolotl["learning_rate"]) == (tmp_path / "run/fold-3", 3, 0.5)


def test_a_trial_is_kept_at_once_and_another_s_metrics_do_not_stay_beside_it(trial, tmp_path):
    swept = tmp_path / "swept/sweep0001"
    swept.mkdir(parents=True)
    for name in ("contract.json", "metrics.json", "predictions.parquet", "debug.log", "adapter_model.safetensors"):
        (swept / name).write_text("of an earlier sweep")
    cfg, path = trial(lora_r=32)
    recipe_copy.begin_trial(recipe_copy.resolve_recipe(cfg, path), path)
    assert sorted(file.name for file in swept.iterdir()) == ["adapter_model.safetensors", "recipe.yml"]
    assert yaml.safe_load((swept / "recipe.yml").read_text())["lora_r"] == 32


def test_the_recipe_that_outlives_a_trial_is_its_copy(trial):
    _, path = trial()
    assert recipe_copy.lasting_recipe(path, "outputs/R/sweep0001") == Path("outputs/R/sweep0001/recipe.yml")
    assert recipe_copy.lasting_recipe(ROOT / "recipes/demo.yml", "outputs/demo") == ROOT / "recipes/demo.yml"


def test_a_refused_trial_says_why_in_its_log(trial, tmp_path):
    cfg, path = trial(lora_r=0)
    values = recipe_copy.resolve_recipe(cfg, path)
    recipe_copy.begin_trial(values, path)
    recipe_copy.end_refused_trial(values, path, UserError(f"{path}: lora_r: expected a whole number, found 0"))
    assert (tmp_path / "swept/sweep0001/debug.log").read_text() == "error: lora_r: expected a whole number, found 0\n"


def test_a_recipe_that_is_no_trial_leaves_nothing_before_it_trains(tmp_path):
    path = tmp_path / "R.yml"
    path.write_text(yaml.safe_dump({"output_dir": str(tmp_path / "sweep0001")}))
    values = recipe_copy.resolve_recipe({"output_dir": str(tmp_path / "sweep0001")}, path)
    recipe_copy.begin_trial(values, path)
    recipe_copy.end_refused_trial(values, path, UserError("wrong"))
    assert [file.name for file in tmp_path.iterdir()] == ["R.yml"]


def test_values_that_the_check_will_refuse_do_no_harm_before_it(tmp_path):
    path = tmp_path / "R.yml"
    path.write_text("output_dir: 5\npairwise: 3\n")
    assert recipe_copy.resolve_recipe({"output_dir": 5, "pairwise": 3}, path) == {"output_dir": "outputs/R", "pairwise": 3}


def test_one_folder_for_all_trials_is_refused(trial):
    cfg, path = trial()
    cfg["output_dir"] = "elsewhere"
    with pytest.raises(UserError, match=r"--output-dir elsewhere: the trials of a sweep would write over .*output_dir: \[else"):
        recipe_copy.resolve_recipe(cfg, path)


def test_a_trial_can_be_trained_again_from_its_copy_into_another_folder(trial, tmp_path):
    cfg, path = trial()
    recipe_copy.write_copy(recipe_copy.resolve_recipe(cfg, path))
    copy = tmp_path / "swept/sweep0001/recipe.yml"
    again = DictDefault(yaml.safe_load(copy.read_text()) | {"output_dir": str(tmp_path / "again")})
    assert recipe_copy.resolve_recipe(again, copy)["output_dir"] == str(tmp_path / "again")
