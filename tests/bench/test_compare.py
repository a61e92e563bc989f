"""The table of `make compare`: the interval over groups, the scores, what is reused, and the two cheap methods."""

import json
import os

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

from preprocess.core.errors import UserError
from preprocess.core.files import sha256, write_json
from tests import tiny
from tests.bench import compare

WINNERS = ["model_a", "model_a", "model_b", "tie", "model_b", "model_a"]
LENGTHS_A = [9, 9, 3, 5, 9, 9]
LENGTHS_B = [3, 3, 9, 5, 3, 3]


def pairs_file(path):
    """Six pairs: fold 0 holds rows 0 to 3 (three right by length, one tie), fold 1 rows 4 and 5 (one of two right)."""
    one_hot = {f"p_{verdict}": [float(winner == verdict) for winner in WINNERS] for verdict in ("model_a", "model_b", "tie")}
    columns = {
        "id": [f"row{number}" for number in range(6)],
        "prompt": [["same"], ["same"], ["other"], ["third"], ["fourth"], ["fifth"]],
        "response_a": [["x" * length] for length in LENGTHS_A],
        "response_b": [["x" * length] for length in LENGTHS_B],
        "winner": WINNERS,
        "group": [7, 7, 8, 9, 10, 11],
        "fold": [0, 0, 0, 0, 1, 1],
        "weight": [1.0] * 6,
    }
    pl.DataFrame(columns | one_hot).write_parquet(path)
    return path


def run_folder(folder, p_a, pairs, fold=0, ids=("row0", "row1", "row2", "row3")):
    """A run as training leaves it, with these probabilities of A."""
    folder.mkdir(parents=True)
    table = {"id": ids, "p_model_a": p_a, "p_model_b": [1 - p for p in p_a], "p_tie": [0.0] * len(p_a)}
    pl.DataFrame(table).write_parquet(folder / "predictions.parquet")
    known = {"pairs_sha256": sha256(pairs), "fold": fold, "seconds_training": 60.0, "seconds_predicting": 1.5}
    write_json(folder / "metrics.json", known)
    return folder


def test_groups_are_drawn_whole():
    """Draws of two groups are both, the first twice or the second twice; of four rows, one in 256 would be all wrong."""
    right, groups = np.array([True, True, True, False]), np.array([5, 5, 5, 6])
    assert compare.interval(right, groups) == (0.0, 1.0)
    assert compare.interval(np.array([True, False]), np.array([1, 1])) == (0.5, 0.5)


def test_a_hundred_groups_of_one_row_have_the_interval_of_a_proportion():
    """1.96 * sqrt(0.6 * 0.4 / 100) is 0.096."""
    low, high = compare.interval(np.arange(100) < 60, np.arange(100))
    assert low == pytest.approx(0.504, abs=0.015)
    assert high == pytest.approx(0.696, abs=0.015)


def test_a_larger_group_counts_for_its_rows():
    """Nine rows right in one group, one wrong in another: both drawn once gives 0.9, not the groups' mean of 0.5."""
    draws = {compare.interval(np.arange(10) < 9, np.array([1] * 9 + [2]), resamples=1, seed=seed)[0] for seed in range(20)}
    assert draws == {0.0, 0.9, 1.0}


def test_a_run_is_scored_on_the_folds_rows(tmp_path):
    pairs = pairs_file(tmp_path / "pairs.parquet")
    run = run_folder(tmp_path / "run", [0.5, 0.2, 0.2, 0.8], pairs)
    found = compare.score(run, compare.read_fold(pairs, 0))
    assert found["accuracy"] == pytest.approx(2 / 3)  # 0.5 says A; the tie does not count
    assert found["log_loss"] == pytest.approx((0.693147 + 1.609438 + 0.223144 + (0.223144 + 1.609438) / 2) / 4, abs=1e-5)
    assert (found["rows"], found["rows_with_a_winner"], found["seconds"]) == (4, 3, 61.5)
    assert (found["accuracy_low"], found["accuracy_high"]) == (0.5, 1.0)  # group 7 has one of two right, group 8 its one


def test_a_run_of_other_rows_is_refused(tmp_path):
    pairs = pairs_file(tmp_path / "pairs.parquet")
    run = run_folder(tmp_path / "run", [0.5, 0.2, 0.2], pairs, ids=("row0", "row1", "row2"))
    with pytest.raises(UserError, match=r"predictions\.parquet: not the rows of fold 0"):
        compare.score(run, compare.read_fold(pairs, 0))


def test_only_a_run_of_the_same_pairs_and_fold_is_reused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pairs = pairs_file(tmp_path / "pairs.parquet")
    fold = compare.read_fold(pairs, 0)
    assert compare.find_run("minilm_cls", fold) is None
    run_folder(tmp_path / "outputs/minilm_cls", [0.5] * 4, pairs)
    assert str(compare.find_run("minilm_cls", fold)) == "outputs/minilm_cls"
    assert compare.find_run("minilm_cls", compare.read_fold(pairs, 1)) is None
    run_folder(tmp_path / "outputs/minilm_cls/fold-0", [0.5] * 4, pairs)
    assert str(compare.find_run("minilm_cls", fold)) == "outputs/minilm_cls/fold-0"
    os.utime(tmp_path / "outputs/minilm_cls/fold-0/metrics.json", (0, 0))
    assert str(compare.find_run("minilm_cls", fold)) == "outputs/minilm_cls", "older than the recipe"
    pl.read_parquet(pairs).with_columns(weight=2.0).write_parquet(pairs)
    assert compare.find_run("minilm_cls", compare.read_fold(pairs, 0)) is None


