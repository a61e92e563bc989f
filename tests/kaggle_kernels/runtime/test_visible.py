"""The visible run scores rows that no model saw, says what they tell, and predicts the hidden run's finish."""

import json
import math
from dataclasses import replace

import polars as pl
import pytest

from kaggle_kernels.runtime.visible import (
    Speed,
    VisibleRows,
    choose_visible_rows,
    predict_finish,
    quality_of,
    share_of_flips,
    visible_lines,
    visible_report,
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


def test_rows_that_every_package_lists_are_chosen_with_their_winners_under_new_ids(tmp_path):
    mount_train(tmp_path)
    folders = [
        listing(tmp_path, "one", ["row00003", "row00004", "row00005", "absent"]),
        listing(tmp_path, "two", ["row00009", "row00005", "row00004"]),
    ]
    found = choose_visible_rows(tmp_path, WSDM, folders, {"1"})
    assert {row["id"] for row in found.rows} == {"train:row00004", "train:row00005"}
    assert found.winners == {f"train:{row['id']}": row["winner"] for row in ROWS[4:6].iter_rows(named=True)}
    [row] = [row for row in found.rows if row["id"] == "train:row00005"]
    assert row == {"id": "train:row00005", **{name: ROWS[name][5] for name in ("prompt", "response_a", "response_b")}}
    assert found.log_line == "visible run: 2 rows of train.parquet are scored too, held out (fold 0)"


def test_a_slice_is_the_same_whatever_the_files_order_and_no_longer_than_the_spec_says(tmp_path):
    mount_train(tmp_path)
    folder = listing(tmp_path, "one", ROWS["id"].to_list())
    few = replace(WSDM, visible_rows=5)
    first = choose_visible_rows(tmp_path, few, [folder], set())
    mount_train(tmp_path, ROWS.sample(fraction=1, shuffle=True, seed=1))
    assert choose_visible_rows(tmp_path, few, [folder], set()).rows == first.rows
    assert [row["id"] for row in first.rows] != sorted(row["id"] for row in first.rows)
    assert len(first.rows) == 5 and len(choose_visible_rows(tmp_path, WSDM, [folder], set()).rows) == 40


def test_new_ids_are_none_of_the_test_files(tmp_path):
    mount_train(tmp_path)
    folder = listing(tmp_path, "one", ["row00004"])
    [row] = choose_visible_rows(tmp_path, WSDM, [folder], {"1", "train:row00004", "train:train:x"}).rows
    assert row["id"] == "train:train:train:row00004"


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


def test_the_hidden_run_scores_no_train_rows(tmp_path, monkeypatch):
    mount_train(tmp_path)
    folder = listing(tmp_path, "one", ["row00004"])
    monkeypatch.setenv("KAGGLE_IS_COMPETITION_RERUN", "1")
    assert choose_visible_rows(tmp_path, WSDM, [folder], set()) == VisibleRows()


def test_where_there_is_nothing_to_score_one_line_says_why(tmp_path):
    folder = listing(tmp_path, "one", ["row00004", "x"])

    def reason(settings=WSDM, folders=(folder,)):
        visible = choose_visible_rows(tmp_path, settings, folders, set())
        assert visible.rows == ()
        return visible.log_line.removeprefix("visible run: ")

    assert reason(replace(WSDM, visible_rows=0)) == "visible_rows is 0, no row of the train file is scored"
    assert reason() == f"no train.parquet or train.csv of {WSDM.competition} is mounted"
    (tmp_path / "input" / "old").mkdir()
    expected = "old has no validation_ids.json; package the run again to have it measured"
    assert reason(folders=(folder, tmp_path / "input" / "old")) == expected
    mount_train(tmp_path, ROWS.filter(pl.col("id") != "row00004"))
    assert reason() == "train.parquet holds none of the 2 ids that every package lists"
    mount_train(tmp_path, ROWS.drop("winner"))
    assert reason().startswith("the train file is not scored: ") and "no column winner; there are id" in reason()
    path = tmp_path / "input" / "competitions" / WSDM.competition / "train.parquet"
    path.write_bytes(b"no parquet")
    assert reason().startswith("the train file is not scored: ")


@pytest.fixture
def judged():
    """Five rows: two right, one wrong, one tie, one not scored; the first answer is longer in all but the second."""
    lengths = [(9, 1), (1, 9), (9, 1), (9, 1), (9, 1)]
    rows = [{"id": str(at), "prompt": "p", "response_a": "a" * a, "response_b": "b" * b} for at, (a, b) in enumerate(lengths)]
    winners = {"0": "model_a", "1": "model_b", "2": "model_b", "3": "tie", "4": "model_a"}
    scored = {"0": [0.5, 0.5], "1": [0.25, 0.75], "2": [0.8, 0.2], "3": [0.9, 0.1]}
    return VisibleRows(tuple(rows), winners), scored


def test_two_verdicts_are_judged_without_ties(judged):
    assert quality_of(judged[0], TWO, judged[1]) == {
        "judged": 3,
        "ties_left_out": 1,
        "accuracy": pytest.approx(2 / 3),
        "standard_error": pytest.approx(0.27217, abs=1e-5),
        "log_loss": pytest.approx((math.log(2) - math.log(0.75) - math.log(0.2)) / 3),
        "longer_accuracy": pytest.approx(2 / 3),
    }


def test_three_verdicts_are_judged_with_ties(judged):
    scored = {row_id: [*values[:1], 0.05, values[1]] for row_id, values in judged[1].items()}
    found = quality_of(judged[0], ("model_a", "model_b", "tie"), scored)
    assert (found["judged"], found["ties_left_out"], found["accuracy"], found["longer_accuracy"]) == (4, 0, 0.25, 0.5)


def test_without_a_verdict_there_are_no_figures(judged):
    assert quality_of(judged[0], TWO, {}) == {"judged": 0, "ties_left_out": 1}


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
    found = predict_finish([GEMMA, LLAMA], 50, 20_000, 10_000)
    assert found == {
        "rows": 10_000,
        "first_order_seconds": 5150,
        "all_seconds": 14_350,
        "first_share": 1.0,
        "rest_share": 1.0,
    }


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
    report = visible_report(visible, TWO, scored, {"gemma": (TWO, scores)}, [GEMMA], 50, 17_000)
    assert json.loads(json.dumps(report)) == report
    assert (report["rows"], report["scored"], report["flips"]) == (5, 4, {"gemma": 0.75})
    quality, speed, public, final = visible_lines(report)
    assert "accuracy 0.6667 ± 0.5443 (two standard errors), log loss 0.8634 on 3 rows (ties left out: 1), " in quality
    assert quality.endswith("the longer answer: 0.6667, gemma flips 0.750")
    assert "gemma: 2.00 rows/s in one order, 1000 tokens/s, 500 tokens a row, loaded in 100 s" in speed
    assert public.endswith("10,000 rows: every row scored once after 1 h 26 min, all done after 2 h 49 min of 4 h 43 min")
    assert final.endswith("25,000 rows: every row scored once after 3 h 31 min, 35% of all else within 4 h 43 min")


def test_a_small_models_finish_is_told_in_seconds(judged):
    report = visible_report(judged[0], TWO, judged[1], {}, [replace(GEMMA, tokens_per_second=1e5)], 4, 599)
    expected = "predicted for 10,000 rows: every row scored once after 154 s, all done after 204 s of 599 s"
    assert visible_lines(report)[-2] == expected


def test_a_clock_too_short_for_every_row_is_a_warning(judged):
    report = visible_report(judged[0], TWO, judged[1], {}, [GEMMA], 50, 9000)
    assert visible_lines(report)[-1] == (
        "warning: predicted for 25,000 rows: 2 h 30 min are enough for 71% of them; under min_scored nothing is submitted"
    )


def test_of_rows_that_were_trained_on_only_the_speed_is_told(tmp_path, judged):
    mount_train(tmp_path)
    folders = [listing(tmp_path, "one", ["row00004"]), listing(tmp_path, "two", ["row00004"], "all", True)]
    found = choose_visible_rows(tmp_path, WSDM, folders, set())
    assert found.trained_on
    assert found.log_line.endswith("scored too, rows that a model was trained on: they tell of speed only")
    report = visible_report(replace(judged[0], trained_on=True), TWO, judged[1], {"gemma": (TWO, {})}, [GEMMA], 50, 17_000)
    assert not {"quality", "flips"} & set(report)
    assert not any("accuracy" in line for line in visible_lines(report))
