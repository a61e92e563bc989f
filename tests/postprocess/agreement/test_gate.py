import json
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from click.testing import CliRunner

from kaggle_kernels.runtime.package import read_tokenizer
from postprocess.__main__ import main
from postprocess.agreement.gate import Column, agreement, compare, kernel_dtype, remedy
from postprocess.agreement.validation_rows import validation_rows
from postprocess.weights.merge import quantise_in_one_pass
from preprocess.core.errors import UserError

LABELS = np.array([[1.0, 0.0], [0.0, 1.0]])
WINNERS = np.array([0, 1])
TOLD = ("agreement.json", "agreement.parquet", "agreement.png")


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
        "kl_divergence": pytest.approx(0.058892, abs=1e-6),
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


def told(folder):
    """The bytes of what a comparison leaves for the user."""
    return {name: (folder / name).read_bytes() for name in TOLD}


def test_over_the_tolerance_is_exit_code_2_and_leaves_what_to_look_at_and_no_package(copied):
    run = copied(quantize="nf4")
    package = run.folder / "package"
    package.mkdir()
    (package / "old").write_text("from a training before")
    for name in TOLD:
        (run.folder / name).write_text("from a training before")
    run.recipe.write_text(run.recipe.read_text().replace("quantize: nf4", "quantize: nf4\n    tolerance: 0.001"))
    result = CliRunner().invoke(main, [str(run.recipe)])
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "the quantised model differs from the " in result.stderr
    assert "over pairwise.package.tolerance (0.001); no package is made: package with quantize: int8 or none" in result.stderr
    assert not package.exists()
    report = json.loads((run.folder / "agreement.json").read_text())
    assert (report["agrees"], report["rows"], report["groups"]) == (False, 24, 1)
    table = pl.read_parquet(run.folder / "agreement.parquet")
    assert (len(table), table["id"].n_unique()) == (48, 24)
    assert (run.folder / "agreement.png").read_bytes()[:4] == b"\x89PNG"
    left = told(run.folder)
    for name in TOLD:
        (run.folder / name).unlink()
    assert CliRunner().invoke(main, [str(run.recipe)]).exit_code == 2
    assert told(run.folder) == left
    assert not package.exists()


def test_the_table_of_rows_holds_the_numbers_of_the_report(packaged):
    run, _ = packaged("gemma2", quantize="nf4")
    table = pl.read_parquet(run.folder / "agreement.parquet")
    report = json.loads((run.folder / "agreement.json").read_text())
    for line in report["models"]:
        name = line["model"]
        differences = [(table[f"{name}_p_{side}"] - table[f"trained_p_{side}"]).abs().mean() for side in ("model_a", "model_b")]
        assert np.mean(differences) == pytest.approx(line["against_trained"]["mean"], abs=1e-12)
    predictions = pl.read_parquet(run.folder / "predictions.parquet").sort("id")
    for order in ("as_given", "swapped"):
        found = table.filter(pl.col("order") == order)
        assert found["id"].to_list() == predictions["id"].to_list()
        assert found["winner"].to_list() == predictions["winner"].to_list()
        assert found["recorded_p_model_b"].to_list() == predictions[f"p_model_b_{order}"].to_list()


def test_a_file_of_the_comparison_that_is_gone_is_made_again(copied):
    run = copied(quantize="none")
    assert CliRunner().invoke(main, [str(run.recipe)]).exit_code == 0
    left = told(run.folder)
    (run.folder / "agreement.png").unlink()
    again = CliRunner().invoke(main, [str(run.recipe)]).stdout
    assert "merge      up to date" in again and "agreement  up to date" not in again
    assert told(run.folder) == left


def test_a_prediction_that_is_not_a_number_does_not_agree_and_the_report_is_still_json(copied):
    run = copied(quantize="none")
    file = run.folder / "predictions.parquet"
    nan = pl.when(pl.int_range(pl.len()) == 3).then(float("nan")).otherwise(pl.col("p_model_a_swapped"))
    pl.read_parquet(file).with_columns(nan.alias("p_model_a_swapped")).write_parquet(file)
    result = CliRunner().invoke(main, [str(run.recipe)])
    assert result.exit_code == 2
    assert "differ by nan in probability from predictions.parquet" in result.stderr
    assert "NaN" not in (run.folder / "agreement.json").read_text()
    assert json.loads((run.folder / "agreement.json").read_text())["mean_difference"] is None
    assert {(run.folder / name).exists() for name in TOLD} == {True}
    assert not (run.folder / "package").exists()


def test_the_nearest_of_several_quantised_models_is_packaged(copied, opened, capsys):
    run = copied(quantize="nf4", tolerance=0.2)
    folders = {"merged": None, **{name: run.folder / name for name in ("quantised", "quantised-2")}}
    work = opened(run)
    quantise_in_one_pass(work, "nf4", folders["quantised"])
    quantise_in_one_pass(work, "int8", folders["quantised-2"])
    agreement(work, folders, run.folder / "agreement.json")
    report = json.loads((run.folder / "agreement.json").read_text())
    assert report["packaged"] == "quantised-2"
    assert report["candidates"]["quantised-2"] < report["candidates"]["quantised"]
    assert report["repeats"]["models"] == ["quantised", "quantised-2"]
    assert report["repeats"]["mean_difference"]["min"] == report["candidates"]["quantised-2"]
    assert "  quantised 2 times: mean difference " in capsys.readouterr().out
    columns = pl.read_parquet(run.folder / "agreement.parquet").columns
    assert columns[-2:] == ["quantised-2_p_model_a", "quantised-2_p_model_b"]


FAR, NEAR = (0.5, 0.4), (0.9, 0.41)


@pytest.mark.parametrize(
    ("adapter", "quantize", "has_adapter", "models", "told"),
    [
        ("merged", "nf4", True, {"merged": NEAR, "quantised": FAR}, "package with quantize: int8 or none"),
        ("merged", "int8", True, {"merged": NEAR, "quantised": FAR}, "package with quantize: none"),
        ("unmerged", "nf4", True, {"unmerged": FAR}, "package with adapter: merged and quantize: int8 or none"),
        (
            "merged",
            "nf4",
            True,
            {"merged": FAR, "quantised": FAR},
            "merging alone moves it by 0.2000, package with quantize: nf4",
        ),
        (
            "merged",
            "none",
            True,
            {"merged": FAR, "quantised": FAR},
            "merging alone moves it by 0.2000, package with quantize: nf4",
        ),
        ("best", "nf4", True, {"merged": FAR, "quantised": FAR, "unmerged": FAR}, "no package of this run would be nearer"),
        ("merged", "none", False, {"merged": FAR, "quantised": FAR}, "float16 alone moves it by 0.2000, train it again"),
    ],
)
def test_the_error_says_what_to_change_in_the_recipe(adapter, quantize, has_adapter, models, told, made, opened):
    run = replace(opened(made("gemma2", adapter=adapter, quantize=quantize)), has_adapter=has_adapter)
    named = {"recorded": (0.9, 0.4), "trained": (0.9, 0.4), **models}
    report = compare([column(name, *rows) for name, rows in named.items()], LABELS, WINNERS, 0.05)
    assert not report["agrees"]
    assert remedy(run, report).startswith(told)


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
    monkeypatch.setattr("postprocess.agreement.gate.FLOAT16_ON_CPU_FLOP", 1e6)
    assert kernel_dtype(run, tokenizer, pairs, "cpu") == torch.float32
    assert kernel_dtype(run, tokenizer, pairs, "cuda") == torch.float16
