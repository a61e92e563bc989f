import json

import numpy as np
import polars as pl
import pytest
import torch
from click.testing import CliRunner

from kaggle_kernels.runtime.package import read_tokenizer
from postprocess.__main__ import main
from postprocess.agreement import Column, compare, kernel_dtype
from postprocess.rows import validation_rows
from preprocess.errors import UserError

LABELS = np.array([[1.0, 0.0], [0.0, 1.0]])
WINNERS = np.array([0, 1])


def column(name, *rows):
    """A column from the probability of model_a in each row, the same in both orders."""
    return Column(name, np.array([[[p, 1 - p]] * 2 for p in rows]), "float16")


def columns(*quantised, merged=(0.9, 0.4)):
    return [
        column("recorded", 0.9, 0.4),
        column("trained", 0.9, 0.4),
        column("merged", *merged),
        column("quantised", *quantised),
    ]


def test_differences_are_largest_mean_and_changed_verdicts():
    report = compare(columns(0.8, 0.6), LABELS, WINNERS, tolerance=0.2)
    last = report["models"][-1]
    assert last["against_trained"] == {
        "largest": pytest.approx(0.2),
        "mean": pytest.approx(0.15),
        "verdicts_changed": 1,
    }
    assert last["accuracy"] == 0.5
    assert report["models"][0]["accuracy"] == 1.0
    assert last["log_loss"] == pytest.approx(-(np.log(0.8) + np.log(0.4)) / 2)
    assert report["agrees"]


@pytest.mark.parametrize(("tolerance", "agrees"), [(0.151, True), (0.149, False)])
def test_the_mean_difference_decides(tolerance, agrees):
    assert compare(columns(0.8, 0.6), LABELS, WINNERS, tolerance)["agrees"] is agrees


def test_a_merged_model_that_differs_does_not_agree_even_where_the_quantised_one_does():
    assert not compare(columns(0.9, 0.4, merged=(0.1, 0.4)), LABELS, WINNERS, 0.05)["agrees"]


def test_training_that_wrote_other_probabilities_does_not_agree():
    changed = [column("recorded", 0.1, 0.4), *columns(0.9, 0.4)[1:]]
    assert not compare(changed, LABELS, WINNERS, 0.05)["agrees"]


def test_not_a_number_does_not_agree():
    assert not compare(columns(float("nan"), 0.4), LABELS, WINNERS, 0.05)["agrees"]


def test_over_the_tolerance_is_exit_code_2_and_leaves_no_package(copied):
    run = copied(quantize="nf4")
    package = run.folder / "package"
    package.mkdir()
    (package / "old").write_text("from a training before")
    run.recipe.write_text(run.recipe.read_text().replace("quantize: nf4", "quantize: nf4\n    tolerance: 0.0001"))
    result = CliRunner().invoke(main, [str(run.recipe)])
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "over pairwise.package.tolerance (0.0001); no package is made" in result.stderr
    assert not package.exists()
    report = json.loads((run.folder / "agreement.json").read_text())
    assert (report["agrees"], report["rows"]) == (False, 24)
    assert CliRunner().invoke(main, [str(run.recipe)]).exit_code == 2
    assert not package.exists()


def test_the_report_compares_four_models_on_the_validation_rows(packaged):
    run, printed = packaged("gemma2", quantize="nf4")
    report = json.loads((run.folder / "agreement.json").read_text())
    assert [line["model"] for line in report["models"]] == ["recorded", "trained", "merged", "quantised"]
    by_name = {line["model"]: line for line in report["models"]}
    assert by_name["trained"]["against_recorded"]["largest"] < 1e-6
    assert by_name["merged"]["against_trained"]["largest"] < 1e-3
    assert 1e-3 < by_name["quantised"]["against_trained"]["mean"] < 0.05
    assert "verdicts changed" in printed


def test_an_adapter_that_is_not_the_training_s_is_told_apart_from_too_few_bits(copied):
    run = copied(quantize="nf4")
    file = run.folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 320}))
    result = CliRunner().invoke(main, [str(run.recipe)])
    assert result.exit_code == 2
    assert "agreement.json: base and adapter, loaded as they were trained, differ by " in result.stderr
    assert f"one of {run.base}, {run.folder} is not the training's; put it back, or train again" in result.stderr
    assert not (run.folder / "package").exists()


def test_at_most_500_validation_rows_are_taken_by_a_hash_of_their_ids(copied, opened, tmp_path):
    run = copied()
    source, predictions = opened(run).validation_files()
    for file, target in ((source, tmp_path / "pairs.parquet"), (predictions, predictions)):
        frame = pl.read_parquet(file)
        pl.concat([frame.with_columns(pl.col("id") + f"-{number}") for number in range(30)]).write_parquet(target)
    run.recipe.write_text(run.recipe.read_text().replace(str(source), str(tmp_path / "pairs.parquet")))
    rows, as_pairs = validation_rows(opened(run))
    assert len(rows) == 500
    assert [pair.id for pair in as_pairs] == rows["id"].to_list()
    assert len({row_id.split("-")[0] for row_id in rows["id"]}) == 24


def test_a_pairs_file_without_the_validation_rows_is_one_error(copied, opened, tmp_path):
    run = copied()
    source = opened(run).validation_files()[0]
    pl.read_parquet(source).head(5).write_parquet(tmp_path / "pairs.parquet")
    run.recipe.write_text(run.recipe.read_text().replace(str(source), str(tmp_path / "pairs.parquet")))
    with pytest.raises(UserError, match="holds 5 of the 24 validation rows"):
        validation_rows(opened(run))


def test_a_cpu_computes_in_float16_where_that_is_affordable(made, opened, monkeypatch):
    run = opened(made("gemma2"))
    _, pairs = validation_rows(run)
    tokenizer = read_tokenizer(run.folder)
    assert kernel_dtype(run, tokenizer, pairs, "cpu") == torch.float16
    monkeypatch.setattr("postprocess.agreement.FLOAT16_ON_CPU_FLOP", 1e6)
    assert kernel_dtype(run, tokenizer, pairs, "cpu") == torch.float32
    assert kernel_dtype(run, tokenizer, pairs, "cuda") == torch.float16
