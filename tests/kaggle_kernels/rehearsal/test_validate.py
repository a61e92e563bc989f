"""A kernel's results, valid and wrong in every way that Kaggle would refuse or score badly."""

import csv

import polars as pl
import pytest

from kaggle_kernels.rehearsal.validate import check_results, choose_tolerance
from preprocess.competitions import COMPETITIONS
from preprocess.core.errors import UserError
from preprocess.core.files import write_json

ROWS = pl.DataFrame(
    {"id": [30, 1, 200], "prompt": ["p", "q", "p"], "response_a": ["a", "b", "a"], "response_b": ["b", None, "b"]}
)
WSDM = {
    "id": ["30", "1", "200"],
    "scored": [True, True, False],
    "p_model_a": [0.75, 0.4, 0.6],
    "p_model_b": [0.25, 0.6, 0.4],
    "two_p_model_a_as_given": [0.75, 0.4, None],
}
LMSYS = {**WSDM, "p_model_b": [0.125, 0.4, 0.25], "p_tie": [0.125, 0.2, 0.15]}
ANSWERS = {"wsdm": [["model_a"], ["model_b"], ["model_a"]], "lmsys": [[0.75, 0.125, 0.125], [0.4, 0.4, 0.2], [0.6, 0.25, 0.15]]}


def write(folder, competition, scores=None, lines=None, header=None):
    pl.DataFrame(scores or {"wsdm": WSDM, "lmsys": LMSYS}[competition]).write_parquet(folder / "scores.parquet")
    with open(folder / "submission.csv", "w", newline="") as file:
        rows = [[row_id, *answer] for row_id, answer in zip(WSDM["id"], ANSWERS[competition], strict=True)]
        csv.writer(file).writerows([header or ["id", *COMPETITIONS[competition].columns], *(lines or rows)])


def check(folder, competition, tolerance=1e-5):
    return check_results(folder, ROWS, COMPETITIONS[competition], tolerance)


@pytest.mark.parametrize("competition", ["wsdm", "lmsys"])
def test_a_good_submission_passes(tmp_path, competition):
    write(tmp_path, competition)
    assert check(tmp_path, competition) == {
        "ids": 3,
        "scored": 2,
        "by_model": {"two": 2},
        "tolerance": 1e-5,
        "alike": 2,
        "largest_difference": 0.0,
        "column": None,
        "rows": [],
    }


def refusal_of(folder, competition, tolerance=1e-5):
    with pytest.raises(UserError) as raised:
        check(folder, competition, tolerance)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_wrong_columns_are_refused(tmp_path):
    write(tmp_path, "lmsys", header=["id", "winner_model_a"])
    assert "its columns are id, winner_model_a; lmsys-chatbot-arena wants id, winner_mod" in refusal_of(tmp_path, "lmsys")


A, B, C = ["30", "model_a"], ["1", "model_b"], ["200", "model_a"]


@pytest.mark.parametrize(
    "lines, message",
    [
        ([A, B], ": 1 ids are missing, e.g. 200; a submission needs every id once"),
        ([A, B, C, A], ": 1 ids occur twice or more, e.g. 30; a submission needs every id once"),
        ([A, B, C, ["7", "model_a"]], ": 1 ids are not in the test file, e.g. 7; a submission needs every id once"),
        ([A, B, C, []], ": 1 ids are not in the test file, e.g. ; "),
        ([B, A, C], ", row 1: the id is 1, but the test file has 30 there; write the rows in its order"),
        ([["30", "tie"], B, C], ": id 30: winner is 'tie', expected model_a or model_b"),
        ([["30", "model_a", ""], B, C], ": id 30: 3 values, expected 2"),
        ([["30", "model_b"], B, C], ": id 30: model_b, but scores.parquet has 0.75"),
    ],
)
def test_wrong_ids_and_winners_are_refused_with_an_id(tmp_path, lines, message):
    write(tmp_path, "wsdm", lines=lines)
    assert refusal_of(tmp_path, "wsdm").startswith(f"{tmp_path / 'submission.csv'}{message}")


