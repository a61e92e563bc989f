"""Human verdicts in either layout, and the kernel's probabilities measured against them."""

import polars as pl
import pytest

from kaggle_kernels.rehearsal.verdicts import measure_quality, read_verdicts
from preprocess.competitions import COMPETITIONS
from preprocess.core.errors import UserError
from tests import tiny
from tests.kaggle_kernels.rehearsal.layouts import SPEC

WSDM, LMSYS = COMPETITIONS["wsdm"], COMPETITIONS["lmsys"]


def test_verdicts_are_read_from_either_layout():
    texts = {"response_a": ["a", "a", "aaa", "a"], "response_b": ["b", "bb", "bb", None]}
    flags = {
        "winner_model_a": ["0", "0", "1", None],
        "winner_model_b": ["1", "0", "0", None],
        "winner_tie": ["0", "1", "0", None],
    }
    winners = ["model_b", "tie", "model_a", None]
    expected = {"id": ["1", "2", "3", "4"], "winner": winners, "longer": ["model_a", "model_b", "model_a", "model_a"]}
    for competition, columns in ((LMSYS, flags), (LMSYS, {"winner": winners}), (WSDM, {"winner": winners})):
        truth = read_verdicts(pl.DataFrame({"id": [1, 2, 3, 4], **texts, **columns}), competition, "test.csv")
        assert truth.to_dict(as_series=False) == expected
    assert read_verdicts(pl.DataFrame({"id": [1, 2, 3, 4], **texts}), LMSYS, "test.csv") is None


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"winner": "modelA"}, "x.csv, row 1 (id row00000): winner is 'modelA'; expected model_a, model_b or tie"),
        ({"winner_model_a": 1, "winner_model_b": 1, "winner_tie": 0}, "winner_tie is 0; expected a 1 for the winner"),
        ({"winner_model_a": 1, "winner_model_b": 0}, "x.csv: no column winner_tie, but there is winner_model_a"),
        ({"winner_model_a": "x", "winner_model_b": "0", "winner_tie": "0"}, "winner_model_a is 'x', "),
    ],
)
def test_verdicts_that_make_no_sense_are_refused_with_their_row(columns, message):
    constants = {name: pl.lit(value) for name, value in columns.items()}
    rows = tiny.pairs(3, seed=1).drop("winner").with_columns(**constants)
    with pytest.raises(UserError) as raised:
        read_verdicts(rows, LMSYS, "x.csv")
    assert message in str(raised.value)


def test_accuracy_and_log_loss_are_joined_by_id_over_the_rows_with_a_verdict_of_the_competition(tmp_path):
    rows = pl.DataFrame(
        {
            "id": ["1", "2", "3", "4"],
            "response_a": ["aa", "a", "a", "a"],
            "response_b": ["b", "bb", "bb", "bb"],
            "winner": ["model_a", "model_a", "tie", None],
        }
    )
    scores = pl.DataFrame({"id": ["4", "3", "2", "1"], "p_model_a": [0.5, 0.5, 0.25, 0.5], "p_model_b": [0.5, 0.5, 0.75, 0.5]})
    scores.write_parquet(tmp_path / "scores.parquet")
    quality = measure_quality(rows, tmp_path / "scores.parquet", SPEC)
    metrics = {"accuracy": 0.5, "log_loss": pytest.approx(1.0397207708), "brier_score": (0.5 + 2 * 0.75**2) / 2}
    assert quality == {"judged": 2, **metrics, "longer_accuracy": 0.5}
    assert measure_quality(rows.tail(2), tmp_path / "scores.parquet", SPEC) == {}
