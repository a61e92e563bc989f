"""What is read of a run folder: its rows, the commands that it names, and what is refused."""

import json

import polars as pl
import pytest

from postprocess.report.run_data import read_run
from preprocess.core.errors import UserError
from preprocess.core.files import write_json
from tests.postprocess.report import reported
from tests.postprocess.report.reported import FOUR, Row


def refusal(folder, *options) -> str:
    with pytest.raises(UserError) as error:
        read_run(folder, *options)
    return str(error.value)


def test_a_pairs_file_that_has_changed_is_not_read_and_one_that_has_moved_is_named(tmp_path):
    folder = reported.write_run(tmp_path / "tiny")
    moved = (tmp_path / "pairs.parquet").rename(tmp_path / "moved.parquet")
    reported.write_pairs(tmp_path / "pairs.parquet", [*FOUR, Row(0.5, 0.5)])
    run = read_run(folder)
    assert "pairs.parquet has changed since training, so that texts" in run.missing["pairs"]
    assert "prompt" not in run.predictions.rows.columns
    assert "prompt" in read_run(folder, False, moved).predictions.rows.columns
    assert "pairs.parquet has changed since training" in refusal(folder, False, tmp_path / "pairs.parquet")
    assert "absent.parquet does not exist" in refusal(folder, False, tmp_path / "absent.parquet")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("metrics.json", "{", "metrics.json: not valid JSON"),
        ("contract.json", '{"verdicts": ["tie", "model_a"]}', "contract.json: the verdicts are ['tie', 'model_a'], but"),
        ("history.json", "{}", "history.json: expected a list of objects"),
        ("predictions.parquet", "x", "predictions.parquet: not a Parquet file"),
        ("agreement.json", "{}", "agreement.parquet: not a Parquet file"),
    ],
)
def test_a_damaged_file_is_refused_with_its_name(tmp_path, file, content, message):
    folder = reported.write_run(tmp_path / "tiny")
    (folder / file).write_text(content)
    assert message in refusal(folder)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda rows: rows.with_columns(p_tie_swapped=pl.lit(float("nan"))), "row row0 has probabilities that are not"),
        (lambda rows: rows.drop("fold", "p_tie"), "there is no column fold, p_tie, so axolotl train of this version did not"),
        (lambda rows: pl.concat([rows, rows]), "an id occurs twice"),
        (lambda rows: rows.head(0), "no rows"),
    ],
)
def test_predictions_that_are_none_are_refused(tmp_path, changed, message):
    file = reported.write_run(tmp_path / "tiny") / "predictions.parquet"
    changed(pl.read_parquet(file)).write_parquet(file)
    assert message in refusal(tmp_path / "tiny")


def test_a_folder_without_a_whole_run_is_refused(tmp_path):
    assert "there is no such folder; name the folder of a run" in refusal(tmp_path / "absent")
    folder = reported.write_run(tmp_path / "tiny")
    (folder / "predictions.parquet").unlink()
    assert "predictions.parquet: not a Parquet file (No such file or directory" in refusal(folder)
    (folder / "contract.json").unlink()
    assert "tiny: holds no contract.json, the file that a training writes last" in refusal(folder)


@pytest.mark.parametrize("name", ["R/fold-3", "R/mean", "R"])
def test_a_fold_and_a_mean_are_called_by_their_run(tmp_path, name):
    assert reported.read(tmp_path / name).name == name


def test_rows_of_all_folds_are_preferred_to_rows_that_were_trained_on(crossed):
    own = reported.write_run(crossed.parent / "own", FOUR[:1], rows_were_trained_on=True)
    for file in own.iterdir():
        file.rename(crossed / file.name)
    assert read_run(crossed).predictions.rows.height == 4
    metrics = json.loads((crossed / "metrics.json").read_text())
    write_json(crossed / "metrics.json", metrics | {"rows_were_trained_on": False})
    assert read_run(crossed).predictions.rows.height == 1

    assert read_run(crossed, True).predictions.rows["fold"].to_list() == [0, 1, 0, 1]
    for fold in (0, 1):
        (crossed / f"fold-{fold}").rename(crossed / f"moved-{fold}")
    assert "holds no fold-0 beside oof.parquet; train all folds with make cv R=R" in refusal(crossed, True)
    (crossed / "oof.parquet").unlink()
    assert "oof.parquet: no such file; train all folds with make cv R=R" in refusal(crossed, True)


def test_the_agreement_of_an_earlier_training_is_not_shown(tmp_path):
    folder = reported.write_run(tmp_path / "tiny")
    reported.write_agreement(folder, recorded=0.5)
    run = read_run(folder)
    assert run.agreement is None
    assert "agreement.json is from an earlier training or an earlier version of this project" in run.missing["agreement"]
