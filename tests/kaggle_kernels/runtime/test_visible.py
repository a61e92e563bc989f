"""The visible run scores rows that no model saw, says what they tell, and predicts the hidden run's finish."""

import json
import math
from dataclasses import replace

import polars as pl
import pytest

from kaggle_kernels.runtime.settings import TimeLimit
from kaggle_kernels.runtime.submission import ModelScores
from kaggle_kernels.runtime.visible import (
    Speed,
    VisibleRows,
    choose_visible_rows,
    measure_quality,
    predict_finish,
    report_quality,
    report_speed,
    share_of_flips,
    visible_lines,
)
from tests import tiny
from tests.kaggle_kernels.runtime.test_submission import LMSYS, WSDM

TWO = ("model_a", "model_b")
ROWS = tiny.pairs(40, seed=3)


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
    return folder


def test_rows_that_every_package_lists_are_chosen_with_their_winners_under_ids_that_no_test_row_has(tmp_path, monkeypatch):
    mount_train(tmp_path)
    folders = [listing(tmp_path, "one", ["row00004", "row00005", "absent"]), listing(tmp_path, "two", ["row00009", "row00005"])]
    chosen = choose_visible_rows(tmp_path, WSDM, folders, {"1", "train:row00004", "train:train:x"})
    new_id = "train:train:train:row00005"
    texts = ROWS.select("prompt", "response_a", "response_b").row(5, named=True)
    assert chosen.rows == ({"id": new_id, **texts, "counts": True},)
    assert chosen.winners == {new_id: ROWS["winner"][5]}
    assert chosen.log_line == "visible run: 1 rows of train.parquet are scored too, held out (fold 0)"
    monkeypatch.setenv("KAGGLE_IS_COMPETITION_RERUN", "1")
    assert choose_visible_rows(tmp_path, WSDM, folders, {"1"}) == VisibleRows()


def test_a_slice_is_the_same_whatever_the_files_order_and_no_longer_than_the_spec_says(tmp_path):
    mount_train(tmp_path)
    folder = listing(tmp_path, "one", ROWS["id"].to_list())
    few = replace(WSDM, visible_rows=5)
    first = [row["id"] for row in choose_visible_rows(tmp_path, few, [folder], set()).rows]
    mount_train(tmp_path, ROWS.sample(fraction=1, shuffle=True, seed=1))
    assert [row["id"] for row in choose_visible_rows(tmp_path, few, [folder], set()).rows] == first
    assert len(first) == 5
    assert first != sorted(first)


def test_lmsys_rows_have_turns_flags_and_whole_numbers_as_ids(tmp_path):
    texts = {"prompt": '["p", "q"]', "response_a": '["a", null]', "response_b": '["b", "c"]'}
    flags = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)]
    rows = [{"id": 2**53 + at, **texts, **dict(zip(LMSYS.columns, flag, strict=True))} for at, flag in enumerate(flags)]
    mount_train(tmp_path, pl.DataFrame(rows), LMSYS, "csv")
    folder = listing(tmp_path, "one", [str(row["id"]) for row in rows])
    found = choose_visible_rows(tmp_path, LMSYS, [folder], set())
    assert found.winners == {
        "train:9007199254740992": "model_a",
        "train:9007199254740993": "model_b",
        "train:9007199254740994": "tie",
        "train:9007199254740995": None,
    }
    assert (found.rows[0]["prompt"], found.rows[0]["response_a"]) == (["p", "q"], ["a", None])


def test_where_there_is_nothing_to_score_one_line_says_why(tmp_path):
    folder = listing(tmp_path, "one", ["row00004", "x"])
    (tmp_path / "input" / "old").mkdir()

    def reason(settings=WSDM, folders=(folder,)):
        visible = choose_visible_rows(tmp_path, settings, folders, set())
        assert visible.rows == ()
        return visible.log_line

    assert "visible_rows is 0" in reason(replace(WSDM, visible_rows=0))
    assert f"no train.parquet or train.csv of {WSDM.competition} is mounted" in reason()
    assert "old has no validation_ids.json; package the run again" in reason(folders=(folder, tmp_path / "input" / "old"))
    mount_train(tmp_path, ROWS.filter(pl.col("id") != "row00004"))
    assert "train.parquet holds none of the 2 ids" in reason()
    mount_train(tmp_path, ROWS.drop("winner"))
    assert "the train file is not scored: " in reason() and "no column winner; there are id" in reason()
    (tmp_path / "input" / "competitions" / WSDM.competition / "train.parquet").write_bytes(b"no parquet")
    assert "the train file is not scored: " in reason()


@pytest.fixture
def judged():
    """Five rows: two right, one wrong, one tie, one not scored; the first answer is longer in all but the second."""
    lengths = [(9, 1), (1, 9), (9, 1), (9, 1), (9, 1)]
    rows = [{"id": str(at), "prompt": "p", "response_a": "a" * a, "response_b": "b" * b} for at, (a, b) in enumerate(lengths)]
    winners = {"0": "model_a", "1": "model_b", "2": "model_b", "3": "tie", "4": "model_a"}
    scored = {"0": [0.5, 0.5], "1": [0.25, 0.75], "2": [0.8, 0.2], "3": [0.9, 0.1]}
    return VisibleRows(tuple(rows), winners), scored


