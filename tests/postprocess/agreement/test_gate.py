import json
import re

import numpy as np
import polars as pl
import pytest
import torch

from kaggle_kernels.runtime.package import read_tokenizer
from postprocess.agreement.gate import advise
from postprocess.agreement.model_scores import choose_dtype, score_column
from postprocess.agreement.reference_model import load_trained
from postprocess.agreement.validation_rows import validation_rows
from tests.postprocess import runs
from tests.postprocess.agreement.compared import report

LEFT_FOR_THE_USER = ("agreement.json", "agreement.parquet")


def left_in(folder):
    """The bytes of what a comparison leaves for the user."""
    return {name: (folder / name).read_bytes() for name in LEFT_FOR_THE_USER}


def refused(run):
    """The error of `python -m postprocess RECIPE`, after which there is no package."""
    error = runs.refuse(run.recipe)
    assert not (run.folder / "package").exists()
    return error


def test_over_the_tolerance_is_exit_code_2_and_leaves_what_to_look_at_and_no_package(copied):
    run = copied(quantize="nf4")
    (run.folder / "package").mkdir()
    (run.folder / "package" / "old").write_text("from a training before")
    run.recipe.write_text(run.recipe.read_text().replace("quantize: nf4", "quantize: nf4\n    tolerance: 0.001"))
    error = refused(run)
    assert "the mean difference in probability between quantised and trained is 0.0" in error
    assert "over pairwise.package.tolerance (0.001); no package is made: package with quantize: int8 or none" in error
    written = json.loads((run.folder / "agreement.json").read_text())
    assert (written["agrees"], written["rows"], written["groups"]) == (False, 24, 21)
    first = left_in(run.folder)
    for name in LEFT_FOR_THE_USER:
        (run.folder / name).unlink()
    refused(run)
    assert left_in(run.folder) == first


def test_report_and_table_compare_four_models_on_the_validation_rows(packaged):
    run, printed = packaged("gemma2", quantize="nf4")
    assert "verdicts changed" in printed
    models = {line["model"]: line for line in json.loads((run.folder / "agreement.json").read_text())["models"]}
    assert list(models) == ["recorded", "trained", "merged", "quantised"]
    assert models["trained"]["against_recorded"]["largest"] < 1e-6
    assert models["merged"]["against_trained"]["largest"] < 2e-3
    assert 1e-3 < models["quantised"]["against_trained"]["mean"] < 0.05
    table = pl.read_parquet(run.folder / "agreement.parquet")
    sides = ("model_a", "model_b")
    for name, line in models.items():
        differences = [(table[f"{name}_p_{side}"] - table[f"trained_p_{side}"]).abs().mean() for side in sides]
        assert np.mean(differences) == pytest.approx(line["against_trained"]["mean"], abs=1e-12)
    predictions = pl.read_parquet(run.folder / "predictions.parquet").sort("id")
    for order in ("as_given", "swapped"):
        rows = table.filter(pl.col("order") == order)
        assert rows["id"].to_list() == predictions["id"].to_list()
        assert rows["recorded_p_model_b"].to_list() == predictions[f"p_model_b_{order}"].to_list()


def test_a_comparison_whose_table_is_gone_is_made_again_and_a_prediction_that_is_no_number_never_agrees(copied):
    run = copied(quantize="none")
    runs.succeed(run.recipe)
    (run.folder / "agreement.parquet").unlink()
    stages = runs.current_stages(runs.succeed(run.recipe))
    assert "merge" in stages and "agreement" not in stages
    assert (run.folder / "agreement.parquet").exists()

    file = run.folder / "predictions.parquet"
    nan = pl.when(pl.int_range(pl.len()) == 3).then(float("nan")).otherwise(pl.col("p_model_a_swapped"))
    pl.read_parquet(file).with_columns(nan.alias("p_model_a_swapped")).write_parquet(file)
    error = refused(run)
    assert "the model, loaded as it was trained, differs by nan in probability from predictions.parquet" in error
    assert f"a file in {run.base} or {run.folder} has been exchanged since; put the training's file back" in error
    assert "NaN" not in (run.folder / "agreement.json").read_text()
    assert json.loads((run.folder / "agreement.json").read_text())["mean_difference"] is None


FAR, NEAR = (0.5, 0.4), (0.9, 0.41)


@pytest.mark.parametrize(
    ("quantize", "models", "advice"),
    [
        ("nf4", {"merged": NEAR, "quantised": FAR}, "package with quantize: int8 or none"),
        ("int8", {"merged": NEAR, "quantised": FAR}, "package with quantize: none"),
        ("nf4", {"unmerged": FAR}, "package with adapter: merged and quantize: int8 or none"),
        (
            "none",
            {"merged": FAR, "quantised": FAR},
            "merging alone changes probabilities by 0.2000: package with",
        ),
        ("nf4", {"merged": FAR, "quantised": FAR, "unmerged": FAR}, "no other kind of package would be nearer"),
        ("full", {"merged": FAR, "quantised": FAR}, "float16 alone changes probabilities by 0.2000: train it again"),
    ],
)
def test_the_error_says_what_to_change_in_the_recipe(quantize, models, advice, made, opened):
    run = made("bert", full=True, quantize="none") if quantize == "full" else made("gemma2", quantize=quantize)
    assert advise(opened(run), report(**models)).startswith(advice)


