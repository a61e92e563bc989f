"""The benches' own arithmetic, and that their contenders score the same rows alike."""

import numpy as np
import polars as pl
import pytest

from preprocess.core.errors import UserError
from tests.bench import kernel, planner


def test_padding_is_that_of_consecutive_rows():
    assert kernel.padding_of([4, 2, 3, 3], 2) == pytest.approx(1 - 12 / 14)


def test_rows_of_a_file_are_a_fixed_draw_and_turns_are_joined(tmp_path):
    columns = {"prompt": [["a", "b"], ["c"]], "response_a": ["x", "y"], "response_b": ["v", "w"]}
    pl.DataFrame({"id": ["1", "2"], **columns}).write_parquet(tmp_path / "pairs.parquet")
    found = kernel.read_rows(tmp_path / "pairs.parquet", 5)
    assert sorted(found["prompt"]) == ["a\nb", "c"]
    assert found.equals(kernel.read_rows(tmp_path / "pairs.parquet", 5))


@pytest.mark.parametrize("columns, message", [({"id": ["1"], "prompt": ["p"]}, "no column response_a"), (None, "no such file")])
def test_a_file_that_cannot_be_scored_is_one_line(tmp_path, columns, message):
    if columns:
        pl.DataFrame(columns).write_parquet(tmp_path / "pairs.parquet")
    with pytest.raises(UserError, match=message):
        kernel.read_rows(tmp_path / "pairs.parquet", 5)


def test_the_contenders_give_the_same_probabilities(tmp_path):
    rows = kernel.read_rows(None, 3)
    kernel.make_folder(tmp_path / "tiny", "tiny Gemma-2", rows, None, 256)
    found = [kernel.pipeline(tmp_path / "tiny")(), kernel.notebook(tmp_path / "tiny")()]
    found.append(kernel.ours(tmp_path / "tiny", 512, 1)())
    assert [len(each.probabilities) for each in found] == [12, 12, 12]
    for each in found[1:]:
        assert each.probabilities == pytest.approx(found[0].probabilities, abs=1e-5)
    assert len({round(value, 4) for value in found[0].probabilities.values()}) >= 3
    assert kernel.floor(tmp_path / "tiny") > 12 * 2 * 60_000 * 40


def test_the_part_of_a_gain_is_counted_from_none_to_the_whole_second_order():
    first = np.array([[0.6, 0.4], [0.45, 0.55], [0.9, 0.1], [0.52, 0.48]])
    second = np.array([[0.2, 0.8], [0.9, 0.1], [0.9, 0.1], [0.5, 0.5]])
    places, cost = np.array([1, 0, 0, 0]), np.array([1.0, 1.0, 1.0, 1.0])
    points = planner.reached([np.array([0, 1, 2, 3])], first, second, cost, places, pl.Series([1, 2, 3, 4]))
    assert [(point["share"], point["accuracy"]) for point in points if point["share"] in (0, 0.5, 1)] == [
        (0, 0.5),
        (0.5, 1),
        (1, 1),
    ]
    assert points[4]["of_gain"]["mean"] == 1
    assert points[0]["of_gain"]["mean"] == 0


def test_rows_that_the_bias_may_have_decided_come_first_after_the_pilot():
    """The second order takes a tenth from A on average: a lead of A by a tenth is in doubt, one of B is not."""
    first = np.array([[0.7, 0.3], [0.8, 0.2], [0.6, 0.4], [0.4, 0.6], [0.95, 0.05]])
    second = first + np.array([[-0.21, 0.21], [-0.19, 0.19], [0, 0], [0, 0], [0, 0]])
    order = planner.directed(np.array([0, 1]), first, second, np.ones(5))
    assert order.tolist() == [0, 1, 2, 3, 4]
    assert planner.directed(np.array([0, 1]), first, second, np.array([1, 1, 1000.0, 1, 1]))[-1] != 3
