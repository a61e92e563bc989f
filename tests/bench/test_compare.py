"""`make compare`: the scores and their table, what is reused, the two cheap methods, and the commands of the others."""

import os
from pathlib import Path

import polars as pl
import pytest
from click.testing import CliRunner

from preprocess.core.errors import UserError
from preprocess.core.files import read_json, sha256, write_json
from tests import tiny
from tests.bench import compare

WINNERS = ["model_a", "model_a", "model_b", "tie", "model_b", "model_a"]
LENGTHS_A = [9, 9, 3, 5, 9, 9]
LENGTHS_B = [3, 3, 9, 5, 3, 3]
FOUR = ("row0", "row1", "row2", "row3")


@pytest.fixture
def pairs(tmp_path, monkeypatch):
    """pairs.parquet in the current folder: four pairs in fold 0 (three right by length, a tie), two in fold 1 (one right)."""
    monkeypatch.chdir(tmp_path)
    path = Path("pairs.parquet")
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
    shares = [(pl.col("winner") == name).cast(pl.Float64).alias(f"p_{name}") for name in ("model_a", "model_b", "tie")]
    pl.DataFrame(columns).with_columns(shares).write_parquet(path)
    return path


def run_folder(folder, p_a, pairs, ids=FOUR):
    """A run of fold 0 as training leaves it, with these probabilities of A."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    table = {"id": ids, "p_model_a": p_a, "p_model_b": [1 - p for p in p_a], "p_tie": [0.0] * len(p_a)}
    pl.DataFrame(table).write_parquet(folder / "predictions.parquet")
    values = {"pairs_sha256": sha256(pairs), "fold": 0, "seconds_training": 60.0, "seconds_predicting": 1.5}
    write_json(folder / "metrics.json", values)
    return folder


def test_a_run_is_scored_on_the_folds_rows_and_one_of_other_rows_is_refused(pairs):
    fold = compare.read_fold(pairs, 0)
    scores = compare.score(run_folder("run", [0.5, 0.2, 0.2, 0.8], pairs), fold)
    assert scores["accuracy"] == pytest.approx(2 / 3)  # 0.5 says A; the tie does not count
    assert scores["log_loss"] == pytest.approx((0.693147 + 1.609438 + 0.223144 + (0.223144 + 1.609438) / 2) / 4, abs=1e-5)
    assert (scores["rows"], scores["rows_with_a_winner"], scores["seconds"]) == (4, 3, 61.5)
    assert (scores["accuracy_low"], scores["accuracy_high"]) == (0.5, 1.0)  # group 7 has one of two right, group 8 its one
    with pytest.raises(UserError, match=r"predictions\.parquet: not the rows of fold 0"):
        compare.score(run_folder("other", [0.5, 0.2, 0.2], pairs, ids=FOUR[:3]), fold)


def test_only_a_run_of_the_same_pairs_and_recipe_is_reused(pairs):
    assert compare.find_run("minilm_cls", compare.read_fold(pairs, 0)) is None
    run = run_folder("outputs/minilm_cls/fold-0", [0.5] * 4, pairs)
    assert compare.find_run("minilm_cls", compare.read_fold(pairs, 0)) == run
    os.utime(run / "metrics.json", (0, 0))
    assert compare.find_run("minilm_cls", compare.read_fold(pairs, 0)) is None, "older than the recipe"
    os.utime(run / "metrics.json")
    pl.read_parquet(pairs).with_columns(weight=2.0).write_parquet(pairs)
    assert compare.find_run("minilm_cls", compare.read_fold(pairs, 0)) is None


def test_the_length_is_as_sure_as_the_training_rows_say(pairs):
    """The longer one wins three of fold 0's four pairs, and half of the tie: 0.875."""
    fold = compare.read_fold(pairs, 1)
    assert compare.longer(fold.train, fold.held_out).tolist() == [0.875] * 2


def test_tfidf_learns_words_and_gives_a_swapped_pair_one_minus_p(tmp_path):
    frame = pl.read_parquet(tiny.pairs_parquet(tmp_path / "pairs.parquet", rows=400))
    train_rows, rows = frame.filter(pl.col("fold") != 0), frame.filter(pl.col("fold") == 0)
    p_a = compare.tfidf(train_rows, rows)
    assert ((p_a > 0.5) == (rows["winner"] == "model_a").to_numpy()).mean() > 0.85
    swapped = rows.rename({"response_a": "response_b", "response_b": "response_a"})
    assert compare.tfidf(train_rows, swapped) == pytest.approx(1 - p_a, abs=1e-5)


def test_the_command_trains_what_is_asked_for_shows_what_is_there_and_does_nothing_twice(pairs):
    run_folder("outputs/minilm_reward/fold-0", [0.9] * 4, pairs)
    first = CliRunner().invoke(compare.main, [str(pairs), "--only", "longer"])
    assert first.exit_code == 0, first.output
    assert "longer: training on 2 pairs" in first.output
    assert "minilm_cls: not there, left out" in first.output
    written = read_json(Path("outputs/compare/compare.json"))
    assert [(row["method"], row["accuracy"]) for row in written["methods"]] == [
        ("the longer response", pytest.approx(2 / 3)),
        ("MiniLM, reward head (recipes/minilm_reward.yml)", pytest.approx(2 / 3)),
    ]
    assert (written["fold"], written["groups"], written["training_rows"]) == (0, 3, 2)
    assert "| MiniLM, reward head (recipes/minilm_reward.yml) | 0.667 | 0.000 to 1.000 | 0.929 | 4 | 62 |\n" in first.output
    second = CliRunner().invoke(compare.main, [str(pairs), "--only", "longer"])
    assert "longer: up to date in outputs/longer/fold-0" in second.output
    assert "longer: training" not in second.output


def test_a_recipe_is_trained_by_axolotl_on_these_pairs_and_this_fold(pairs, tmp_path, monkeypatch):
    """A stand-in on the PATH notes how it was called; it fails, and the comparison says how to go on."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text("{}")
    (tmp_path / "axolotl").write_text('#!/bin/sh\necho "$@ $PAIRWISE_PAIRS $PAIRWISE_FOLD" > called\nexit 3\n')
    (tmp_path / "axolotl").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    ended = CliRunner().invoke(compare.main, [str(pairs), "--fold", "1", "--only", "minilm_cls", "--base", "base"])
    assert (tmp_path / "called").read_text() == f"train recipes/minilm_cls.yml --base-model base {pairs} 1\n"
    assert ended.exit_code == 2
    assert "error: `axolotl train recipes/minilm_cls.yml --base-model base` ended with exit code 3" in ended.output
