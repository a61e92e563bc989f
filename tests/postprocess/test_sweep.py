"""A sweep's index: which trial had which parameters, and how it did."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import polars as pl
import pytest
import yaml
from click.testing import CliRunner

from postprocess.sweep import main
from recipes.pairwise.config.schema import read_recipe
from tests import tiny
from tests.conftest import ROOT

METRICS = {"flip_rate": 0.25, "rows": 400, "steps": 60, "fold": 0, "pairs_sha256": "f" * 64}


def add_trial(folder: Path, name: str, *, log_loss=None, accuracy=None, log=None, metrics=None, block=None, **keys) -> Path:
    """A trial's folder as training leaves it; without a log loss, as it is before the end."""
    run = folder / name
    run.mkdir(parents=True)
    block = {"template": "gemma", "budget_tokens": 256, "package": {"slug": "some-model"}} | (block or {})
    recipe = {"base_model": "some/model", "pairwise": block, "output_dir": str(run)} | keys
    (run / "recipe.yml").write_text(yaml.safe_dump(recipe))
    if log_loss is not None:
        values = METRICS | {"log_loss": log_loss, "accuracy": accuracy} | (metrics or {})
        (run / "metrics.json").write_text(json.dumps(values))
        (run / "contract.json").write_text("{}")
    if log is not None:
        (run / "debug.log").write_text(log)
    return run


def index(folder: Path, *options: str):
    """The command's output as lines of words, and what it wrote as a table."""
    result = CliRunner().invoke(main, [str(folder), *options])
    assert result.exit_code == 0, result.output
    return [line.split() for line in result.output.splitlines() if line.strip()], pl.read_csv(folder / "sweep.csv")


def fails(*arguments: str) -> str:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code == 2
    return result.output.strip()


@pytest.fixture
def swept(tmp_path):
    add_trial(tmp_path, "sweep0001", log_loss=0.66, accuracy=0.625, learning_rate=0.001, block={"budget_tokens": 512})
    add_trial(tmp_path, "sweep0002", log_loss=0.61, accuracy=0.5, learning_rate=0.0001)
    add_trial(tmp_path, "sweep0003", learning_rate=0.01, log="step 3\nTraceback\nFloatingPointError: step 3: not finite\n")
    add_trial(tmp_path, "sweep0004", log_loss=0.66, accuracy=0.75, learning_rate=0.01)
    add_trial(tmp_path, "sweep0005", learning_rate=0.1, log="  5%| 3/60 [00:01]\nseen no Error: yet")
    add_trial(tmp_path, "sweep0006", learning_rate=0, log="error: learning_rate: expected a number above 0, found 0\n")
    return tmp_path


def test_trials_are_sorted_by_log_loss_then_accuracy_and_what_did_not_end_comes_last_with_the_reason(swept):
    lines, table = index(swept)
    headings = "trial learning_rate pairwise.budget_tokens log_loss accuracy flip_rate rows steps status"
    assert [" ".join(line) for line in lines[:3:2]] == [headings, "sweep0002 0.0001 256 0.61 0.5 0.25 400 60 finished"]
    assert table.select("trial", "learning_rate", "pairwise.budget_tokens", "log_loss", "status").rows() == [
        ("sweep0002", 0.0001, 256, 0.61, "finished"),
        ("sweep0004", 0.01, 256, 0.66, "finished"),
        ("sweep0001", 0.001, 512, 0.66, "finished"),
        ("sweep0003", 0.01, 256, None, "failed: FloatingPointError: step 3: not finite"),
        ("sweep0005", 0.1, 256, None, "unfinished: it runs still, or was ended"),
        ("sweep0006", 0, 256, None, "failed: learning_rate: expected a number above 0, found 0"),
    ]
    assert " ".join(lines[-2]) == f"best by log_loss: sweep0002; package it: python -m postprocess {swept}/sweep0002/recipe.yml"


def test_another_metric_can_decide_which_is_best(swept):
    lines, table = index(swept, "--by", "accuracy")
    assert " ".join(lines[-2]).startswith("best by accuracy: sweep0004; ")
    assert table["trial"].to_list()[:3] == ["sweep0004", "sweep0001", "sweep0002"]


