"""What is read of a run folder: its rows, the commands that it names, and what is refused."""

import json
import shutil

import polars as pl
import pytest

from postprocess.report.run_data import read_run
from preprocess.core.errors import UserError
from preprocess.core.files import write_json
from tests.postprocess.report import reported
from tests.postprocess.report.reported import FOUR, Row

PACKAGE = "python -m postprocess recipes/tiny.yml"


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
        ("contract.json", '{"verdicts": ["tie", "model_a"]}', "contract.json: verdicts are ['tie', 'model_a'], expected"),
        ("history.json", "{}", "history.json: expected a list of objects"),
        ("predictions.parquet", "x", "predictions.parquet: not a Parquet file"),
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
        (lambda rows: rows.drop("fold", "p_tie"), "no column fold, p_tie; it was not written by axolotl train"),
        (lambda rows: pl.concat([rows, rows]), "an id occurs twice"),
        (lambda rows: rows.head(0), "no rows"),
    ],
)
def test_predictions_that_are_none_are_refused(tmp_path, changed, message):
    file = reported.write_run(tmp_path / "tiny") / "predictions.parquet"
    changed(pl.read_parquet(file)).write_parquet(file)
    assert message in refusal(tmp_path / "tiny")


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    assert "no such folder; name a run's folder" in refusal(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert "holds nothing of a run" in refusal(tmp_path / "empty")


@pytest.mark.parametrize(
    ("name", "changed", "create", "package"),
    [
        ("R/fold-3", {}, "PAIRWISE_FOLD=3 axolotl train recipes/tiny.yml", f"PAIRWISE_FOLD=3 {PACKAGE}"),
        ("R/mean", {"average": {"members": {}}}, f"{PACKAGE} --adapter …", f"{PACKAGE} --adapter …"),
        ("R", {"training_rows": 0}, PACKAGE, PACKAGE),
    ],
)
def test_the_commands_that_are_named_are_those_of_the_run(tmp_path, name, changed, create, package):
    folder = reported.write_run(tmp_path / name, **changed)
    (folder / "predictions.parquet").unlink()
    (folder / "history.json").unlink()
    run = read_run(folder)
    assert run.name == name
    assert f"so that nothing can be measured: `{create}` writes it." in run.missing["predictions"]
    assert f"The run was not packaged yet: `{package}` compares the models" in run.missing["agreement"]
    is_trained = "axolotl train" in create
    assert run.missing["history"].startswith("There is no history.json" if is_trained else "Nothing was trained here")


def test_rows_of_all_folds_are_preferred_to_rows_that_were_trained_on(crossed):
    own = reported.write_run(crossed.parent / "own", FOUR[:1], rows_were_trained_on=True)
    for file in own.iterdir():
        file.rename(crossed / file.name)
    assert read_run(crossed).predictions.rows.height == 4
    metrics = json.loads((crossed / "metrics.json").read_text())
    write_json(crossed / "metrics.json", metrics | {"rows_were_trained_on": False})
    assert read_run(crossed).predictions.rows.height == 1

    for fold in (0, 1):
        shutil.rmtree(crossed / f"fold-{fold}")
    run = read_run(crossed, True, crossed.parent / "pairs.parquet")
    assert run.missing["contract"] == "There is no contract.json: `make cv R=R` writes it."
    assert run.predictions.rows["fold"].to_list() == [0, 1, 0, 1]
    (crossed / "oof.parquet").unlink()
    assert "oof.parquet: no such file; make cv R=R writes it" in refusal(crossed, True)


def test_the_agreement_of_an_earlier_training_is_not_shown(tmp_path):
    folder = reported.write_run(tmp_path / "tiny")
    reported.write_agreement(folder, recorded=0.5)
    run = read_run(folder)
    assert run.agreement is None
    assert "agreement.json is of an earlier training: `python -m postprocess recipes/tiny.yml`" in run.missing["agreement"]
