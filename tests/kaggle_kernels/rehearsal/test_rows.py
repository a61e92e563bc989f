"""The rows of a rehearsal: drawn, shuffled, with ids of either kind; the same for a seed, each with its own verdict."""

import polars as pl
import pytest

from kaggle_kernels.rehearsal.rows import describe_rows, format_description, make_rows, read_test_rows
from kaggle_kernels.rehearsal.scenario import Scenario
from preprocess.competitions import COMPETITIONS
from preprocess.core.errors import UserError
from tests import tiny
from tests.kaggle_kernels.rehearsal.layouts import SPEC

WSDM = COMPETITIONS["wsdm"]
COLUMNS = ["prompt", "response_a", "response_b", "winner"]


@pytest.fixture
def rows():
    return tiny.pairs(200, seed=3)


def contents(table):
    return list(table.select(COLUMNS).iter_rows())


@pytest.mark.parametrize(
    "write, message",
    [
        (lambda path: None, "no such file"),
        (lambda path: path.write_bytes(b"not parquet"), "cannot be read"),
        (lambda path: pl.DataFrame({"id": ["1"], "prompt": ["p"]}).write_parquet(path), "no column response_a, response_b"),
        (lambda path: tiny.pairs(3, seed=1).clear().write_parquet(path), "no rows"),
        (lambda path: tiny.pairs(3, seed=1).with_columns(prompt=pl.lit(1)).write_parquet(path), "no text in prompt"),
        (lambda path: tiny.pairs(3, seed=1).with_columns(id=pl.lit("x")).write_parquet(path), "the id x occurs twice"),
        (lambda path: tiny.pairs(1, seed=1).with_columns(id=pl.lit(None)).write_parquet(path), "a row has no id"),
    ],
)
def test_a_test_file_that_cannot_be_used_is_refused_in_one_line(tmp_path, write, message):
    path = tmp_path / "broken.parquet"
    write(path)
    with pytest.raises(UserError) as raised:
        read_test_rows(path, SPEC)
    assert str(raised.value).startswith(f"{path}: {message}")
    assert "\n" not in str(raised.value)


def test_without_options_the_rows_are_the_files(rows):
    assert make_rows(rows, Scenario(), WSDM).equals(rows)


def test_fewer_rows_are_drawn_without_replacement_in_the_files_order(rows):
    drawn = make_rows(rows, Scenario(size=50, seed=1), WSDM)
    places = [contents(rows).index(row) for row in contents(drawn)]
    assert len(set(places)) == 50
    assert places == sorted(places)
    assert not set(drawn["id"]) & set(rows["id"])


def test_more_rows_repeat_the_files_each_with_its_verdict_and_an_id_of_its_own(rows):
    drawn = make_rows(rows, Scenario(size=1000, seed=1), WSDM)
    assert drawn.height == drawn["id"].n_unique() == 1000
    assert set(contents(drawn)) <= set(contents(rows))
    assert len(set(contents(drawn))) > 190


def test_shuffling_deals_out_the_same_ids_anew_and_leaves_no_order_of_ids_rows_or_lengths():
    by_length = tiny.pairs(1000, seed=3).sort(pl.col("prompt").str.len_chars())
    shuffled = make_rows(by_length, Scenario(shuffle=True, seed=1), WSDM)
    assert sorted(contents(shuffled)) == sorted(contents(by_length))
    assert set(shuffled["id"]) == set(by_length["id"])
    ranks = shuffled.select(row=pl.int_range(pl.len()), id=pl.col("id").rank(), length=pl.col("prompt").str.len_chars())
    for first, second in (("row", "id"), ("row", "length"), ("id", "length")):
        assert abs(ranks.select(pl.corr(first, second)).item()) < 0.1


def test_int_ids_are_of_64_bits_and_beyond_what_a_float_tells_apart(rows):
    ids = make_rows(rows, Scenario(hostile=True, seed=1), WSDM)["id"]
    assert (ids.dtype, ids.n_unique(), ids.is_sorted()) == (pl.Int64, 200, False)
    assert ids.max() > 2**60
    assert (ids < 2**22).sum() > 20


def test_string_ids_are_hexadecimal_and_the_first_two_look_like_numbers(rows):
    ids = make_rows(rows, Scenario(hostile=True, seed=2), WSDM)["id"]
    assert ids.n_unique() == 200
    assert ids.str.contains(r"^[0-9a-f]{64}$").all()
    assert ids.str.contains(r"^000[1-9]{61}$").to_list()[:3] == [True, False, False]
    assert ids.str.contains(r"^[1-9]{4}e[1-9]{59}$").to_list()[:3] == [False, True, False]


@pytest.mark.parametrize("ids, kind", [(["1", "22"], "int"), (["1", "2a"], "string"), ([3, 4], "int")])
def test_drawn_rows_get_ids_of_the_files_kind(rows, ids, kind):
    options = Scenario(size=5, shuffle=True, seed=1)
    drawn = make_rows(rows.head(2).with_columns(id=pl.Series(ids)), options, WSDM)
    assert format_description(describe_rows(drawn, 2, options)) == f"5 rows of 2, {kind} ids, shuffled; seed 1"


def test_the_same_seed_gives_the_same_rows_and_another_one_others(rows):
    options = {"size": 300, "shuffle": True, "hostile": True}
    first = make_rows(rows, Scenario(seed=1, **options), WSDM)
    assert make_rows(rows, Scenario(seed=1, **options), WSDM).equals(first)
    assert not make_rows(rows, Scenario(seed=3, **options), WSDM).equals(first)
