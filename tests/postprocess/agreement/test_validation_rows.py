"""Which rows models are compared on, and which a package lists as held out, by the ids of the competition's own file."""

import json

import polars as pl
import pytest

from postprocess.agreement.validation_rows import source_ids, validation_ids, validation_rows
from preprocess.core.errors import UserError


def use_pairs(run, frame: pl.DataFrame) -> None:
    """Let the rows of `frame` be those that the run's recipe names."""
    frame.write_parquet(run.folder / "pairs.parquet")
    object.__setattr__(run.recipe.pairwise, "pairs", str(run.folder / "pairs.parquet"))


@pytest.fixture
def listed(copied, opened):
    """listed(rows, metrics) is what a run lists whose pairs have (id, source, fold) and whose predictions are of fold 0."""
    run = opened(copied())

    def make(rows: list[tuple[str, str, int]], metrics: dict | None = None) -> dict:
        pairs_file, predictions = run.validation_files()
        first = pl.read_parquet(pairs_file)[:1].drop("id", "source", "fold")
        frame = pl.DataFrame(rows, schema={"id": pl.String, "source": pl.String, "fold": pl.Int8}, orient="row")
        use_pairs(run, frame.join(first, how="cross"))
        held_out = pl.DataFrame([{"id": row_id} for row_id, _, fold in rows if fold == 0])
        held_out.join(pl.read_parquet(predictions)[:1].drop("id"), how="cross").write_parquet(predictions)
        if metrics is not None:
            (run.folder / "metrics.json").write_text(json.dumps(metrics))
        return validation_ids(run)

    return make


def test_an_id_of_two_sources_of_which_one_was_trained_on_is_not_listed(listed):
    rows = [("7", "wsdm", 1), ("lmsys:7", "lmsys", 0), ("8", "wsdm", 0), ("lmsys:8", "lmsys", 1), ("9", "wsdm", 0)]
    assert listed(rows)["ids"] == ["9"]


def test_what_the_run_was_trained_on_is_said_by_its_metrics(listed):
    found = listed([("1", "a", 0), ("2", "a", 1)], {"fold": "all", "rows_were_trained_on": False})
    assert (found["fold"], found["trained_on"]) == ("all", False)


def test_five_thousand_ids_are_listed_at_most(listed):
    ids = listed([(str(number), "a", 0) for number in range(5100)])["ids"]
    assert (len(ids), len(set(ids))) == (5000, 5000)


@pytest.mark.parametrize(
    "row_id, source, expected",
    [
        ("7", "train", {"7"}),
        ("train:7", "other", {"train:7"}),
        ("train:7", "train", {"7"}),
        ("train:7:2", "train", {"7", "7:2"}),
        ("a:b", "", {"a:b"}),
    ],
)
def test_a_source_may_have_had_these_ids(row_id, source, expected):
    assert source_ids(row_id, source) == expected


def test_at_most_500_rows_are_compared_chosen_by_a_hash_of_their_ids(copied, opened):
    run = opened(copied())
    pairs_file, predictions = run.validation_files()
    numbers = pl.DataFrame({"number": range(30)})
    of_number = pl.concat_str("id", pl.lit("-"), "number").alias("id")
    use_pairs(run, pl.read_parquet(pairs_file).join(numbers, how="cross").with_columns(of_number))
    pl.read_parquet(predictions).join(numbers, how="cross").with_columns(of_number).write_parquet(predictions)
    rows, as_pairs = validation_rows(run)
    assert len(rows) == 500
    assert [pair.id for pair in as_pairs] == rows["id"].to_list()
    assert len({row_id.split("-")[0] for row_id in rows["id"]}) == 24


def test_a_pairs_file_without_the_validation_rows_is_one_error(copied, opened):
    run = opened(copied())
    use_pairs(run, pl.read_parquet(run.validation_files()[0]).head(5))
    with pytest.raises(UserError, match="holds 5 of the 24 validation rows"):
        validation_rows(run)
