"""Adversarial rows: what they hold, what they leave alone, and that a kernel reads them as they were written."""

import random

import polars as pl
import pytest

from kaggle_kernels.rehearsal.adversarial_rows import add_adversarial_rows, choose_kinds
from kaggle_kernels.rehearsal.adversarial_texts import KINDS, LANGUAGES, LONG
from kaggle_kernels.runtime.inputs import read_rows
from preprocess.competitions import COMPETITIONS
from preprocess.sources.rows import TEXTS
from tests import tiny
from tests.kaggle_kernels.rehearsal.layouts import FLAGS, in_lmsys_layout

PAIRS = tiny.pairs(200, seed=3)
WSDM, LMSYS = COMPETITIONS["wsdm"], COMPETITIONS["lmsys"]
LAYOUTS = {  # a table, and the competition whose layout it has
    "wsdm": (PAIRS, WSDM),
    "lmsys": (in_lmsys_layout(PAIRS), LMSYS),
    "turns": (PAIRS.with_columns(pl.concat_list(name).alias(name) for name in TEXTS), WSDM),
}


def adversarial(layout):
    table, competition = LAYOUTS[layout]
    return add_adversarial_rows(table, 1, competition)


def texts_of(table, kind):
    return list(table.filter(pl.col("hostile") == kind).select(TEXTS).row(0))


@pytest.mark.parametrize("rows, number", [(300, 64), (128, 64), (100, 50), (2, 1), (1, 0), (25_000, 1250)])
def test_a_twentieth_is_replaced_and_each_kind_is_there_unless_half_the_rows_are_too_few(rows, number):
    kinds = choose_kinds(rows, random.Random(1))
    assert len(kinds) == number
    assert len(set(kinds)) == min(number, 64)
    assert (len(KINDS), len(LANGUAGES)) == (64, 31)
    assert sum(kind in LONG for kind in kinds) <= 6 * (1 + rows // 2500)


@pytest.mark.parametrize("layout, verdicts", [("wsdm", ["winner"]), ("lmsys", FLAGS)])
def test_other_rows_stay_and_only_a_duplicate_has_a_verdict_that_of_its_twin(layout, verdicts):
    before, after = LAYOUTS[layout][0], adversarial(layout)
    kept = after.filter(pl.col("hostile").is_null()).select(before.columns)
    assert kept.equals(before.filter(pl.col("id").is_in(kept["id"].implode())))
    assert after["id"].equals(before["id"])
    replaced = after.filter(pl.col("hostile").is_not_null() & (pl.col("hostile") != "duplicate"))
    assert replaced.height == 63
    assert replaced.select(verdicts).null_count().row(0) == (63,) * len(verdicts)
    duplicate = after.filter(pl.col("hostile") == "duplicate")
    assert kept.join(duplicate, on=[*TEXTS, *verdicts], how="semi").height == 1


def test_rows_count_or_not_or_nobody_knows_and_a_file_may_lack_the_column():
    before = PAIRS.with_columns(scored=pl.int_range(pl.len()) % 2 == 0)
    after = add_adversarial_rows(before, 1, WSDM)
    is_hostile = pl.col("hostile").is_not_null()
    assert after.filter(~is_hostile)["scored"].equals(before.filter(after["hostile"].is_null())["scored"])
    assert set(after.filter(is_hostile)["scored"]) == {True, False, None}
    assert set(add_adversarial_rows(PAIRS, 1, WSDM)["scored"]) == {True, False, None}
    assert "scored" not in add_adversarial_rows(before, 3, WSDM).columns
    assert "scored" not in adversarial("lmsys").columns


@pytest.mark.parametrize(
    "layout, kind, texts",
    [
        ("wsdm", "null", [None, None, None]),
        ("wsdm", "null turns", ["a question\n", "\nan answer", "\n"]),
        ("wsdm", "lone surrogates", ["\\ud800", "a\\udfffb", "\\udc00\\ud83d"]),
        ("lmsys", "null turns", ['["a question", null]', '[null, "an answer"]', "[null, null]"]),
        ("lmsys", "no turns", ["[]", "[]", "[]"]),
        ("lmsys", "lone surrogates", ['["\\ud800"]', '["a\\udfffb"]', '["\\udc00\\ud83d"]']),
        ("lmsys", "broken JSON", ['["a question', '{"a": ', '["\\"]"]']),
        ("turns", "null", [None, None, None]),
        ("turns", "null turns", [["a question", None], [None, "an answer"], [None, None]]),
        ("turns", "uneven turns", [["one", "two"], ["an answer"], ["one answer", "two", "three"]]),
        ("turns", "lone surrogates", [["\\ud800"], ["a\\udfffb"], ["\\udc00\\ud83d"]]),
    ],
)
def test_texts_are_stored_as_their_layout_stores_texts(layout, kind, texts):
    assert texts_of(adversarial(layout), kind) == texts


def test_a_null_of_lmsys_has_any_of_its_spellings():
    assert set(texts_of(adversarial("lmsys"), "null")) <= {None, "null", "[null]"}


def test_long_rows_have_200_000_characters_in_one_text_or_in_all():
    table = adversarial("wsdm")
    assert {kind: [len(text) // 200_000 for text in texts_of(table, kind)] for kind in LONG} == {
        "a long prompt": [1, 0, 0],
        "a long response": [0, 0, 1],
        "long in all texts": [1, 1, 1],
        "long without spaces": [0, 1, 1],
        "long and Chinese": [1, 1, 0],
        "long and blank": [1, 1, 0],
    }
    assert " " not in texts_of(table, "long without spaces")[1]
    assert texts_of(table, "long and Chinese")[0].isalpha()


@pytest.mark.parametrize("layout", ["wsdm", "lmsys"])
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_the_kernel_reads_each_text_as_it_was_written(tmp_path, layout, suffix):
    table = adversarial(layout).select(pl.col("id").cast(pl.String), *TEXTS)
    path = tmp_path / f"test.{suffix}"
    table.write_csv(path) if suffix == "csv" else table.write_parquet(path)
    expected = table.fill_null("") if suffix == "csv" else table
    assert read_rows(path, are_turns=False) == expected.with_columns(counts=True).to_dicts()
    assert len(read_rows(path, LAYOUTS[layout][1].texts_are_turns)) == 200
