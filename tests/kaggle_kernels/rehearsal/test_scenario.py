"""What the options of `rehearse` change, and what it says of results; the kernel is a fake that knows every answer."""

import json

import polars as pl
import pytest

from kaggle_kernels.build.bundle import build
from kaggle_kernels.rehearsal import rehearse as rehearsal
from kaggle_kernels.rehearsal.sandbox import KernelRun
from preprocess.core import ledger
from preprocess.core.files import read_json, sha256
from tests.kaggle_kernels.packages import WSDM, change_json, rehearse, write_recipe


@pytest.fixture
def fake_kernel(monkeypatch):
    """Replace the kernel's run by right answers, which `spoil` may spoil; records what the kernel was run with."""
    fake = {"spoil": lambda working: None, "passes": []}

    def run(python, kernel, root, name, clock_seconds, scenario):
        fake.update(kernel=kernel, clock_seconds=clock_seconds, scenario=scenario)
        [path] = (root / "input" / "competitions").rglob("test.*")
        ids, working = pl.read_parquet(path)["id"].cast(pl.String), root / "working"
        pl.DataFrame({"id": ids, "winner": "model_a"}).write_csv(working / "submission.csv")
        scores = pl.DataFrame({"id": ids, "scored": True, "p_model_a": 0.75, "p_model_b": 0.25})
        scores.write_parquet(working / "scores.parquet")
        (working / "kernel.json").write_text(json.dumps({"devices": ["cpu"], "passes": fake["passes"]}))
        fake["spoil"](working)
        return KernelRun(12.5, ())

    monkeypatch.setattr(rehearsal, "run_as_kaggle", run)
    return fake


def record_of(folder):
    return read_json(folder / "outputs/test/rehearsal/rehearsal.json")


def test_a_plain_rehearsal_runs_the_built_kernel_on_the_files_own_rows(workplace, tmp_path, fake_kernel, ledger_file):
    done = rehearse(workplace, "--test", "test.parquet")
    assert done.exit_code == 0, done.output
    kernel = tmp_path / "outputs/kernels/test/kernel.py"
    assert fake_kernel["kernel"] == kernel.read_text()
    assert (fake_kernel["clock_seconds"], fake_kernel["scenario"].is_hidden) == (600, False)
    assert not (tmp_path / "outputs/test/rehearsal/rows.parquet").exists()
    assert "warning: two scored no row; the log above says why\n" in done.output

    right = (pl.read_parquet("test.parquet")["winner"] == "model_a").mean()
    assert f"accuracy {right:.4f}, log loss " in done.output and " on 30 judged rows; " in done.output
    record = record_of(tmp_path)
    manifest = sha256(tmp_path / "outputs/two/package/manifest.json")
    assert record["build"] == {"kernel_sha256": sha256(kernel), "packages": {"tiny-two": manifest}}
    [entry] = ledger.read()
    expected = {"event": "rehearse", "spec": "test", "verdict": "passed", "rows": 30, "seconds": 12.5, **record["build"]}
    assert expected.items() <= entry.items()


def test_another_clock_changes_that_line_of_the_kernel_and_nothing_else(workplace, tmp_path, fake_kernel):
    done = rehearse(workplace, "--test", "test.parquet", "--clock", "90")
    assert done.exit_code == 0, done.output
    built, ran = (tmp_path / "outputs/kernels/test/kernel.py").read_text(), fake_kernel["kernel"]
    assert ran == built.replace("seconds=600.0)", "seconds=90.0)")
    assert ran != built
    assert fake_kernel["clock_seconds"] == record_of(tmp_path)["clock_seconds"] == 90
    assert "30 rows in 12.5 s of a clock of 2 min\n" in done.output


def test_two_t4s_are_predicted_for_the_recipes_base_model_where_a_small_one_stands_in(workplace, tmp_path, fake_kernel):
    write_recipe(tmp_path, "two", "tiny-two", "google/gemma-2-9b-it")
    build(workplace)
    change_json(tmp_path / "outputs/two/package/contract.json", base_model=".")
    measured = {"run": "two", "scored": 30, "seconds": 1.0, "computed_tokens": 30_000}
    fake_kernel["passes"] = [{**measured, "order": order} for order in ("as_given", "swapped")]
    done = rehearse(workplace, "--test", "test.parquet")
    ten_thousand, twenty_five_thousand = record_of(tmp_path)["two_t4s"]
    assert ten_thousand == {"rows": 10_000, "first_order_seconds": 5611, "all_seconds": 11160}
    assert twenty_five_thousand["rows"] == 25_000
    warning = "warning: predicted for 10,000 rows: every row scored once after 1 h 34 min, everything after 3 h 06 min"
    assert f"two T4s: {warning}, with 0 h 10 min allowed; rows would get the prior\n" in done.output


def lose_a_row(working):
    path = working / "submission.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


@pytest.mark.parametrize(
    "spoil, options, message",
    [
        (lose_a_row, (), "submission.csv: 1 ids are missing, e.g. row00"),
        (lambda working: (working / "scores.parquet").unlink(), (), "scores.parquet: the kernel ended without an error, but"),
        (lambda working: None, ("--kill-every", "5"), "--kill-every: the kernel ended after 12 s and no worker was killed"),
    ],
)
def test_a_failure_exits_with_2_and_leaves_no_record(workplace, tmp_path, fake_kernel, ledger_file, spoil, options, message):
    assert rehearse(workplace, "--test", "test.parquet", "--out", "results").exit_code == 0
    fake_kernel["spoil"] = spoil
    done = rehearse(workplace, "--test", "test.parquet", "--out", "results", *options)
    assert done.exit_code == 2
    assert message in done.output.splitlines()[-1]
    assert not (tmp_path / "results" / "rehearsal.json").exists()
    passed, failed = ledger.read()
    assert (passed["verdict"], failed["verdict"]) == ("passed", "failed")
    assert done.output.endswith(f"error: {failed['reason']}\n")


@pytest.mark.parametrize(
    "options, message",
    [
        (("--test", "gone.parquet"), "gone.parquet: no such file; give the test rows with --test"),
        (("--test", "wrong.parquet"), "wrong.parquet, row 1 (id row00000): winner is 'modelA'; expected model_a"),
        (("--train", "gone.parquet"), "--train gone.parquet: no such file; give the competition's train.parquet or train.csv"),
        (("--train", "test.parquet", "--rows", "9"), "--train: only the visible run scores its rows, but --rows"),
        (("--python", "nowhere/bin/python"), "nowhere/bin/python: no such file; run `make setup`, which installs Kaggle's"),
    ],
)
def test_wrong_options_are_refused_before_the_kernel_runs(workplace, fake_kernel, options, message):
    pl.read_parquet("test.parquet").sort("id").with_columns(winner=pl.lit("modelA")).write_parquet("wrong.parquet")
    done = rehearse(workplace, "--test", "test.parquet", *options)
    assert (done.exit_code, done.output.count("\n")) == (2, 1)
    assert done.output.startswith(f"error: {message}")
    assert "kernel" not in fake_kernel


def test_a_stale_kernel_is_refused_with_the_command_that_builds_it(workplace):
    workplace.write_text(WSDM.replace("600", "700"))
    done = rehearse(workplace, "--test", "test.parquet")
    assert done.exit_code == 2
    assert done.output.endswith(f"kernel.py not up to date; run `python -m kaggle_kernels build {workplace}`\n")