def test_a_cpu_computes_in_float16_where_that_is_affordable(made, opened, monkeypatch):
    run = opened(made("gemma2"))
    _, pairs = validation_rows(run)
    tokenizer = read_tokenizer(run.folder)
    assert choose_dtype(run, tokenizer, pairs) == torch.float16
    monkeypatch.setattr("postprocess.agreement.model_scores.FLOAT16_ON_CPU_FLOP", 1e6)
    assert choose_dtype(run, tokenizer, pairs) == torch.float32
    monkeypatch.setattr("postprocess.agreement.model_scores.list_gpus", lambda: [16 * 10**9])
    assert choose_dtype(run, tokenizer, pairs) == torch.float16


@pytest.mark.parametrize("head", ["score", "label_tokens"])
def test_the_reference_computes_its_head_in_float32_as_training_does(head, tmp_path, tiny_models, opened):
    made_run = runs.make(tmp_path, tiny_models("gemma2"), "gemma2", head=head)
    base = runs.change_base(made_run, tmp_path / "bf16", lambda tensors: tensors.update(in_bf16(tensors)))
    runs.set_json(base / "config.json", dtype="bfloat16")
    model = load_trained(opened(made_run))
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        logits = model(input_ids=torch.arange(10, 40)[None]).logits
    assert logits.dtype == torch.float32
    assert model(input_ids=torch.arange(10, 40)[None]).past_key_values is None
    assert not torch.equal(logits, logits.bfloat16().float())


def in_bf16(tensors):
    return {name: tensor.bfloat16() for name, tensor in tensors.items()}


def test_undecided_scores_more_rows_until_there_are_no_more_and_nothing_twice(copied, monkeypatch):
    monkeypatch.setattr("postprocess.agreement.validation_rows.ROWS", 5)
    run = copied(quantize="nf4", tolerance_log_loss=0.004)
    error = refused(run)
    assert "agreement.json: undecided, no package is made: the log loss that quantised adds is " in error
    assert re.search(r"on all 24 validation rows, .*; about [\d,]+ rows would decide: hold out a larger fold", error)
    files = [run.folder / f"scores{number}.json" for number in ("", "-2", "-3")]
    assert [len(json.loads(file.read_text())["columns"]["trained"]["rov"]) for file in files] == [5, 15, 4]
    table = pl.read_parquet(run.folder / "agreement.parquet").filter(pl.col("order") == "swapped").sort("id")
    recorded = pl.read_parquet(run.folder / "predictions.parquet").sort("id")
    assert table["recorded_p_model_a"].to_list() == recorded["p_model_a_swapped"].to_list()

    before = [file.stat().st_mtime_ns for file in files]
    run.recipe.write_text(run.recipe.read_text().replace("tolerance_log_loss: 0.004", "tolerance_log_loss: 2.0"))
    runs.succeed(run.recipe)
    assert [file.stat().st_mtime_ns for file in files] == before


def limit_memory(model: torch.nn.Module, memory_tokens: int, free_sequences: int = 0) -> tuple[list[int], list[int]]:
    """Let forward passes of more tokens raise, as a full GPU does, once so many sequences are scored.

    Returns the sequences of each pass that was made, and the tokens of each that was not.
    """
    scored, failed = [], []

    def refuse_large_batches(_, args, inputs):
        sequences, tokens = inputs["input_ids"].shape
        if sum(scored) >= free_sequences and sequences * tokens > memory_tokens:
            failed.append(sequences * tokens)
            raise torch.OutOfMemoryError
        scored.append(sequences)

    model.register_forward_pre_hook(refuse_large_batches, with_kwargs=True)
    return scored, failed


def test_out_of_memory_halves_the_batch_and_goes_on_until_a_sequence_alone_does_not_fit(made, opened, monkeypatch):
    monkeypatch.setattr("postprocess.agreement.model_scores.ROWS_PER_STEP", 8)
    run = opened(made("gemma2"))
    _, pairs = validation_rows(run)
    tokenizer = read_tokenizer(run.folder)
    expected = score_column("trained", load_trained(run), run, tokenizer, pairs)

    model = load_trained(run)
    scored, failed = limit_memory(model, 200, free_sequences=16)
    column = score_column("trained", model, run, tokenizer, pairs)
    assert column.probabilities_rov == pytest.approx(expected.probabilities_rov, abs=1e-6)
    assert 1 <= len(failed) <= 6  # of batches of 8192 tokens, of 4096, …; later rows begin with what fitted
    assert sum(scored) == 2 * len(pairs)  # what was scored before is not scored again

    limit_memory(model, 10)
    with pytest.raises(torch.OutOfMemoryError):
        score_column("trained", model, run, tokenizer, pairs)
