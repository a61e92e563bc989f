"""Hostile rows: what they hold, what they leave alone, and that a kernel reads them as they were written."""

import json
import random

import polars as pl
import pytest

from kaggle_kernels.rehearsal.adversarial_rows import (
    CHARACTERS,
    KINDS,
    LANGUAGES,
    LONG,
    TEXTS,
    choose_kinds,
    make_hostile,
)
from kaggle_kernels.runtime.inputs import read_rows
from preprocess.model_input import VERDICTS
from tests import tiny


def wsdm(rows):
    return tiny.pairs(rows, seed=3)


def lmsys(rows):
    table = wsdm(rows)
    flags = [pl.when(pl.col("winner") == verdict).then(1).otherwise(0).alias(f"winner_{verdict}") for verdict in VERDICTS]
    texts = [pl.Series(name, [json.dumps([text]) for text in table[name]]) for name in TEXTS]
    return table.with_columns(*flags, *texts).drop("winner")


def of_kind(table, kind):
    return table.filter(pl.col("hostile") == kind).row(0, named=True)


@pytest.mark.parametrize("rows, hostile", [(300, 64), (128, 64), (100, 50), (2, 1), (1, 0), (25_000, 1250)])
def test_a_twentieth_is_hostile_and_each_kind_is_there_unless_half_the_rows_are_too_few(rows, hostile):
    kinds = choose_kinds(rows, random.Random(1))
    assert len(kinds) == hostile
    assert len(set(kinds)) == min(hostile, 64)
    assert (len(KINDS), len(LANGUAGES)) == (64, 31)
    assert sum(kind in LONG for kind in kinds) <= len(LONG) * (1 + rows // 2500)


def test_the_same_seed_gives_the_same_rows_and_another_one_others():
    table = wsdm(200)
    assert make_hostile(table, 1, False).equals(make_hostile(table, 1, False))
    assert not make_hostile(table, 1, False).equals(make_hostile(table, 2, False))


@pytest.mark.parametrize("make, verdicts", [(wsdm, ["winner"]), (lmsys, [f"winner_{verdict}" for verdict in VERDICTS])])
def test_rows_that_are_not_hostile_stay_and_hostile_ones_have_no_verdict(make, verdicts):
    table = make(200)
    made = make_hostile(table, 1, make is lmsys)
    kept = made.filter(pl.col("hostile").is_null()).drop("hostile")
    assert kept.equals(table.filter(pl.col("id").is_in(kept["id"].implode())))
    assert made["id"].equals(table["id"])
    replaced = made.filter(pl.col("hostile").is_not_null() & (pl.col("hostile") != "duplicate"))
    assert replaced.height == 63
    assert replaced.select(verdicts).null_count().row(0) == (63,) * len(verdicts)


@pytest.mark.parametrize("make, are_turns", [(wsdm, False), (lmsys, True)])
def test_a_duplicate_has_the_texts_and_the_verdict_of_a_row_that_stayed(make, are_turns):
    made = make_hostile(make(200), 1, are_turns)
    columns = [*TEXTS, *(name for name in made.columns if name.startswith("winner"))]
    copy = of_kind(made, "duplicate")
    twins = [row for row in made.to_dicts() if [row[name] for name in columns] == [copy[name] for name in columns]]
    assert [row["hostile"] for row in twins if row["id"] != copy["id"]] == [None]


def test_plain_texts_hold_what_their_kind_says():
    made = make_hostile(wsdm(200), 1, False)
    null, empty, turns = (of_kind(made, kind) for kind in ("null", "empty", "null turns"))
    assert [null[name] for name in TEXTS] == [None, None, None]
    assert [empty[name] for name in TEXTS] == ["", "", ""]
    assert [turns[name] for name in TEXTS] == ["a question\n", "\nan answer", "\n"]
    assert of_kind(made, "null prompt")["prompt"] is None
    assert of_kind(made, "lone surrogates")["response_a"] == "a\\udfffb"
    assert of_kind(made, "Hebrew")["prompt"] == "בוקר טוב, מה שלומך?"
    assert "<end_of_turn>" in of_kind(made, "control tokens")["response_a"]


def test_long_rows_have_200_000_characters_in_one_text_or_in_all():
    made = make_hostile(wsdm(200), 1, False)
    lengths = {kind: [len(of_kind(made, kind)[name]) // CHARACTERS for name in TEXTS] for kind in LONG}
    assert CHARACTERS == 200_000
    assert lengths == {
        "a long prompt": [1, 0, 0],
        "a long response": [0, 0, 1],
        "long in all texts": [1, 1, 1],
        "long without spaces": [0, 1, 1],
        "long and Chinese": [1, 1, 0],
        "long and blank": [1, 1, 0],
    }
    assert " " not in of_kind(made, "long without spaces")["response_a"]
    assert of_kind(made, "long and Chinese")["prompt"].isalpha()


def test_in_lmsys_layout_they_are_json_turns_or_on_purpose_not():
    made = make_hostile(lmsys(200), 1, True)
    assert [json.loads(of_kind(made, "null turns")[name]) for name in TEXTS] == [
        ["a question", None],
        [None, "an answer"],
        [None, None],
    ]
    assert [of_kind(made, "no turns")[name] for name in TEXTS] == ["[]", "[]", "[]"]
    assert [of_kind(made, "lone surrogates")[name] for name in TEXTS] == ['["\\ud800"]', '["a\\udfffb"]', '["\\udc00\\ud83d"]']
    assert {of_kind(made, "null")[name] for name in TEXTS} <= {None, "null", "[null]"}
    assert of_kind(made, "broken JSON")["response_a"] == '{"a": '
    with pytest.raises(RecursionError):
        json.loads(of_kind(made, "deep JSON")["prompt"])
    assert len(json.loads(of_kind(made, "many turns")["response_b"])) == 200


def test_lists_of_turns_stay_lists():
    made = make_hostile(wsdm(200).with_columns(pl.concat_list(name).alias(name) for name in TEXTS), 1, False)
    assert [of_kind(made, "uneven turns")[name] for name in TEXTS] == [
        ["one", "two"],
        ["an answer"],
        ["one answer", "two", "three"],
    ]
    assert of_kind(made, "null")["prompt"] is None
    assert of_kind(made, "lone surrogates")["prompt"] == ["\\ud800"]


@pytest.mark.parametrize("make, are_turns", [(wsdm, False), (lmsys, True)])
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_the_kernel_reads_each_text_as_it_was_made(tmp_path, make, are_turns, suffix):
    made = make_hostile(make(200), 1, are_turns).select("id", *TEXTS)
    path = tmp_path / f"test.{suffix}"
    made.write_csv(path) if suffix == "csv" else made.write_parquet(path)
    read = read_rows(path, are_turns=False)
    expected = made.fill_null("") if suffix == "csv" else made
    assert read == expected.to_dicts()
    assert len(read_rows(path, are_turns=are_turns)) == 200
