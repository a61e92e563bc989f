"""`make ladder`: the rungs' recipes, changes from the first rung, where it stops, and a whole ladder of a tiny model."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

from postprocess.report import metrics
from postprocess.report.predictions import PROBABILITIES, Predictions
from preprocess.core.files import read_json
from recipes.pairwise.config.recipe_files import find_recipe
from recipes.pairwise.config.schema import read_recipe
from tests import forked, tiny
from tests.bench import ladder
from tests.conftest import ROOT
from tests.postprocess.labels.test_labels import with_all_roles


@pytest.fixture
def pairs(tmp_path, monkeypatch):
    """pairs.parquet in the current folder: forty pairs in two folds, and a few of each other role."""
    monkeypatch.chdir(tmp_path)
    path = tiny.pairs_parquet(Path("pairs.parquet"), 40)
    pl.read_parquet(path).with_columns(fold=pl.col("fold") % 2).write_parquet(path)
    with_all_roles(path)
    return path


def test_rungs_differ_from_the_recipe_in_their_own_keys_and_are_written_once(pairs, monkeypatch):
    ladder.FOLDER.mkdir(parents=True)
    for rung in ladder.RUNGS:
        file = ladder.write_recipe(rung, find_recipe("minilm_reward"), pairs, Path("base"))
        block = read_recipe(file).pairwise
        assert (block.fold, block.head) == ("all", "reward")
        assert block.pairs == ("pairs.parquet" if rung.name == "extra" else "outputs/ladder/pairs.parquet")
    # The last of the four students is that of the pool.
    student = read_recipe("outputs/ladder/pool.yml")
    assert student.axolotl["base_model"] == "base"
    assert student.pairwise.distill.model_dump() == {
        "teachers": {"outputs/ladder/votes": 1.0},
        "weight": 0.9,
        "temperature": 5.0,
        "pool": True,
    }
    os.utime("outputs/ladder/votes.yml", (0, 0))
    ladder.write_recipe(ladder.RUNGS[0], find_recipe("minilm_reward"), pairs, Path("base"))
    assert Path("outputs/ladder/votes.yml").stat().st_mtime == 0


def result(title: str, p_a: list[float]) -> ladder.Result:
    """Predictions of four rows, of which A won all, in two groups of prompts."""
    rows = pl.DataFrame({"id": list("wxyz"), "winner": ["model_a"] * 4, "group": [0, 0, 0, 1]})
    for name in PROBABILITIES:
        values = {"model_a": np.array(p_a), "model_b": 1 - np.array(p_a), "tie": np.zeros(4)}
        verdict = name.removeprefix("p_").removesuffix("_as_given").removesuffix("_swapped")
        rows = rows.with_columns(pl.Series(name, values[verdict]))
    scored = metrics.score_rows(Predictions(Path("rows"), rows), ("model_a", "model_b"))
    return ladder.Result(title, scored, 60.0)


def test_changes_are_row_by_row_with_an_interval_by_group(pairs, capsys):
    first = result("votes", [0.8, 0.2, 0.2, 0.2])
    second = result("taught", [0.8, 0.8, 0.2, 0.8])
    ladder.FOLDER.mkdir(parents=True)
    ladder.write_results(ladder.compare_with_first([first, second]), pairs)
    # Two of four rows become right: of one group a third, of the other all.
    assert (
        "| taught | 0.750 | +0.500 (+0.333 to +1.000) | 0.570 | -0.693 (-1.386 to -0.462) | 0.380 | 60 |"
        in capsys.readouterr().out
    )
    written = read_json(ladder.FOLDER / "ladder.json")
    assert written["methods"][1]["accuracy_change"] == {"value": 0.5, "low": 0.333333, "high": 1.0}
    assert written["methods"][0]["log_loss_change"] == {"value": 0.0, "low": 0.0, "high": 0.0}


def run_ladder(*arguments):
    return CliRunner().invoke(ladder.main, ["pairs.parquet", *arguments])


def test_it_needs_a_lockbox_and_no_overrides(pairs, monkeypatch):
    monkeypatch.setenv("PAIRWISE_FOLD", "1")
    assert "error: PAIRWISE_FOLD is set; unset it" in run_ladder().output
    monkeypatch.delenv("PAIRWISE_FOLD")
    pl.read_parquet(pairs).filter(pl.col("role") != "test").write_parquet(pairs)
    ended = run_ladder()
    assert (ended.exit_code, ended.output) == (
        2,
        "error: pairs.parquet: no lockbox rows; make them with pairwise preprocess … --test 0.2\n",
    )


def test_a_training_that_fails_says_how_to_go_on(pairs, tmp_path, monkeypatch):
    (tmp_path / "axolotl").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "axolotl").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    ended = run_ladder()
    assert ended.exit_code == 2
    assert "error: `axolotl train outputs/ladder/votes.yml` ended with exit code 3; run this again" in ended.output


def run_training_as_fork(*command: str) -> None:
    """Do as ladder.run_command does, but train in forks, which need not import Axolotl again."""
    recipe = Path(command[-1])
    if command[0] == "axolotl":
        train_in_fork(recipe)
        return
    if "recipes.pairwise.cv" in command:
        # It then finds its folds trained, and joins them.
        for fold in ("0", "1"):
            if not recipe.with_suffix("").joinpath(f"fold-{fold}/contract.json").exists():
                train_in_fork(recipe, {"PAIRWISE_FOLD": fold})
    subprocess.run(command, check=True)


def train_in_fork(recipe: Path, environment: dict[str, str] | None = None) -> None:
    """Train a recipe to its end."""
    ended = forked.axolotl("train", recipe, environment)
    assert ended.code == 0, ended.output[-3000:]


@pytest.mark.slow
def test_a_ladder_of_three_rungs_and_a_second_call_that_trains_nothing(pairs, tiny_models, monkeypatch):
    rungs = [rung for rung in ladder.RUNGS if rung.name in ("votes", "pool", "extra")]
    monkeypatch.setattr(ladder, "RUNGS", rungs)
    monkeypatch.setattr(ladder, "run_command", run_training_as_fork)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
    recipe = tiny.twin(ROOT / "recipes/minilm_reward.yml", Path("twin"), tiny_models("bert"), pairs)
    ended = run_ladder("--recipe", str(recipe))
    assert ended.exit_code == 0, ended.output
    methods = read_json(ladder.FOLDER / "ladder.json")["methods"]
    assert [line["method"] for line in methods] == [*(rung.title for rung in rungs), "votes, mean of the folds' models"]
    trained = {contract: contract.stat().st_mtime_ns for contract in ladder.FOLDER.rglob("contract.json")}
    assert len(trained) == 3 + 2
    again = run_ladder("--recipe", str(recipe))
    assert again.exit_code == 0
    assert read_json(ladder.FOLDER / "ladder.json")["methods"] == methods
    assert {contract: contract.stat().st_mtime_ns for contract in trained} == trained
