"""What the options of `rehearse` change, and what it says of results; the kernel is a fake that knows every answer."""

import json

import polars as pl
import pytest

from kaggle_kernels.build.bundle import build_mark
from kaggle_kernels.rehearsal import rehearse as rehearsal
from tests.kaggle_kernels.packages import rehearse


def faked(monkeypatch, spoil=lambda working: None):
    """A kernel that knows every answer, its results spoilt; what it was run with."""
    called = {}

    def run(python, kernel, root, name, **options):
        called.update(options, kernel=kernel)
        [path] = (root / "input" / "competitions").rglob("test.*")
        ids, working = pl.read_parquet(path)["id"].cast(pl.String), root / "working"
        pl.DataFrame({"id": ids, "winner": "model_a"}).write_csv(working / "submission.csv")
        scores = pl.DataFrame({"id": ids, "scored": True, "p_model_a": 0.75, "p_model_b": 0.25})
        scores.write_parquet(working / "scores.parquet")
        (working / "kernel.json").write_text(json.dumps({"devices": ["cpu"], "passes": []}))
        spoil(working)
        return rehearsal.Run(12.5, ())

    monkeypatch.setattr(rehearsal, "run_as_kaggle", run)
    return called


def test_another_clock_changes_that_line_of_the_kernel_and_its_build_and_nothing_else(workplace, tmp_path, monkeypatch):
    called = faked(monkeypatch)
    done = rehearse(workplace, "--test", "test.parquet", "--clock", "90")
    assert done.exit_code == 0, done.output
    built, ran = (tmp_path / "outputs/kernels/test/kernel.py").read_text(), called["kernel"]
    changed = [(one, other) for one, other in zip(built.splitlines(), ran.splitlines(), strict=True) if one != other]
    marks = (f'    build="{build_mark(built)}",', f'    build="{build_mark(ran)}",')
    assert changed == [("    clock_seconds=600.0,", "    clock_seconds=90.0,"), marks]
    assert called["clock_seconds"] == 90
    assert "30 rows in 12.5 s of a clock of 2 min\n" in done.output
    assert json.loads((tmp_path / "outputs/test/rehearsal/rehearsal.json").read_text())["clock_seconds"] == 90


def test_a_plain_rehearsal_runs_the_built_kernel_on_the_files_own_rows(workplace, tmp_path, monkeypatch):
    called = faked(monkeypatch)
    done = rehearse(workplace, "--test", "test.parquet")
    assert done.exit_code == 0, done.output
    assert called["kernel"] == (tmp_path / "outputs/kernels/test/kernel.py").read_text()
    assert (called["clock_seconds"], called["devices"], called["is_hidden"]) == (600, None, False)
    assert not (tmp_path / "outputs/test/rehearsal/rows.parquet").exists()


def test_made_rows_are_kept_beside_the_results_and_the_run_is_a_hidden_one(workplace, tmp_path, monkeypatch):
    called = faked(monkeypatch)
    options = ("--rows", "200", "--hostile", "--seed", "3", "--devices", "2", "--shuffle")
    done = rehearse(workplace, "--test", "test.parquet", *options)
    assert done.exit_code == 0, done.output
    assert (called["devices"], called["is_hidden"]) == (2, True)
    rows = pl.read_parquet("outputs/test/rehearsal/rows.parquet")
    assert (rows.height, rows["hostile"].count()) == (200, 64)
    assert "[rehearsal] test.parquet: 200 rows of 30, int ids, shuffled, 64 hostile of 64 of 64 kinds; seed 3\n" in done.output
    measured = json.loads((tmp_path / "outputs/test/rehearsal/rehearsal.json").read_text())
    assert (measured["judged"], measured["checks"]["scored"], measured["devices"]) == (137, 200, 2)


def lose_a_row(working):
    path = working / "submission.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lose_a_row, "submission.csv: 1 ids are missing, e.g. row00"),
        (
            lambda working: (working / "scores.parquet").unlink(),
            "error: scores.parquet: the kernel ended well and did not write",
        ),
    ],
)
def test_results_that_are_no_submission_exit_with_2_and_leave_no_record(workplace, tmp_path, monkeypatch, spoil, message):
    faked(monkeypatch)
    assert rehearse(workplace, "--test", "test.parquet", "--out", "results").exit_code == 0
    faked(monkeypatch, spoil)
    done = rehearse(workplace, "--test", "test.parquet", "--out", "results")
    assert done.exit_code == 2
    assert message in done.output.splitlines()[-1]
    assert not (tmp_path / "results" / "rehearsal.json").exists()


def test_a_model_that_scored_nothing_is_a_warning(workplace, monkeypatch):
    faked(monkeypatch)
    done = rehearse(workplace, "--test", "test.parquet")
    assert "warning: two scored no row; the log above says why\n" in done.output


@pytest.mark.parametrize(
    "options, message",
    [
        (("--lose-device", "2", "--devices", "2"), "--lose-device: there is no device 2 of 2; give --devices 3 or more"),
        (("--kill-every", "5"), "--kill-every: the kernel ended after 12 s and no worker was killed; give fewer seconds, or "),
    ],
)
def test_faults_that_cannot_be_or_did_not_happen_exit_with_2(workplace, tmp_path, monkeypatch, options, message):
    faked(monkeypatch)
    done = rehearse(workplace, "--test", "test.parquet", "--out", "results", *options)
    assert done.exit_code == 2
    assert message in done.output.splitlines()[-1]
    assert not (tmp_path / "results" / "rehearsal.json").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (("--train", "gone.parquet"), "--train gone.parquet: no such file; give the competition's train.parquet or train.csv"),
        (("--train", "test.parquet", "--rows", "9"), "--train: only the visible run scores it; leave out --rows"),
    ],
)
def test_a_train_file_that_nobody_would_read_is_refused(workplace, monkeypatch, options, message):
    called = faked(monkeypatch)
    done = rehearse(workplace, "--test", "test.parquet", *options)
    assert (done.exit_code, called) == (2, {})
    assert message in done.output
