import json

import numpy as np
import polars as pl

from postprocess.agreement.slices import groups_of
from postprocess.agreement.statistics import Column
from postprocess.agreement.table import probability_table, table_lines, without_nan
from tests.postprocess.agreement.compared import TRAINED, column, report

THREE = ("tie", "model_b", "model_a")


def test_the_table_of_probabilities_has_two_rows_a_pair_and_three_columns_a_model():
    rows = pl.DataFrame({"id": ["b", "a"], "prompt": ["", ""], "fold": [0, 1], "winner": ["tie", "model_a"]})
    values = np.array([[[0.1, 0.2, 0.7], [0.2, 0.2, 0.6]], [[0.3, 0.3, 0.4], [0.5, 0.5, 0.0]]])
    found = probability_table(rows, [Column("trained", values, ""), Column("quantised-2", values / 2, "")], THREE)
    assert found.columns == ["id", "fold", "winner", "order"] + [
        f"{name}_p_{verdict}" for name in ("trained", "quantised-2") for verdict in ("model_a", "model_b", "tie")
    ]
    assert found.select("id", "fold", "winner", "order").rows() == [
        ("a", 1, "model_a", "as_given"),
        ("a", 1, "model_a", "swapped"),
        ("b", 0, "tie", "as_given"),
        ("b", 0, "tie", "swapped"),
    ]
    assert found["trained_p_model_a"].to_list() == [0.4, 0.0, 0.7, 0.6]
    assert found["trained_p_tie"].to_list() == [0.3, 0.5, 0.1, 0.2]
    assert found["quantised-2_p_model_b"].to_list() == [0.15, 0.25, 0.1, 0.1]
    of_two = probability_table(rows, [column("trained", *TRAINED)], ("model_a", "model_b"))
    assert of_two.columns[4:] == ["trained_p_model_a", "trained_p_model_b"]


def test_a_row_without_a_group_is_a_group_of_its_own():
    rows = pl.DataFrame({"id": ["a", "b", "c", "7", "e"], "group": [7, 3, 7, None, None]})
    assert len(set(groups_of(rows))) == 4
    assert groups_of(rows)[0] == groups_of(rows)[2]
    assert groups_of(rows.drop("group")).tolist() == [0, 1, 2, 3, 4]


def test_the_lines_hold_the_figures_of_each_model_and_of_the_choice():
    compared = report(quantised=(0.8, 0.6), quantised_2=(0.9, 0.38))
    lines = table_lines(compared)
    assert lines[5] == (
        "  quantised    float16    0.500 [0.00, 1.00]    0.570 [0.22, 0.92]      0.20000   0.15000  0.058892                 1"
    )
    assert lines[7:] == [
        "  packaged: quantised-2, 0.01000 from the model as trained on average (next best quantised: 0.15000)",
        "  quantised-2 less trained, row by row: accuracy +0.0000 [+0.0000, +0.0000], log loss -0.0164 [-0.2247, +0.1919]",
        "  quantised 2 times: mean difference 0.01000 to 0.15000, sd 0.09899; accuracy 0.5000 to 1.0000, sd 0.3536",
        "  6 of 6 conditions hold",
        "  fewer than 20 groups of prompts: the brackets are narrower than they should be",
    ]


def test_what_json_has_no_word_for_becomes_null():
    value = {"a": [float("nan"), 1.0, {"b": float("inf")}], "c": 1, "d": "x", "e": True}
    assert json.dumps(without_nan(value), allow_nan=False) == '{"a": [null, 1.0, {"b": null}], "c": 1, "d": "x", "e": true}'