@pytest.mark.parametrize(
    "values, message",
    [
        ([1, 0, 0], "found 1, 0, 0, expected probabilities between 0 and 1 that sum to one"),
        (["nan", 0.5, 0.5], "found nan, 0.5, 0.5, expected probabilities"),
        (["", 0.5, 0.5], "found , 0.5, 0.5, expected probabilities"),
        ([0.5, 0.4, 0.1], "0.5, 0.4, 0.1, but scores.parquet has 0.75, 0.125, 0.125"),
    ],
)
def test_wrong_probabilities_are_refused_with_their_id(tmp_path, values, message):
    write(tmp_path, "lmsys", lines=[["30", *values], ["1", 0.4, 0.4, 0.2], ["200", 0.6, 0.25, 0.15]])
    assert refusal_of(tmp_path, "lmsys").startswith(f"{tmp_path / 'submission.csv'}: id 30: {message}")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"id": ["30", "1", "2"]}, "1 ids are missing, e.g. 200; a submission needs every id once"),
        ({"p_model_a": [0.75, float("nan"), 0.6]}, "id 1: found nan, 0.6, expected probabilities between 0 and 1 that"),
        ({"p_model_a": [0.75, None, 0.6]}, "id 1: found None, 0.6, expected probabilities"),
        ({"p_model_b": [0.25, 0.7, 0.4]}, "id 1: found 0.4, 0.7, expected probabilities between 0 and 1 that"),
        ({"two_p_model_a_as_given": [0.75, float("nan"), None]}, "id 1: two_p_model_a_as_given is NaN"),
    ],
)
def test_wrong_scores_are_refused_with_their_id(tmp_path, changes, message):
    write(tmp_path, "wsdm", scores={**WSDM, **changes})
    refusal = refusal_of(tmp_path, "wsdm")
    assert refusal.startswith(f"{tmp_path / 'scores.parquet'}") and message in refusal


@pytest.mark.parametrize("name", ["submission.csv", "scores.parquet"])
@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe"])
def test_a_file_that_is_absent_or_damaged_is_refused_in_one_line(tmp_path, name, content):
    write(tmp_path, "wsdm")
    (tmp_path / name).write_bytes(content) if content is not None else (tmp_path / name).unlink()
    assert refusal_of(tmp_path, "wsdm").startswith(f"{tmp_path / name}: ")


def test_rows_of_the_same_texts_may_differ_by_the_tolerance_only(tmp_path):
    final = {"p_model_a": [0.75, 0.4, 0.75], "p_model_b": [0.25, 0.6, 0.25]}
    write(tmp_path, "wsdm", scores={**WSDM, **final, "two_p_model_a_as_given": [0.75, 0.1, 0.7505]})
    checks = check(tmp_path, "wsdm", 1e-3)
    assert (checks["alike"], checks["column"], checks["rows"]) == (2, "two_p_model_a_as_given", ["30", "200"])
    assert checks["largest_difference"] == pytest.approx(5e-4)
    message = "scores.parquet: the ids 30 and 200 have the same texts, and two_p_model_a_as_given differs by 5.0e-04"
    assert message in refusal_of(tmp_path, "wsdm", 1e-5)


def test_final_probabilities_are_compared_where_the_same_models_scored_in_the_same_orders(tmp_path):
    changed = {**WSDM, "p_model_a": [0.75, 0.4, 0.55], "p_model_b": [0.25, 0.6, 0.45]}
    write(tmp_path, "wsdm", scores=changed)
    assert check(tmp_path, "wsdm")["largest_difference"] == 0.0
    write(tmp_path, "wsdm", scores={**changed, "two_p_model_a_as_given": [0.75, 0.4, 0.75]})
    with pytest.raises(UserError, match="have the same texts, and p_model_. differs by 2.0e-01"):
        check(tmp_path, "wsdm")


@pytest.mark.parametrize(
    "config, devices, tolerance",
    [({}, ["cpu", "cpu"], 1e-5), ({"quantization_config": {}}, ["cpu"], 1e-3), ({}, ["cuda:0", "cuda:1"], 1e-3)],
)
def test_sixteen_bits_may_differ_by_more_than_thirty_two(tmp_path, config, devices, tolerance):
    write_json(tmp_path / "config.json", config)
    write_json(tmp_path / "kernel.json", {"devices": devices})
    assert choose_tolerance([tmp_path], tmp_path) == tolerance