def test_parameters_of_any_kind_are_told_as_a_recipe_has_them(tmp_path):
    add_trial(tmp_path, "sweep0001", log_loss=0.6, accuracy=0.5, lora_target_modules=["q_proj", "v_proj"], bf16="auto")
    add_trial(tmp_path, "sweep0002", log_loss=0.7, accuracy=0.5, bf16=True, wandb_name="second")
    lines, table = index(tmp_path)
    assert " ".join(lines[3]) == "sweep0002 true 0.7 0.5 0.25 400 60 finished"
    assert table.select("lora_target_modules", "bf16").rows() == [("[q_proj, v_proj]", "auto"), (None, "true")]
    assert "wandb_name" not in table.columns


def test_trials_on_several_folds_are_told_apart_and_not_compared(tmp_path):
    for fold, loss in ((0, 0.6), (1, 0.7)):
        metrics, block = {"fold": fold}, {"fold": fold}
        add_trial(tmp_path, f"sweep0001/fold-{fold}", log_loss=loss, accuracy=0.5, metrics=metrics, block=block)
    lines, table = index(tmp_path)
    assert table.select("trial", "pairwise.fold").rows() == [("sweep0001/fold-0", 0), ("sweep0001/fold-1", 1)]
    warning = "the trials were validated on different rows (other folds, or other pairs files): do not compare their metrics"
    assert warning in [" ".join(line) for line in lines]


def test_a_sweep_of_which_nothing_ended_is_listed(tmp_path):
    add_trial(tmp_path, "sweep0001", lora_r=8)
    (tmp_path / "sweep0002").mkdir()
    lines, table = index(tmp_path)
    assert table["status"].to_list() == ["unfinished: it runs still, or was ended"] * 2
    assert " ".join(lines[-1]) == f"written: {tmp_path}/sweep.csv"


def test_a_folder_without_trials_is_one_line(tmp_path):
    (tmp_path / "sweep0001").write_text("no folder")
    assert fails(str(tmp_path)).startswith(f"error: {tmp_path}: holds no trial, that is no folder such as sweep0001; name ")
    assert fails(str(tmp_path / "absent")).startswith(f"error: {tmp_path}/absent: there is no such folder; ")


def test_metrics_without_what_training_writes_are_one_line(tmp_path):
    run = add_trial(tmp_path, "sweep0001", log_loss=0.6, accuracy=None)
    assert fails(str(tmp_path)).startswith(f"error: {run}/metrics.json: holds no number accuracy, so ")


@pytest.mark.slow
def test_a_real_sweep_with_a_refused_trial_is_indexed_and_its_best_is_a_recipe(tiny_models, tmp_path):
    pairs = tiny.pairs_parquet(tmp_path / "pairs.parquet", 40)
    recipe = tiny.twin(ROOT / "recipes/demo.yml", tmp_path, tiny_models("gemma2"), pairs)
    block = yaml.safe_load(recipe.read_text())["pairwise"]
    blocks = [block | {"budget_tokens": 192}, block | {"budget_tokens": 1}]
    (tmp_path / "sweep.yml").write_text(yaml.safe_dump({"output_dir": [str(tmp_path / "swept")], "pairwise": blocks}))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [shutil.which("axolotl"), "train", str(recipe), "--sweep", str(tmp_path / "sweep.yml"), "--learning-rate", "0.01"]
    ended = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=500, check=False)
    assert ended.returncode == 0, ended.stdout[-3000:]
    _, table = index(tmp_path / "swept")
    assert sorted(table["pairwise.budget_tokens"].to_list()) == [1, 192]
    refused = "failed: pairwise.budget_tokens: expected a number of at least 64, found 1"
    assert table["status"].to_list() == ["finished", refused]
    best = read_recipe(tmp_path / "swept" / table["trial"][0] / "recipe.yml")
    assert (best.pairwise.budget_tokens, best.axolotl["learning_rate"]) == (192, 0.01)
