"""Judgements of one pair become one row; ids are unique; folds stay where they are when data is added."""

from dataclasses import replace

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preprocess.facts import extract_facts
from preprocess.pairs import PAIRS, Pairs, group_number, make_pairs
from preprocess.sources.rows import ROWS
from preprocess.stream import select_pairs, select_rejected
from tests import tiny


def row(row_id, prompt="p", a="a", b="b", winner="model_a", source="s", file="f", role="train") -> tuple:
    one_hot = [float(winner == verdict) for verdict in ("model_a", "model_b", "tie")]
    if role == "pool":
        winner, one_hot = None, [None] * 3
    return (file, 1, row_id, [prompt], [a], [b], winner, "English", source, role, *one_hot, 1.0, False, None)


def pairs_of(*rows, threshold: float = 0.7, test_share: float = 0.0) -> Pairs:
    """Make pairs in five folds, with their texts, as write_pairs does."""
    frame = pl.DataFrame(rows, schema=ROWS, orient="row").with_row_index("position")
    pairs = make_pairs(extract_facts(frame), 5, threshold, test_share=test_share)
    return replace(pairs, table=select_pairs(frame, pairs.table), dropped=select_rejected(frame, pairs.dropped))


def votes(table: pl.DataFrame) -> list[tuple]:
    return table.select("winner", "weight", pl.col("p_model_a", "p_model_b", "p_tie").round(4)).rows()


@pytest.mark.parametrize(("a", "b"), [("a", "b"), ("b", "a")])
def test_a_pair_judged_in_either_order_becomes_one_row_with_vote_shares_and_the_sides_of_the_first(a, b):
    judgements = [row("1", a=a, b=b), row("2", a=b, b=a), row("3", a=a, b=b), row("4", a=a, b=b, winner="tie")]
    result = pairs_of(*judgements)
    assert result.table.schema == PAIRS
    assert result.table.select("id", "response_a", "response_b").rows() == [("1", [a], [b])]
    assert votes(result.table) == [("model_a", 4.0, 0.5, 0.25, 0.25)]
    assert result.united == {"s": 3}


def test_shares_count_by_weight_but_a_single_judgement_keeps_its_verdict():
    def teacher(row_id, *shares, weight=1.0):
        return (*row(row_id)[:10], *shares, weight, False, None)

    assert votes(pairs_of(teacher("1", 0.2, 0.7, 0.1, weight=3.0)).table)[0][0] == "model_a"
    both = pairs_of(teacher("1", 0.2, 0.7, 0.1, weight=3.0), row("2")).table
    assert both.select("winner", "weight").row(0) == ("model_b", 4.0)
    assert both.select("p_model_a", "p_model_b", "p_tie").row(0) == pytest.approx((0.4, 0.525, 0.075))
    equal = pairs_of(teacher("1", 0.7, 0.3, 0.0), teacher("2", 0.1, 0.5, 0.4)).table
    assert equal["winner"][0] == "tie", "0.7 + 0.1 is a little less than 0.3 + 0.5"


def test_a_pair_that_one_vote_called_bad_on_both_sides_says_so():
    bad = (*row("2", winner="tie")[:14], True, None)
    assert pairs_of(row("1"), bad).table.select("winner", "both_bad").row(0) == ("tie", True)
    assert pairs_of(row("1")).table["both_bad"].to_list() == [False]


def test_an_id_that_is_taken_gets_its_source():
    rows = [row("1", prompt=f"prompt {at}", source=source) for at, source in enumerate("xyyx")]
    assert pairs_of(*rows).table["id"].to_list() == ["1", "y:1", "y:1:2", "x:1"]


@given(st.lists(st.tuples(st.sampled_from(["1", "007", "x:1", "x:1:2", "é"]), st.sampled_from("xy")), min_size=1, max_size=8))
def test_ids_are_unique_texts_that_keep_the_given_id(named):
    ids = pairs_of(*(row(row_id, b=f"b {at}", source=source) for at, (row_id, source) in enumerate(named))).table["id"]
    assert ids.dtype == pl.String
    assert ids.is_unique().all()
    seen = set()
    for unique_id, (row_id, source) in zip(ids, named, strict=True):
        assert unique_id == row_id or unique_id.startswith(f"{source}:{row_id}")
        assert unique_id == row_id or row_id in seen
        seen.add(unique_id)


def test_groups_and_folds_are_hashes_of_the_earliest_prompt():
    result = pairs_of(row("1", prompt="Why is the sky blue today?"), row("2", prompt="why is  the sky blue today??"))
    number = group_number("why is the sky blue today?")
    assert number == 7580162477500060531, "another hash would move every pair to another fold"
    assert result.table["group"].to_list() == [number, number]
    assert result.table["fold"].to_list() == [number % 5] * 2


def test_a_teacher_s_verdict_on_a_pair_never_enters_the_votes_on_it():
    roles = ("train", "train", "extra", "pool", "pool")
    winners = ("model_a", "model_a", "model_b", None, None)
    rows = [row(str(at), winner=winner, role=role) for at, (role, winner) in enumerate(zip(roles, winners, strict=True))]
    result = pairs_of(*rows)
    assert result.table.select("role", "winner", "weight", "p_model_a").rows() == [
        ("train", "model_a", 2.0, 1.0),
        ("extra", "model_b", 1.0, 0.0),
        ("pool", None, 2.0, None),
    ]
    assert result.united == {"s": 1, "s (pool)": 1}


def test_a_share_of_the_groups_becomes_the_lockbox_and_stays_it_when_rows_are_added():
    old, new = rows_of(tiny.pairs(300, seed=1), "old"), rows_of(tiny.pairs(300, seed=2, prefix="new"), "new")
    near_copy = row("copy", prompt=old[0][3][0] + "!", role="train")
    before, after = [pairs_of(*rows, test_share=0.2).table for rows in ([*old, near_copy], [*old, near_copy, *new])]
    assert after.head(before.height).equals(before)
    assert set(before.filter(role="train")["fold"]) == {0, 1, 2, 3, 4}
    lockbox = after.filter(role="test")
    assert 0.15 < lockbox.height / after.height < 0.25
    assert lockbox["fold"].null_count() == lockbox.height
    assert set(lockbox["group"]).isdisjoint(after.filter(role="train")["group"])


def test_extra_and_pool_rows_like_the_lockbox_are_dropped_with_their_reason():
    sky, sea = "Why is the sky blue today?", "How deep is the sea over there?"
    rows = [row("1", prompt=sea)]
    for role in ("extra", "pool"):
        rows += [row(f"{role} sky", prompt=sky + "?", role=role), row(f"{role} sea", prompt=sea, role=role)]
    result = pairs_of(*rows, row("secret", prompt=sky, role="test"))
    kept = result.table.select("id", "role", "fold").rows()
    fold = group_number("how deep is the sea over there?") % 5
    expected = [("1", "train", fold), ("extra sea", "extra", fold), ("pool sea", "pool", fold), ("secret", "test", None)]
    assert kept == expected
    assert result.dropped.select("id", "reason").rows() == [
        ("extra sky", "prompt is like one of the lockbox"),
        ("pool sky", "prompt is like one of the lockbox"),
    ]


def rows_of(table: pl.DataFrame, file: str) -> list[tuple]:
    columns = table.select("id", "prompt", "response_a", "response_b", "winner")
    return [row(*values, file=file) for values in columns.rows()]