def test_the_length_is_as_sure_as_the_training_rows_say(tmp_path):
    """Of fold 1's pairs the longer one wins one of two; trained on fold 0, three of four with half of the tie: 0.875."""
    pairs = pairs_file(tmp_path / "pairs.parquet")
    fold = compare.read_fold(pairs, 1)
    assert compare.longer(fold.train, fold.held_out).tolist() == [0.875, 0.875]
    fold = compare.read_fold(pairs, 0)
    assert compare.longer(fold.train, fold.held_out).tolist() == [0.5, 0.5, 0.5, 0.5]


def test_tfidf_learns_words_and_gives_a_swapped_pair_one_minus_p(tmp_path):
    frame = pl.read_parquet(tiny.pairs_parquet(tmp_path / "pairs.parquet", rows=400))
    train_rows, rows = frame.filter(pl.col("fold") != 0), frame.filter(pl.col("fold") == 0)
    p_a = compare.tfidf(train_rows, rows)
    assert ((p_a > 0.5) == (rows["winner"] == "model_a").to_numpy()).mean() > 0.85
    swapped = rows.rename({"response_a": "response_b", "response_b": "response_a"})
    assert compare.tfidf(train_rows, swapped) == pytest.approx(1 - p_a, abs=1e-5)


def test_the_table_shows_each_method_on_one_line():
    figures = {"accuracy": 0.6172, "accuracy_low": 0.5, "accuracy_high": 0.7, "log_loss": 0.6656, "rows": 880, "seconds": 61.6}
    assert compare.as_table([{"method": "the longer response", **figures}]) == (
        "| method | accuracy | 95 % interval | log loss | rows | seconds |\n"
        "|---|---|---|---|---|---|\n"
        "| the longer response | 0.617 | 0.500 to 0.700 | 0.666 | 880 | 62 |"
    )


def test_the_command_trains_what_is_asked_for_shows_what_is_there_and_does_nothing_twice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pairs = pairs_file(tmp_path / "pairs.parquet")
    run_folder(tmp_path / "outputs/minilm_reward", [0.9, 0.9, 0.9, 0.9], pairs)
    first = CliRunner().invoke(compare.main, [str(pairs), "--only", "longer"])
    assert first.exit_code == 0, first.output
    assert "longer: training on 2 pairs" in first.output
    assert "minilm_cls: not there, left out" in first.output
    written = json.loads((tmp_path / "outputs/compare/compare.json").read_text())
    assert [(row["method"], row["accuracy"]) for row in written["methods"]] == [
        ("the longer response", pytest.approx(2 / 3)),
        ("MiniLM, reward head (recipes/minilm_reward.yml)", pytest.approx(2 / 3)),
    ]
    assert (written["fold"], written["groups"], written["training_rows"]) == (0, 3, 2)
    assert (tmp_path / "outputs/compare/compare.md").read_text().rstrip("\n") in first.output
    again = CliRunner().invoke(compare.main, [str(pairs), "--only", "longer"])
    assert "longer: up to date in outputs/longer/fold-0" in again.output
    assert "training on" not in again.output.partition("Fold 0")[0]


def test_a_recipe_is_trained_by_axolotl_on_these_pairs_and_this_fold(tmp_path, monkeypatch):
    """A stand-in on the PATH notes how it was called; it fails, and the comparison says how to go on."""
    monkeypatch.chdir(tmp_path)
    pairs = pairs_file(tmp_path / "pairs.parquet")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "axolotl").write_text('#!/bin/sh\necho "$@ $PAIRWISE_PAIRS $PAIRWISE_FOLD" > called\nexit 3\n')
    (tmp_path / "bin" / "axolotl").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    ended = CliRunner().invoke(compare.main, [str(pairs), "--fold", "1", "--only", "minilm_cls", "--base", "base"])
    assert (tmp_path / "called").read_text() == f"train recipes/minilm_cls.yml --base-model base {pairs} 1\n"
    assert ended.exit_code == 2
    assert (
        "error: minilm_cls: `axolotl train recipes/minilm_cls.yml --base-model base` ended with exit code 3; run"
        in ended.output
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.parquet"], "error: absent.parquet: no such file"),
        (["pairs.parquet", "--only", "tfdif"], "error: --only tfdif: expected some of longer, tfidf, siamese"),
        (["pairs.parquet", "--base", "nowhere"], "error: --base nowhere: no config.json there"),
        (["pairs.parquet", "--fold", "5"], "error: pairs.parquet: pairwise.fold is 5, but the folds in the file are 0, 1"),
    ],
)
def test_what_is_broken_is_named_in_one_line(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    pairs_file(tmp_path / "pairs.parquet")
    ended = CliRunner().invoke(compare.main, arguments)
    assert ended.exit_code == 2
    assert ended.output.startswith(message)
    assert ended.output.count("\n") == 1
