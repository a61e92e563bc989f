"""The rows of a rehearsal: drawn, shuffled, with ids of either kind; the same for a seed, each with its own verdict."""

import polars as pl
import pytest

from kaggle_kernels.rehearsal.rows import describe, id_kind, make_rows, read_verdicts, sentence
from tests import tiny

COLUMNS = ["prompt", "response_a", "response_b", "winner"]


@pytest.fixture
def rows():
    return tiny.pairs(200, seed=3)


def contents(table):
    return [tuple(row) for row in table.select(COLUMNS).iter_rows()]


def test_nothing_asked_for_leaves_the_file_as_it_is(rows):
    assert make_rows(rows).equals(rows)


def test_fewer_rows_are_drawn_without_replacement_in_the_files_order(rows):
    made = make_rows(rows, size=50, seed=1)
    places = [contents(rows).index(row) for row in contents(made)]
    assert len(set(places)) == 50
    assert places == sorted(places)
    assert not set(made["id"]) & set(rows["id"])


def test_more_rows_repeat_those_there_are_each_with_its_verdict_and_an_id_of_its_own(rows):
    made = make_rows(rows, size=1000, seed=1)
    assert made.height == made["id"].n_unique() == 1000
    assert set(contents(made)) <= set(contents(rows))
    assert len(set(contents(made))) > 190


def test_shuffling_leaves_no_order_of_ids_rows_or_lengths(rows):
    made = make_rows(rows.sort(pl.col("prompt").str.len_chars()), size=1000, ids="int", shuffle=True, seed=1)
    at = made.select(row=pl.int_range(pl.len()), id=pl.col("id").rank(), length=pl.col("prompt").str.len_chars())
    for one, other in (("row", "id"), ("row", "length"), ("id", "length")):
        assert abs(at.select(pl.corr(one, other)).item()) < 0.1
    assert sorted(contents(made)) == sorted(contents(make_rows(rows.sort(pl.col("prompt").str.len_chars()), size=1000, seed=1)))


def test_shuffling_alone_deals_out_the_files_own_ids(rows):
    made = make_rows(rows, shuffle=True, seed=1)
    assert set(made["id"]) == set(rows["id"])
    assert set(contents(made)) == set(contents(rows))
    of = dict(zip(contents(rows), rows["id"], strict=True))
    assert sum(of[row] == row_id for row, row_id in zip(contents(made), made["id"], strict=True)) < 10


def test_int_ids_are_of_64_bits_and_beyond_what_a_float_tells_apart(rows):
    made = make_rows(rows, ids="int", seed=1)
    assert made.schema["id"] == pl.Int64
    assert made["id"].n_unique() == 200
    assert made["id"].max() > 2**60
    assert not made["id"].is_sorted()
    assert (made["id"] < 2**22).sum() > 20
    assert id_kind(made) == "int"


def test_string_ids_are_hexadecimal_and_the_first_two_look_like_numbers(rows):
    ids = make_rows(rows, ids="string", seed=1)["id"]
    assert ids.n_unique() == 200
    assert ids.str.contains(r"^[0-9a-f]{64}$").all()
    assert ids.str.contains(r"^000[1-9]{61}$").to_list()[:3] == [True, False, False]
    assert ids.str.contains(r"^[1-9]{4}e[1-9]{59}$").to_list()[:3] == [False, True, False]


@pytest.mark.parametrize(
    "asked, seed, kind", [(None, 1, "int"), (None, 2, "string"), ("string", 1, "string"), ("int", 2, "int")]
)
def test_hostile_rows_have_int_ids_for_an_odd_seed_unless_told(rows, asked, seed, kind):
    made = make_rows(rows, hostile=True, ids=asked, seed=seed)
    assert id_kind(made) == kind
    assert sentence(describe(made, 200, False, seed)) == (
        f"200 rows of 200, {kind} ids, 64 hostile of 64 of 64 kinds; seed {seed}"
    )


@pytest.mark.parametrize("ids, kind", [(["1", "22"], "int"), (["1", "2a"], "string"), ([3, 4], "int")])
def test_drawn_rows_get_ids_of_the_files_kind(rows, ids, kind):
    table = rows.head(2).with_columns(id=pl.Series(ids))
    made = make_rows(table, size=5, shuffle=True, seed=1)
    assert id_kind(made) == kind
    assert sentence(describe(made, 2, True, 1)) == f"5 rows of 2, {kind} ids, shuffled; seed 1"


def test_the_same_seed_gives_the_same_rows_and_another_one_others(rows):
    options = {"size": 300, "shuffle": True, "hostile": True, "ids": "int"}
    assert make_rows(rows, seed=1, **options).equals(make_rows(rows, seed=1, **options))
    assert not make_rows(rows, seed=2, **options).equals(make_rows(rows, seed=1, **options))


def test_verdicts_are_read_from_either_layout():
    texts = {"response_a": ["a", "a", "aaa"], "response_b": ["b", "bb", "bb"]}
    lmsys = {"winner_model_a": [0, 0, 1], "winner_model_b": [1, 0, 0], "winner_tie": [0, 1, 0]}
    truth = read_verdicts(pl.DataFrame({"id": [1, 2, 3], **texts, **lmsys}), "test.csv")
    assert truth.to_dict(as_series=False) == {
        "id": ["1", "2", "3"],
        "winner": ["model_b", "tie", "model_a"],
        "longer": ["model_a", "model_b", "model_a"],
    }
    assert read_verdicts(pl.DataFrame({"id": [1], "response_a": ["a"], "response_b": ["b"]}), "test.csv") is None
