"""The visible run scores rows that no model saw, says what they tell, and predicts the hidden run's finish."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import polars as pl
import pytest

from kaggle_kernels.runtime.settings import start_clock
from kaggle_kernels.runtime.visible import (
    VisibleRows,
    choose_visible_rows,
    describe_finish,
    describe_quality,
    measure_quality,
    predict_finish,
)
from tests import tiny
from tests.kaggle_kernels.runtime.test_submission import LMSYS, WSDM

TWO = ("model_a", "model_b")
ROWS = tiny.pairs(40, seed=3)
CLOCK = start_clock(600)


@pytest.fixture(autouse=True)
def visible_run(monkeypatch):
    monkeypatch.delenv("KAGGLE_IS_COMPETITION_RERUN", raising=False)


def mount_train(root, rows=ROWS, settings=WSDM, suffix="parquet"):
    folder = root / "input" / "competitions" / settings.competition
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"train.{suffix}"
    rows.write_parquet(path) if suffix == "parquet" else rows.write_csv(path)


def listing(root, name, ids, fold=0, trained_on=False):
    folder = root / "input" / name
    folder.mkdir(parents=True, exist_ok=True)
    told = {"fold": fold, "trained_on": trained_on, "ids": ids}
    (folder / "validation_ids.json").write_text(json.dumps(told))
    return SimpleNamespace(folder=folder)


def test_rows_that_every_package_lists_are_chosen_with_their_winners_under_new_ids(tmp_path, monkeypatch, capsys):
    mount_train(tmp_path)
    packages = [
        listing(tmp_path, "one", ["row00004", "row00005", "absent"]),
        listing(tmp_path, "two", ["row00009", "row00005"]),
    ]
    chosen = choose_visible_rows(tmp_path, WSDM, packages, CLOCK)
    texts = ROWS.select("prompt", "response_a", "response_b").row(5, named=True)
    assert chosen.rows == ({"id": "train:row00005", **texts, "counts": True},)
    assert chosen.winners == {"train:row00005": ROWS["winner"][5]}
    assert capsys.readouterr().out.endswith("visible run: 1 rows of train.parquet are scored too\n")
    monkeypatch.setenv("KAGGLE_IS_COMPETITION_RERUN", "1")
    assert choose_visible_rows(tmp_path, WSDM, packages, CLOCK) == VisibleRows()


def test_a_slice_is_the_same_whatever_the_files_order_and_no_longer_than_the_spec_says(tmp_path):
    mount_train(tmp_path)
    package = listing(tmp_path, "one", ROWS["id"].to_list())
    few = replace(WSDM, visible_rows=5)
    first = [row["id"] for row in choose_visible_rows(tmp_path, few, [package], CLOCK).rows]
    mount_train(tmp_path, ROWS.sample(fraction=1, shuffle=True, seed=1))
    assert [row["id"] for row in choose_visible_rows(tmp_path, few, [package], CLOCK).rows] == first
    assert len(first) == 5
    assert first != sorted(first)


def test_lmsys_rows_have_turns_flags_and_whole_numbers_as_ids(tmp_path):
    texts = {"prompt": '["p", "q"]', "response_a": '["a", null]', "response_b": '["b", "c"]'}
    flags = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)]
    rows = [{"id": 2**53 + at, **texts, **dict(zip(LMSYS.columns, flag, strict=True))} for at, flag in enumerate(flags)]
    mount_train(tmp_path, pl.DataFrame(rows), LMSYS, "csv")
    package = listing(tmp_path, "one", [str(row["id"]) for row in rows])
    found = choose_visible_rows(tmp_path, LMSYS, [package], CLOCK)
    assert found.winners == {
        "train:9007199254740992": "model_a",
        "train:9007199254740993": "model_b",
        "train:9007199254740994": "tie",
        "train:9007199254740995": None,
    }
    assert (found.rows[0]["prompt"], found.rows[0]["response_a"]) == (["p", "q"], ["a", None])


def test_where_there_is_nothing_to_score_one_line_says_why(tmp_path, capsys):
    package = listing(tmp_path, "one", ["row00004", "x"])
    (tmp_path / "input" / "old").mkdir()

    def reason(packages=(package,)):
        assert choose_visible_rows(tmp_path, WSDM, packages, CLOCK) == VisibleRows()
        line = capsys.readouterr().out
        assert "visible run: only test rows are scored: " in line
        return line

    assert "files named train.parquet or train.csv" in reason()
    assert "old/validation_ids.json" in reason(packages=(package, SimpleNamespace(folder=tmp_path / "input" / "old")))
    mount_train(tmp_path, ROWS.filter(pl.col("id") != "row00004"))
    assert "train.parquet holds none of the 2 ids" in reason()
    mount_train(tmp_path, ROWS.drop("winner"))
    assert "no column winner; there are id" in reason()
    (tmp_path / "input" / "competitions" / WSDM.competition / "train.parquet").write_bytes(b"no parquet")
    reason()
    assert choose_visible_rows(tmp_path, replace(WSDM, visible_rows=0), [package], CLOCK) == VisibleRows()


def test_rows_that_a_model_was_trained_on_tell_of_speed_only(tmp_path, capsys):
    mount_train(tmp_path)
    packages = [listing(tmp_path, "one", ["row00004"]), listing(tmp_path, "two", ["row00004"], "all", True)]
    chosen = choose_visible_rows(tmp_path, WSDM, packages, CLOCK)
    assert chosen.trained_on
    assert capsys.readouterr().out.endswith("; a model was trained on them: they tell of speed only\n")


def test_two_verdicts_are_judged_without_ties_and_three_with_them():
    visible = VisibleRows(winners={"0": "model_a", "1": "model_b", "2": "model_b", "3": "tie", "4": "model_a"})
    scored = {"0": [0.5, 0.5], "1": [0.25, 0.75], "2": [0.8, 0.2], "3": [0.9, 0.1]}
    quality = measure_quality(visible, TWO, scored)
    assert quality == {
        "judged": 3,
        "accuracy": pytest.approx(2 / 3),
        "standard_error": pytest.approx(0.27217, abs=1e-5),
        "log_loss": pytest.approx((math.log(2) - math.log(0.75) - math.log(0.2)) / 3),
        "brier_score": pytest.approx((2 * 0.5**2 + 2 * 0.25**2 + 2 * 0.8**2) / 3),
    }
    line = "visible run: accuracy 0.6667 ± 0.5443 (two standard errors), log loss 0.8634, Brier score 0.6350 on 3 rows"
    assert describe_quality(quality) == line
    with_ties = {row_id: [first, 0.05, second] for row_id, (first, second) in scored.items()}
    quality = measure_quality(visible, ("model_a", "model_b", "tie"), with_ties)
    assert (quality["judged"], quality["accuracy"]) == (4, 0.25)
    assert measure_quality(visible, TWO, {}) == {"judged": 0}


def passes(*seconds_of_100_rows):
    keys = [("gemma", "as_given"), ("gemma", "swapped"), ("llama", "as_given")]
    records = [{"run": run, "order": order, "scored": 100} for run, order in keys]
    return [{**record, "seconds": seconds} for record, seconds in zip(records, seconds_of_100_rows, strict=False)]


@pytest.mark.parametrize(
    "records, clock_seconds, line",
    [
        (
            passes(50.0, 40.0, 10.0),
            17_000,
            "every row scored once after 1 h 26 min, everything after 2 h 49 min, with 4 h 43 min",
        ),
        (passes(1.0), 570, "predicted for 10,000 rows: every row scored once after 250 s, everything after 250 s, with 570 s"),
        (passes(50.0), 5149, "warning: predicted for 10,000 rows: "),
    ],
)
def test_the_finish_is_predicted_from_the_seconds_of_every_pass(records, clock_seconds, line):
    left_over = {"run": "gemma", "order": "as_given", "scored": 1, "seconds": 90.0}
    nothing = {**left_over, "scored": 0}
    finish = predict_finish([nothing, *records, left_over], 150.0, 10_000)
    assert line in describe_finish(finish, clock_seconds)
