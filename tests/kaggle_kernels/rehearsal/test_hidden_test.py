"""The hidden test rehearsed: real kernels in Kaggle's versions on hostile rows with two workers; the slow ones at full size."""

import shutil
from pathlib import Path

import polars as pl
import pytest

from preprocess.core.files import read_json
from tests import tiny
from tests.kaggle_kernels import packages
from tests.kaggle_kernels.packages import write_recipe, write_spec
from tests.kaggle_kernels.rehearsal.layouts import in_lmsys_layout

SPEC = "title: Pairwise Hidden\ncompetition: {}\npackages: [{{run: {}, dataset: tiny-{}}}]\nclock_seconds: 600\n"
FULL_SIZE = ("--rows", "25000", "--shuffle", "--hostile", "--seed", "1", "--devices", "2", "--clock", "1000")
RUNS = {"wsdm": ("two", ["model_a", "model_b"]), "lmsys": ("three", ["tie", "model_b", "model_a"])}


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """The current folder."""
    monkeypatch.chdir(tmp_path)


def fill_workplace(competition, package, further_keys=""):
    """Spec, kernel, package and 2,000 test rows: WSDM's layout in test.parquet, or LMSYS's in test.csv."""
    run, verdicts = RUNS[competition]
    shutil.copytree(package, Path("outputs") / run / "package")
    write_recipe(Path(), run, f"tiny-{run}", verdicts=verdicts)
    write_spec(Path(), SPEC.format(competition, run, run) + further_keys)
    rows = tiny.pairs(2000, seed=4)
    if competition == "wsdm":
        rows.write_parquet("test.parquet")
    else:
        in_lmsys_layout(rows).write_csv("test.csv")


def rehearse(*options, out="results"):
    """A rehearsal that passes: its output, rehearsal.json, and the folder of its results."""
    done = packages.rehearse("specs/test.yml", "--out", out, "--test", *options)
    assert done.exit_code == 0, done.output[-5000:]
    return done.output, read_json(Path(out, "rehearsal.json")), Path(out)


@pytest.mark.parametrize(
    "competition, test_file, ids, seed", [("wsdm", "test.parquet", "string", "2"), ("lmsys", "test.csv", "int", "1")]
)
def test_300_hostile_rows_on_two_workers(request, competition, test_file, ids, seed):
    package = request.getfixturevalue({"wsdm": "package_folder", "lmsys": "three_verdict_folder"}[competition])
    fill_workplace(competition, package)
    options = (test_file, "--rows", "300", "--shuffle", "--hostile", "--seed", seed, "--devices", "2", "--clock", "500")
    printed, measured, out = rehearse(*options)
    assert f"{test_file}: 300 rows of 2,000, {ids} ids, shuffled, 64 hostile of 64 of 64 kinds; seed {seed}\n" in printed
    assert (measured["test"]["ids"], len(measured["test"]["kinds"]), measured["clock_seconds"]) == (ids, 64, 500)
    assert (measured["checks"]["ids"], measured["checks"]["scored"], measured["checks"]["tolerance"]) == (300, 300, 1e-5)
    assert (measured["judged"], measured["faults"]["kills"]) == (300 - 63, [])
    kernel = read_json(out / "kernel.json")
    assert (kernel["devices"], kernel["hidden_run"], kernel["clock_seconds"]) == (["cpu", "cpu"], True, 500)
    assert kernel["versions"]["transformers"] == "5.0.0"
    rows = pl.read_parquet(out / "rows.parquet")
    assert pl.read_csv(out / "submission.csv", infer_schema=False)["id"].to_list() == rows["id"].cast(pl.String).to_list()


def test_both_workers_killed_for_good_after_a_fifth_of_the_rows_leave_a_whole_submission(package_folder):
    fill_workplace("wsdm", package_folder)
    options = ("test.parquet", "--rows", "4000", "--shuffle", "--devices", "2", "--lose-all-at", "0.2")
    printed, measured, out = rehearse(*options)
    assert {kill["worker"] for kill in measured["faults"]["kills"]} == {0, 1}
    assert (measured["checks"]["ids"], 800 <= measured["checks"]["scored"] < 4000) == (4000, True)
    assert "no device is left; rows without a score get the prior\n" in printed
    assert f"warning: {measured['checks']['scored']} of 4000 rows were scored" in printed
    assert read_json(out / "kernel.json")["scored"] == measured["checks"]["scored"]


def test_with_a_clock_for_a_third_of_the_rows_those_that_count_have_scores_before_any_other(package_folder):
    fill_workplace("wsdm", package_folder, "orders: as_given\n")
    rows = tiny.pairs(6000, seed=4).with_columns(scored=pl.int_range(pl.len()) % 5 == 0)
    rows.write_parquet("test.parquet")
    printed, measured, out = rehearse("test.parquet", "--shuffle", "--devices", "2", "--end-clock-at", "2000")
    assert measured["checks"]["ids"] == 6000
    assert 2000 <= measured["checks"]["scored"] < 6000
    assert f"warning: {measured['checks']['scored']} of 6000 rows were scored" in printed
    counts = pl.read_parquet(out / "rows.parquet")["scored"]
    has_score = pl.read_parquet(out / "scores.parquet")["scored"]
    assert (counts.sum(), has_score.filter(counts).all()) == (1200, True)


@pytest.mark.slow
@pytest.mark.timeout(2400)  # two rehearsals at full size
def test_25_000_hostile_rows_are_scored_and_killed_workers_cost_no_row_and_change_no_score(package_folder):
    fill_workplace("wsdm", package_folder)
    _, clean, clean_out = rehearse("test.parquet", *FULL_SIZE, out="clean")
    _, killed, killed_out = rehearse("test.parquet", *FULL_SIZE, "--kill-every", "20", out="killed")
    assert (len(clean["faults"]["kills"]), len(killed["faults"]["kills"]) >= 1) == (0, True)
    for measured in (clean, killed):
        assert (measured["test"]["hostile"], measured["checks"]["ids"], measured["checks"]["scored"]) == (1250, 25_000, 25_000)
        assert measured["checks"]["alike"] > 20_000
        assert measured["checks"]["largest_difference"] <= 1e-5

    before = pl.read_parquet(clean_out / "scores.parquet")
    after = pl.read_parquet(killed_out / "scores.parquet")
    columns = [name for name in before.columns if "_p_" in name]
    assert len(columns) == 4
    for name in columns:
        in_both_runs = before[name].is_not_null() & after[name].is_not_null()
        assert in_both_runs.sum() > 0
        assert (before[name] - after[name]).filter(in_both_runs).abs().max() <= 1e-5
