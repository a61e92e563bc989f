"""Which rows a package lists as held out, by the ids of the competition's own file."""

import json

import polars as pl
import pytest

from postprocess.agreement.validation_rows import source_ids, validation_ids


@pytest.fixture
def listed(copied, opened):
    """listed(rows, metrics) is what a run lists whose pairs have (id, source, fold) and whose predictions are of fold 0."""
    run = opened(copied())

    def make(rows: list[tuple[str, str, int]], metrics: dict | None = None) -> dict:
        pairs_file, predictions = run.validation_files()
        copy = run.folder / "pairs.parquet"
        first = pl.read_parquet(pairs_file)[:1].drop("id", "source", "fold")
        frame = pl.DataFrame(rows, schema={"id": pl.String, "source": pl.String, "fold": pl.Int8}, orient="row")
        frame.join(first, how="cross").write_parquet(copy)
        object.__setattr__(run.recipe.pairwise, "pairs", str(copy))
        held_out = pl.DataFrame([{"id": row_id} for row_id, _, fold in rows if fold == 0])
        held_out.join(pl.read_parquet(predictions)[:1].drop("id"), how="cross").write_parquet(predictions)
        if metrics is not None:
            (run.folder / "metrics.json").write_text(json.dumps(metrics))
        return validation_ids(run)

    return make


def test_an_id_that_preprocess_prefixed_is_listed_as_its_source_has_it(listed):
    found = listed([("1", "train", 1), ("lmsys:2", "lmsys", 0), ("2", "train", 0), ("lmsys:3:2", "lmsys", 0)])
    assert sorted(found["ids"]) == ["2", "3", "3:2"]


def test_an_id_of_two_sources_of_which_one_was_trained_on_is_not_listed(listed):
    rows = [("7", "wsdm", 1), ("lmsys:7", "lmsys", 0), ("8", "wsdm", 0), ("lmsys:8", "lmsys", 1), ("9", "wsdm", 0)]
    assert listed(rows)["ids"] == ["9"]


def test_what_the_run_was_trained_on_is_said_by_its_metrics(listed):
    rows = [("1", "a", 0), ("2", "a", 1)]
    told = {key: listed(rows, {"fold": "all", "rows_were_trained_on": True})[key] for key in ("fold", "trained_on")}
    assert told == {"fold": "all", "trained_on": True}
    untrained = listed(rows, {"fold": "all", "rows_were_trained_on": False})
    assert (untrained["fold"], untrained["trained_on"]) == ("all", False)
    assert listed(rows, {"fold": 3, "rows_were_trained_on": False})["fold"] == 3


def test_without_metrics_rows_of_several_folds_are_taken_for_trained_on(listed, monkeypatch):
    monkeypatch.setattr("postprocess.agreement.validation_rows.read_predictions", lambda *_: pl.DataFrame({"id": ["1", "2"]}))
    found = listed([("1", "a", 0), ("2", "a", 1), ("3", "a", 1)])
    assert (found["fold"], found["trained_on"]) == ("all", True)


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
