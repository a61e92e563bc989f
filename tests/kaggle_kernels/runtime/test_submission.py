"""A submission is whole or it is not written."""

import polars as pl
import pytest

from kaggle_kernels.build.spec import Spec, settings_of
from kaggle_kernels.runtime.submission import (
    check_ids,
    fill_unscored,
    prior,
    soften,
    to_competition,
    weighted_mean,
    write_scores,
    write_submission,
)

PACKAGES = [{"run": "r", "dataset": "tiny-r"}]
WSDM, LMSYS = (
    settings_of("test", Spec(title="Title", competition=competition, packages=PACKAGES), [])
    for competition in ("wsdm", "lmsys")
)
WSDM_SCORES = {"9": [0.25, 0.75], "1": [0.5, 0.5], "x": [0.9, 0.1]}


@pytest.mark.parametrize(
    "settings, probabilities, expected",
    [
        (WSDM, WSDM_SCORES, "id,winner\n9,model_b\n1,model_a\nx,model_a\n"),
        (LMSYS, {"9": [0.5, 0.25, 0.25]}, "id,winner_model_a,winner_model_b,winner_tie\n9,0.5,0.25,0.25\n"),
    ],
)
def test_wsdm_names_the_winner_and_lmsys_gives_three_probabilities(tmp_path, settings, probabilities, expected):
    write_submission(tmp_path / "submission.csv", settings, probabilities, list(probabilities))
    assert (tmp_path / "submission.csv").read_text() == expected


@pytest.mark.parametrize("written", [["1"], ["2", "1"], ["1", "1"], ["1", "2", "3"]])
def test_ids_that_are_not_those_of_the_test_file_are_found(tmp_path, written):
    (tmp_path / "submission.csv").write_text("\n".join(["id,winner", *(f"{row_id},model_a" for row_id in written)]))
    with pytest.raises(ValueError, match=f"its {len(written)} ids are not the test file's 2 in their order"):
        check_ids(tmp_path / "submission.csv", ["1", "2"])


def test_a_submission_without_the_test_files_ids_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match="its 3 ids are not the test file's 3 in their order"):
        write_submission(tmp_path / "submission.csv", WSDM, WSDM_SCORES, ["09", "1", "x"])
    assert list(tmp_path.iterdir()) == []


def test_ids_that_csv_must_quote_are_read_back_as_they_were(tmp_path):
    ids = ['a,"b"', " 7 ", "line\nend", "'", "河", "1e5", "007"]
    write_submission(tmp_path / "submission.csv", WSDM, dict.fromkeys(ids, [0.25, 0.75]), ids)
    assert pl.read_csv(tmp_path / "submission.csv", infer_schema=False)["id"].to_list() == ids


def test_rows_without_a_score_get_the_prior_the_longer_answer():
    rows = [
        {"id": "1", "response_a": "long enough", "response_b": "short"},
        {"id": "2", "response_a": "short", "response_b": ["turn", None, "turn"]},
        {"id": "3", "response_a": None, "response_b": ""},
        {"id": "4", "response_a": "scored", "response_b": "scored"},
    ]
    filled = fill_unscored(rows, {"4": [0.1, 0.9]}, ("model_a", "model_b"))
    assert filled == {"1": [0.6, 0.4], "2": [0.4, 0.6], "3": [0.6, 0.4], "4": [0.1, 0.9]}
    assert prior(rows[1], ("model_a", "model_b", "tie")) == [0.25, 0.45, 0.3]


def test_a_tie_that_the_competition_does_not_know_is_dropped_and_the_rest_renormalised():
    assert to_competition([0.5, 0.125, 0.375], ("tie", "model_b", "model_a"), ("model_a", "model_b")) == [0.75, 0.25]
    assert to_competition([0.5, 0.2, 0.3], ("tie", "model_b", "model_a"), ("model_a", "model_b", "tie")) == [0.3, 0.2, 0.5]
    assert to_competition([1.0, 0.0, 0.0], ("tie", "model_b", "model_a"), ("model_a", "model_b")) == [0.5, 0.5]


def test_the_mean_is_weighted_over_the_models_that_scored_the_row():
    assert weighted_mean([[1.0, 0.0], [0.0, 1.0]], [0.75, 0.25]) == [0.75, 0.25]
    assert weighted_mean([[0.25, 0.75]], [0.5]) == [0.25, 0.75]


def test_a_temperature_above_one_makes_answers_less_sure_and_keeps_their_order():
    assert soften([0.8, 0.2], 1.0) == pytest.approx([0.8, 0.2])
    assert soften([0.8, 0.2], 2.0) == pytest.approx([2 / 3, 1 / 3])
    assert soften([1.0, 0.0], 1.0) == pytest.approx([1 - 1e-6, 1e-6])
    assert soften([0.2, 0.0, 0.8], 0.3)[1] > 0


def test_scores_hold_every_probability_and_nulls_where_a_model_gave_none(tmp_path):
    final = {"2": [0.1, 0.9], "1": [0.5, 0.5], "3": [0.6, 0.4]}
    write_scores(tmp_path / "s.parquet", WSDM.verdicts, final, {"1": [], "2": []}, {"gemma_p_tie_swapped": {"1": 0.25}})
    assert pl.read_parquet(tmp_path / "s.parquet").to_dict(as_series=False) == {
        "id": ["2", "1", "3"],
        "scored": [True, True, False],
        "p_model_a": [0.1, 0.5, 0.6],
        "p_model_b": [0.9, 0.5, 0.4],
        "gemma_p_tie_swapped": [None, 0.25, None],
    }
