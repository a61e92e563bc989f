"""A teacher's labels: each row by runs that did not train on it, the same after an interruption, the lockbox measured."""

import json
import shutil

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

from kaggle_kernels.runtime.models.scoring import score
from kaggle_kernels.runtime.package import read_tokenizer
from postprocess.labels import score_rows
from postprocess.labels.__main__ import main
from preprocess import model_input
from preprocess.core.files import read_json, sha256, write_json
from recipes.pairwise.data.datasets import read_pairs
from tests import tiny
from tests.postprocess import runs

ROLES = {"extra": 4, "pool": 3, "test": 5}


def with_all_roles(pairs_file) -> pl.DataFrame:
    """Add rows of the other roles to a pairs file: extra ones of fold 1, and a pool and a lockbox of other prompts."""
    train = pl.read_parquet(pairs_file).with_columns(role=pl.lit("train"))
    tables = [train]
    for number, (role, count) in enumerate(ROLES.items()):
        others = pl.read_parquet(tiny.pairs_parquet(pairs_file.with_name("others.parquet"), count, seed=50 + number))
        fold = None if role == "test" else 1
        others = others.with_columns(
            id=pl.lit(role) + pl.col("id"),
            role=pl.lit(role),
            group=pl.int_range(pl.len()) + 1000 * (number + 1),
            fold=pl.lit(fold, pl.Int8),
        )
        tables.append(others.select(train.columns).cast(dict(train.schema)))
    table = pl.concat(tables)
    table.write_parquet(pairs_file)
    return table


@pytest.fixture
def teacher(tmp_path, tiny_models):
    """A teacher of two folds, whose second model differs from the first by its head."""
    made = runs.make(tmp_path, tiny_models("gemma2"), "gemma2", rows=8, training_rows=6)
    with_all_roles(tmp_path / "pairs.parquet")
    trained = tmp_path / "trained"
    made.folder.rename(trained)
    for fold in (0, 1):
        folder = made.folder / f"fold-{fold}"
        shutil.copytree(trained, folder)
        write_json(folder / "metrics.json", {"fold": fold, "pairs_sha256": sha256(tmp_path / "pairs.parquet")})
    contract = made.folder / "fold-1" / "contract.json"
    runs.set_json(contract, recorded={"created": "another day"})
    runs.change_tensors(
        made.folder / "fold-1" / "adapter_model.safetensors",
        lambda tensors: tensors.update({name: -tensor for name, tensor in tensors.items() if "score" in name}),
    )
    return made


def label(teacher, *arguments):
    return CliRunner().invoke(main, [str(teacher.recipe), *arguments])


def refused(teacher, *arguments) -> str:
    """The one line of error of a command that ends with exit code 2."""
    result = label(teacher, *arguments)
    assert (result.exit_code, result.output.count("\n")) == (2, 1), result.output
    return result.output


def test_a_row_is_labelled_by_the_runs_that_did_not_train_on_it(teacher):
    result = label(teacher)
    assert result.exit_code == 0, result.output
    labels = pl.read_parquet(teacher.folder / "labels.parquet")
    pairs = read_pairs(teacher.folder.parent / "pairs.parquet")
    rows = pairs.select("id", "role", "fold").join(labels, on="id", how="left", maintain_order="left")
    for role, fold, row_runs in rows.select("role", "fold", "runs").iter_rows():
        expected = [f"fold-{fold}"] if role in ("train", "extra") else ["fold-0", "fold-1"]
        assert sorted(row_runs) == expected, role
    assert f"labels.parquet: {len(pairs)} of {len(pairs)} rows, by 2 run(s)" in result.output
    assert rows["p_model_a"].is_between(0, 1).all()


def test_the_probabilities_are_those_of_the_kernel_s_code_and_the_pool_gets_the_mean_of_both_runs(teacher):
    assert label(teacher).exit_code == 0
    labels = pl.read_parquet(teacher.folder / "labels.parquet")
    pairs = read_pairs(teacher.folder.parent / "pairs.parquet")
    pool = [model_input.pair_from_row(row) for row in pairs.filter(role="pool").iter_rows(named=True)]
    tokenizer = read_tokenizer(teacher.folder / "fold-0")
    of_fold_0 = score(teacher.model, model_input, tokenizer, model_input.read_contract(teacher.folder / "fold-0"), pool)
    for pair in pool:
        [mean] = labels.filter(id=pair.id)["p_model_a_as_given"]
        first = of_fold_0[pair.id]["as_given"][0]
        # The other model's head has the opposite sign, so that its P(A) is 1 - P(A) of the first.
        assert mean == pytest.approx((first + 1 - first) / 2, abs=1e-5)
        assert first != pytest.approx(0.5, abs=1e-3)


def test_the_lockbox_is_measured_against_its_votes(teacher):
    result = label(teacher)
    lockbox = read_json(teacher.folder / "lockbox.json")
    assert lockbox["rows"] == 5
    assert f"lockbox: accuracy {lockbox['accuracy']:.4f}, log loss {lockbox['log_loss']:.4f} on 5 rows" in result.output


