"""The benches' own arithmetic, and that their contenders do the same work."""

import json

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

from preprocess.core.errors import UserError
from tests.bench import __main__ as bench
from tests.bench import kernel, planner


def test_encoding_is_timed_beside_the_tokenizer_s_own_and_gives_the_same_ids():
    figures = json.loads(CliRunner().invoke(bench.main, ["input", "--rows", "40"]).output)
    assert figures["one_by_one_gives_the_same_ids"] is True
    assert figures["ratio"] > 0


def test_rows_of_a_file_are_a_fixed_draw_and_turns_are_joined(tmp_path):
    columns = {"prompt": [["a", "b"], ["c"]], "response_a": ["x", "y"], "response_b": ["v", "w"]}
    pl.DataFrame({"id": ["1", "2"], **columns}).write_parquet(tmp_path / "pairs.parquet")
    rows = kernel.read_rows(tmp_path / "pairs.parquet", 5)
    assert sorted(rows["prompt"]) == ["a\nb", "c"]
    assert rows.equals(kernel.read_rows(tmp_path / "pairs.parquet", 5))


def test_a_file_without_a_column_is_one_line(tmp_path):
    pl.DataFrame({"id": ["1"], "prompt": ["p"]}).write_parquet(tmp_path / "pairs.parquet")
    with pytest.raises(UserError, match="no column response_a"):
        kernel.read_rows(tmp_path / "pairs.parquet", 5)


def test_the_contenders_give_the_same_probabilities(tmp_path):
    rows = kernel.read_rows(None, 3)
    kernel.make_folder(tmp_path / "tiny", "tiny Gemma-2", rows, base=None, budget=256)
    first = kernel.pipeline(tmp_path / "tiny")
    assert len(first.probabilities) == 12
    assert len({round(value, 4) for value in first.probabilities.values()}) >= 3
    assert kernel.notebook(tmp_path / "tiny").probabilities == pytest.approx(first.probabilities, abs=1e-5)
    ours = kernel.ours(tmp_path / "tiny", tokens_per_batch=512, workers=1)
    assert ours.probabilities == pytest.approx(first.probabilities, abs=1e-5)
    assert kernel.floor(tmp_path / "tiny") > 12 * 2 * 60_000 * 40
    assert kernel.padding_of([4, 2, 3, 3], batch_size=2) == pytest.approx(1 - 12 / 14)


def test_the_part_of_a_gain_is_counted_from_none_to_the_whole_second_order():
    first = np.array([[0.6, 0.4], [0.45, 0.55], [0.9, 0.1], [0.52, 0.48]])
    second = np.array([[0.2, 0.8], [0.9, 0.1], [0.9, 0.1], [0.5, 0.5]])
    scored = planner.Scored(first, second, np.ones(4), np.array([1, 0, 0, 0]), planner.resample(np.arange(4)))
    measured = [planner.measure_choice([np.arange(count)], scored) for count in (0, 2, 4)]
    assert [values["accuracy"] for values in measured] == [0.5, 1, 1]
    assert [values["of_gain"][0] for values in measured] == [0, 1, 1]
    assert planner.take_affordable(np.array([2, 0, 1]), np.ones(3)).tolist() == [2]
