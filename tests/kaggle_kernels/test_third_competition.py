"""A competition that the project does not know goes the whole way by its entry alone, from its train file to its submission."""

import csv
import json
import shutil

import polars as pl
import pytest

from kaggle_kernels.build.spec import read_spec
from preprocess.competitions import COMPETITIONS, Competition
from preprocess.core.files import read_json
from preprocess.sources.reader import read_batches, read_prompts
from tests import tiny
from tests.kaggle_kernels.packages import rehearse, write_manifest, write_recipe, write_spec

RULES = {
    "name": "Duel",
    "slug": "duel-of-models",
    "verdicts": ("model_a", "model_b"),
    "texts_are_turns": True,
    "verdict_form": "flags",
    "verdict_columns": ("prefers_a", "prefers_b"),
    "marks_scored_rows": False,
    "answer": "probabilities",
    "columns": ("chance_a", "chance_b"),
    "metric": "brier_score",
    "daily_submissions": 2,
    "time_limits": {None: 600.0},
    "hidden_rows": (1_234,),
}
SPEC = "title: Pairwise Duel\ncompetition: duel\npackages: [{run: two, dataset: tiny-two}]\n"


@pytest.fixture
def duel(monkeypatch):
    monkeypatch.setitem(COMPETITIONS, "duel", Competition(**RULES))


def in_duel_layout(table: pl.DataFrame) -> pl.DataFrame:
    """Rows as the competition has them: JSON lists of two turns, and a flag for each verdict."""
    texts = {}
    for name in ("prompt", "response_a", "response_b"):
        texts[name] = pl.Series([json.dumps([text, "again"]) for text in table[name]])
    prefers_a = (table["winner"] == "model_a").cast(int)
    return table.drop("winner").with_columns(**texts, prefers_a=prefers_a, prefers_b=1 - prefers_a)


def test_a_third_competition_is_read_built_and_rehearsed_by_its_entry_alone(duel, tmp_path, monkeypatch, package_folder):
    monkeypatch.chdir(tmp_path)
    pairs = tiny.pairs(40, seed=8, prefix="train")
    in_duel_layout(pairs).write_csv("train.csv")
    test_rows = in_duel_layout(tiny.pairs(12, seed=9))
    # The same turns in another spelling, which only JSON's reader takes for the same.
    spaced_turns = pl.col("prompt", "response_a").str.replace_all('", "again"]', '" , "again" ]', literal=True)
    twin = test_rows.head(1).with_columns(spaced_turns, id=pl.lit("twin"))
    pl.concat([test_rows, twin]).write_csv("test.csv")

    # preprocess
    read = pl.concat(read_batches("train.csv"))
    assert read["winner"].to_list() == pairs["winner"].to_list()
    assert read["prompt"].to_list() == [[prompt, "again"] for prompt in pairs["prompt"]]
    assert read_prompts("test.csv")["prompt"].list.len().unique().to_list() == [2]

    # build
    package = shutil.copytree(package_folder, tmp_path / "outputs" / "two" / "package")
    listed = {"fold": 0, "trained_on": False, "ids": pairs["id"].to_list()[:30]}
    (package / "validation_ids.json").write_text(json.dumps(listed))
    write_manifest(package)
    write_recipe(tmp_path, "two", "tiny-two")
    spec_path = write_spec(tmp_path, SPEC)
    assert read_spec(spec_path).time_limit(99) == 600

    # the kernel and its rehearsal
    done = rehearse(spec_path, "--test", "test.csv", "--train", "train.csv", "--devices", "1")
    assert done.exit_code == 0, done.output
    out = tmp_path / "outputs" / "test" / "rehearsal"
    with (out / "submission.csv").open() as file:
        header, *lines = csv.reader(file)
    assert header == ["id", "chance_a", "chance_b"]
    chances = [float(line[1]) for line in lines]
    assert [chance + float(line[2]) for chance, line in zip(chances, lines, strict=True)] == pytest.approx([1] * 13)
    assert chances[12] == pytest.approx(chances[0], abs=1e-6)
    assert "two T4s: predicted for 1,234 rows" in done.output
    assert "visible run: 30 rows of train.csv are scored too\n" in done.output

    # The kernel and the rehearsal measure rows of their own, the rehearsal those of the submission.
    kernel, record = read_json(out / "kernel.json"), read_json(out / "rehearsal.json")
    assert kernel["settings"]["metric"] == "brier_score"
    assert (kernel["hidden_run"], kernel["visible"]["rows"], kernel["visible"]["quality"]["judged"]) == (False, 30, 30)
    assert [finish["rows"] for finish in kernel["visible"]["predicted"]] == [1_234]
    winners = [*test_rows["prefers_a"], test_rows["prefers_a"][0]]
    errors = [2 * (chance - winner) ** 2 for chance, winner in zip(chances, winners, strict=True)]
    assert record["brier_score"] == pytest.approx(sum(errors) / 13, abs=1e-6)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"verdicts": ("model_b", "model_a")}, "Duel: verdicts are .* expected"),
        ({"verdict_form": "name"}, "Duel: verdict_columns: expected 1 of them, found 2"),
        ({"columns": ("chance_a",)}, "Duel: columns: expected 2"),
    ],
)
def test_an_entry_that_contradicts_itself_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Competition(**RULES | changes)