def test_an_interrupted_call_goes_on_after_the_rows_that_are_scored(teacher, monkeypatch):
    monkeypatch.setattr(score_rows, "CHUNK_ROWS", 5)
    write_scores = score_rows.ChunkScorer.write_scores
    calls = []

    def interrupted(scorer, chunk):
        calls.append(len(chunk.rows))
        if len(calls) == 3:
            raise KeyboardInterrupt
        write_scores(scorer, chunk)

    monkeypatch.setattr(score_rows.ChunkScorer, "write_scores", interrupted)
    assert label(teacher).exit_code != 0
    assert not (teacher.folder / "labels.parquet").exists()
    assert label(teacher).exit_code == 0
    in_pieces = pl.read_parquet(teacher.folder / "labels.parquet")
    scored_rows = sum(calls) - 5  # one chunk was begun twice
    assert scored_rows == (8 + 8) + (6 + 4 + 8), "both folds' own rows, and pool and lockbox twice"

    # Nothing is scored again, until the teacher is another one.
    calls.clear()
    assert label(teacher).exit_code == 0
    assert calls == []
    runs.set_json(teacher.folder / "fold-0" / "contract.json", recorded={"created": "today"})
    shutil.rmtree(teacher.folder / "fold-1" / "labels")
    calls.extend([0, 0, 0])
    assert label(teacher).exit_code == 0
    assert sum(calls) == scored_rows
    again = pl.read_parquet(teacher.folder / "labels.parquet")
    assert np.allclose(again["p_model_a"], in_pieces["p_model_a"], atol=1e-6)


def test_scoring_with_one_run_leaves_the_files_to_another_call(teacher):
    assert label(teacher, "--run", "fold-1").exit_code == 0
    assert (teacher.folder / "fold-1" / "labels").is_dir()
    assert not (teacher.folder / "fold-0" / "labels").exists()
    assert not (teacher.folder / "labels.parquet").exists()
    error = refused(teacher, "--run", "fold-7")
    assert "--run fold-7: " in error and "choose one of fold-0, fold-1" in error


def test_a_run_that_was_trained_on_every_row_labels_nothing(tmp_path, tiny_models):
    made = runs.make(tmp_path, tiny_models("gemma2"), "gemma2", rows=8)
    write_json(made.folder / "metrics.json", {"fold": "all", "pairs_sha256": sha256(tmp_path / "pairs.parquet")})
    assert "without runs of folds; leave --run out" in refused(made, "--run", "fold-0")
    assert "so that there is none to label; hold out a fold, or add a pool" in refused(made)


def test_a_run_of_another_fold_or_file_is_no_teacher(teacher):
    metrics = teacher.folder / "fold-1" / "metrics.json"
    values = json.loads(metrics.read_text())
    for change, problem in (
        ({"fold": 0}, "this run held out fold 0 and was trained on the rows of fold 1"),
        ({"pairs_sha256": "other"}, "trained on another pairs file than the one that the recipe names now"),
    ):
        write_json(metrics, values | change)
        assert problem in refused(teacher)
    metrics.unlink()
    assert "no such file; train the teacher's folds with make cv R=run" in refused(teacher)


@pytest.mark.slow
def test_two_ray_workers_write_the_labels_of_one_process(teacher, monkeypatch):
    monkeypatch.setattr(score_rows, "CHUNK_ROWS", 5)
    assert label(teacher).exit_code == 0
    in_one_process = pl.read_parquet(teacher.folder / "labels.parquet")
    for fold in ("fold-0", "fold-1"):
        shutil.rmtree(teacher.folder / fold / "labels")

    result = label(teacher, "--ray", "2")
    assert result.exit_code == 0, result.output
    with_ray = pl.read_parquet(teacher.folder / "labels.parquet")
    assert with_ray["id"].to_list() == in_one_process["id"].to_list()
    for column in ("p_model_a", "p_model_a_as_given", "p_model_a_swapped"):
        assert np.allclose(with_ray[column], in_one_process[column], atol=1e-6)

    shutil.rmtree(teacher.folder / "fold-1" / "labels")
    result = label(teacher, "--ray", "99")
    assert (result.exit_code, "--ray 99: the Ray cluster has only " in result.output) == (2, True), result.output


@pytest.mark.slow
def test_a_ray_worker_s_error_is_one_line(teacher):
    def spoil_head(tensors):
        for name, tensor in tensors.items():
            if "score" in name:
                tensors[name] = tensor * float("nan")

    runs.change_tensors(teacher.folder / "fold-1" / "adapter_model.safetensors", spoil_head)
    result = label(teacher, "--ray", "1")
    assert result.exit_code == 2
    last_line = result.output.splitlines()[-1]
    assert last_line.startswith("error: ")
    assert "probabilities [nan, nan] in torch.float32; train the teacher again, in bf16" in last_line
