"""Packages of every head from a test file to a submission: orders, bias, ensembles of unlike heads."""

import json
from dataclasses import replace

import polars as pl
import pytest

from kaggle_kernels.build.spec import Spec, settings_of
from kaggle_kernels.runtime.main import run_kernel
from tests import tiny
from tests.kaggle_kernels.packages import change_json, make_package, settings_for, write_manifest

pytestmark = pytest.mark.usefixtures("workers_in_threads")
SPEC = Spec(
    title="Title",
    competition="wsdm",
    packages=[
        {"run": "causal", "dataset": "tiny-causal", "weight": 0.5},
        {"run": "reward", "dataset": "tiny-reward", "weight": 0.5},
    ],
    clock_seconds=600,
    tokens_per_batch=2000,
)
CAUSAL, REWARD = settings_for("causal", "tiny-causal", 0.5), settings_for("reward", "tiny-reward", 0.5)
SETTINGS = settings_of("test", SPEC, [CAUSAL, REWARD])


@pytest.fixture
def kaggle(tmp_path, monkeypatch, tiny_models):
    """A tree like Kaggle's with a package of each of the two heads and 30 test rows."""
    monkeypatch.setenv("KAGGLE_ROOT", str(tmp_path))
    (tmp_path / "working").mkdir()
    (tmp_path / "input" / SETTINGS.competition).mkdir(parents=True)
    tiny.pairs(30, seed=6).drop("winner").write_parquet(tmp_path / "input" / SETTINGS.competition / "test.parquet")
    make_package(tmp_path / "packages" / "causal", tiny_models("gemma2"), head="label_tokens")
    make_package(tmp_path / "packages" / "reward", tiny_models("gemma2"), head="reward")
    for name in ("causal", "reward"):
        (tmp_path / "packages" / name).rename(tmp_path / "input" / f"tiny-{name}")
    return tmp_path


def run(kaggle, *packages, **changes):
    """scores.parquet of a kernel with these packages, and the passes of its record."""
    run_kernel(replace(SETTINGS, packages=packages, **changes))
    record = json.loads((kaggle / "working" / "kernel.json").read_text())
    assert (record["scored"], pl.read_csv(kaggle / "working" / "submission.csv").height) == (30, 30)
    return pl.read_parquet(kaggle / "working" / "scores.parquet"), [work["pass"] for work in record["passes"]]


def test_a_reward_model_runs_the_first_order_only(kaggle):
    scores, passes = run(kaggle, replace(REWARD, weight=1.0))
    assert passes == ["tiny-reward, as_given"]
    assert "reward_p_model_a_swapped" not in scores.columns
    assert (scores["reward_p_model_a_as_given"] - scores["p_model_a"]).abs().max() < 1e-6
    assert scores["p_model_a"].n_unique() == 30


def test_a_causal_lm_runs_both_orders(kaggle):
    scores, passes = run(kaggle, replace(CAUSAL, weight=1.0))
    assert passes == ["tiny-causal, as_given", "tiny-causal, swapped"]
    assert scores["p_model_a"].n_unique() == 30


def test_heads_of_two_kinds_make_one_ensemble(kaggle):
    scores, passes = run(kaggle, CAUSAL, REWARD)
    assert passes == ["tiny-causal, as_given", "tiny-causal, swapped", "tiny-reward, as_given"]
    causal = (scores["causal_p_model_a_as_given"] + scores["causal_p_model_a_swapped"]) / 2
    assert ((causal + scores["reward_p_model_a_as_given"]) / 2 - scores["p_model_a"]).abs().max() < 1e-6


def test_a_calibrated_model_answers_with_its_bias(kaggle):
    before, _ = run(kaggle, replace(CAUSAL, weight=1.0), orders=("as_given",))
    folder = kaggle / "input" / "tiny-causal"
    golden = json.loads((folder / "manifest.json").read_text())["golden"]
    change_json(folder / "contract.json", logit_bias=[0.5, -0.5])
    for row in golden:
        odds = row["probabilities"][0] / row["probabilities"][1] * 2.718281828459045
        row["probabilities"] = [odds / (1 + odds), 1 / (1 + odds)]
    write_manifest(folder, golden)
    after, _ = run(kaggle, replace(CAUSAL, weight=1.0), orders=("as_given",))
    logit = (pl.col("p_model_a") / pl.col("p_model_b")).log()
    assert (after.select(logit).to_series() - before.select(logit).to_series()).to_list() == pytest.approx([1.0] * 30, abs=1e-4)