def test_two_verdicts_are_judged_without_ties_and_three_with_them(judged):
    visible, scored = judged
    assert measure_quality(visible, TWO, scored) == {
        "judged": 3,
        "ties_left_out": 1,
        "accuracy": pytest.approx(2 / 3),
        "standard_error": pytest.approx(0.27217, abs=1e-5),
        "log_loss": pytest.approx((math.log(2) - math.log(0.75) - math.log(0.2)) / 3),
        "longer_accuracy": pytest.approx(2 / 3),
    }
    with_ties = {row_id: [first, 0.05, second] for row_id, (first, second) in scored.items()}
    quality = measure_quality(visible, ("model_a", "model_b", "tie"), with_ties)
    assert (quality["judged"], quality["ties_left_out"], quality["accuracy"], quality["longer_accuracy"]) == (4, 0, 0.25, 0.5)
    assert measure_quality(visible, TWO, {}) == {"judged": 0, "ties_left_out": 1}


def test_a_flip_is_another_verdict_in_the_second_order():
    scores = {
        "1": {"as_given": [0.9, 0.1], "swapped": [0.4, 0.6]},
        "2": {"as_given": [0.9, 0.1], "swapped": [0.6, 0.4]},
        "3": {"as_given": [0.9, 0.1]},
        "not visible": {"as_given": [0.9, 0.1], "swapped": [0.4, 0.6]},
    }
    assert share_of_flips(scores, ["1", "2", "3", "absent"]) == 0.5
    assert share_of_flips(scores, ["3"]) is None


GEMMA = Speed("gemma", loading_seconds=100, tokens_per_second=1000, tokens_per_row=500, orders=2)
LLAMA = Speed("llama", loading_seconds=200, tokens_per_second=2000, tokens_per_row=400, orders=2)


def test_the_finish_is_loading_and_tokens_of_every_order_of_every_model():
    predicted = predict_finish([GEMMA, LLAMA], 50, 20_000, 10_000)
    assert (predicted["first_order_seconds"], predicted["all_seconds"]) == (5150, 14_350)
    assert (predicted["first_share"], predicted["rest_share"]) == (1.0, 1.0)


@pytest.mark.parametrize(
    "speed, clock, first, rest",
    [
        (GEMMA, 2650, 0.5, 0.0),
        (GEMMA, 5150, 1.0, 0.0),
        (GEMMA, 7650, 1.0, 0.5),
        (GEMMA, 90, 0.0, 0.0),
        (replace(GEMMA, tokens_per_second=0.0), 5000, 0.0, 0.0),
        (replace(GEMMA, orders=1), 5000, 0.97, 0.0),
        (replace(GEMMA, orders=1), 5150, 1.0, 1.0),
    ],
)
def test_a_short_clock_allows_a_share(speed, clock, first, rest):
    predicted = predict_finish([speed], 50, clock, 10_000)
    assert (predicted["first_share"], predicted["rest_share"]) == (pytest.approx(first, abs=1e-3), rest)


def test_the_report_is_json_and_its_lines_say_it(judged):
    visible, scored = judged
    scores = {row_id: {"as_given": values, "swapped": values[::-1]} for row_id, values in scored.items()}
    report = report_quality(visible, TWO, scored, {"gemma": ModelScores(TWO, scores)}) | report_speed([GEMMA], 50, WSDM)
    assert json.loads(json.dumps(report)) == report
    assert (report["rows"], report["scored"], report["flips"]) == (5, 4, {"gemma": 0.75})
    quality, speed, public, final = visible_lines(report)
    assert "accuracy 0.6667 ± 0.5443 (two standard errors), log loss 0.8634 on 3 rows (ties left out: 1), " in quality
    assert "gemma flips 0.750" in quality
    assert "gemma: 2.00 rows/s in one order, 1000 tokens/s, 500 tokens a row, loaded in 100 s" in speed
    assert public.endswith("10,000 rows: every row scored once after 1 h 26 min, all done after 2 h 49 min of 4 h 40 min")
    assert final.endswith("25,000 rows: every row scored once after 3 h 31 min, all done after 6 h 59 min of 11 h 55 min")


@pytest.mark.parametrize(
    "speed, clock, line",
    [
        (replace(GEMMA, tokens_per_second=1e5), 600, "scored once after 275 s, all done after 400 s of 570 s"),
        (GEMMA, 9300, "warning: predicted for 25,000 rows: 2 h 30 min are enough for 71% of them; the others would get"),
        (GEMMA, 17_100, "every row scored once after 3 h 31 min, 33% of all else within 4 h 40 min"),
    ],
    ids=["in seconds", "a clock too short for every row", "for the second order"],
)
def test_the_finish_of_the_final_phase_is_told(speed, clock, line):
    report = report_speed([speed], 50, replace(WSDM, time_limits=(TimeLimit(None, clock),)))
    assert line in visible_lines(report)[-1]


def test_of_rows_that_were_trained_on_only_the_speed_is_told(tmp_path, judged):
    mount_train(tmp_path)
    folders = [listing(tmp_path, "one", ["row00004"]), listing(tmp_path, "two", ["row00004"], "all", True)]
    chosen = choose_visible_rows(tmp_path, WSDM, folders, set())
    assert chosen.trained_on
    assert "rows that a model was trained on: they tell of speed only" in chosen.log_line
    report = report_quality(replace(judged[0], trained_on=True), TWO, judged[1], {"gemma": ModelScores(TWO, {})})
    assert not {"quality", "flips"} & set(report)
    assert not any("accuracy" in line for line in visible_lines(report | report_speed([GEMMA], 50, WSDM)))
