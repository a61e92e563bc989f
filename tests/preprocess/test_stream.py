"""The two passes over the sources: batches change nothing, and what was read twice was the same."""

import polars as pl
import pytest

from preprocess.core.errors import UserError
from preprocess.pairs import make_pairs
from preprocess.sources import reader
from preprocess.sources.rows import TEXTS
from preprocess.stream import Source, read_facts, write_pairs
from tests import tiny


@pytest.fixture
def sources(tmp_path):
    """Votes, some of them on one pair, one row that cannot be used, and extra rows like some of the lockbox."""
    votes = tiny.pairs(40, seed=1)
    unusable = votes.head(1).with_columns(response_a=pl.lit(""))
    pl.concat([votes, unusable, votes.head(15)]).write_parquet(tmp_path / "votes.parquet")
    votes.with_columns(id="extra " + pl.col("id")).write_csv(tmp_path / "extra.csv")
    return [Source(tmp_path / "votes.parquet", "train"), Source(tmp_path / "extra.csv", "extra")]


def run_both_passes(sources, folder) -> tuple[pl.DataFrame, pl.DataFrame]:
    facts = read_facts(sources)
    assert set(TEXTS).isdisjoint(facts.columns), "responses are held in memory"
    pairs = make_pairs(facts.filter(pl.col("reason").is_null()), 5, 0.7, test_share=0.2)
    write_pairs(sources, pairs, folder / "pairs.parquet", folder / "rejected.parquet")
    return pl.read_parquet(folder / "pairs.parquet"), pl.read_parquet(folder / "rejected.parquet")


def test_the_size_of_the_batches_changes_nothing(sources, tmp_path, monkeypatch):
    pairs, rejected = run_both_passes(sources, tmp_path)
    monkeypatch.setattr(reader, "BATCH_ROWS", 7)
    pairs_by_seven, rejected_by_seven = run_both_passes(sources, tmp_path)
    assert pairs.equals(pairs_by_seven)
    assert rejected.equals(rejected_by_seven)

    # Every row is a pair, part of one, or rejected with its reason.
    assert (pairs.height + rejected.height, pairs["weight"].sum() + rejected.height) == (81, 96)
    unusable, *dropped = rejected.select("row", "id", "reason", "response_b").rows()
    assert unusable[:3] == (41, "row00000", "empty answer")
    assert {reason for _, _, reason, _ in dropped} == {"prompt is like one of the lockbox"}
    originals = {f"extra {row_id}": [text] for row_id, text in tiny.pairs(40, seed=1).select("id", "response_b").rows()}
    assert all(response == originals[row_id] for _, row_id, _, response in dropped)


def test_a_source_that_changes_between_the_passes_is_an_error(sources, tmp_path):
    facts = read_facts(sources)
    pairs = make_pairs(facts.filter(pl.col("reason").is_null()), 5, 0.7)
    pl.read_parquet(sources[0].path).head(30).write_parquet(sources[0].path)
    with pytest.raises(UserError, match="a source was changed while it was read; run this again"):
        write_pairs(sources, pairs, tmp_path / "pairs.parquet", tmp_path / "rejected.parquet")
