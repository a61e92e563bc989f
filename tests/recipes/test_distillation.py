"""A student: what its loss is, what its rows hold, and which labels it refuses."""

import json

import numpy as np
import polars as pl
import pytest
import torch

from preprocess.core.errors import UserError
from preprocess.core.files import read_json
from recipes.pairwise.config.schema import DistillBlock
from recipes.pairwise.data import datasets
from recipes.pairwise.data.collators import PairCollator
from recipes.pairwise.data.teacher_labels import read_teachers
from recipes.pairwise.training.losses import distillation_loss, soft_cross_entropy
from tests import forked, tiny
from tests.conftest import ROOT

TWO = ("model_a", "model_b")


def softmax(logits):
    exponentials = np.exp(logits)
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("shape", [(3, 2, 2), (3, 2, 3), (3, 1, 2)], ids=["score", "three verdicts", "reward"])
@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_the_teachers_part_is_hintons(shape, temperature):
    rng = np.random.default_rng(0)
    logits_pov, teacher_logits_pov = rng.normal(size=(2, *shape)) * 3
    weight_p = np.array([2.0, 0.5, 0.5])
    teacher_pov = softmax(teacher_logits_pov / temperature)
    student_pov = softmax(logits_pov / temperature)
    divergence_p = (teacher_pov * (np.log(teacher_pov) - np.log(student_pov))).sum(axis=-1).mean(axis=1)
    expected = temperature**2 * (divergence_p * weight_p).mean()
    loss = distillation_loss(
        torch.tensor(logits_pov), torch.tensor(softmax(teacher_logits_pov)), torch.tensor(weight_p), temperature
    )
    assert loss.item() == pytest.approx(expected, abs=1e-5)


def test_a_row_without_votes_has_only_the_teachers_part():
    labels = torch.tensor([[[0.0, 0.0]], [[1.0, 0.0]]])
    logits = torch.tensor([[[5.0, -5.0]], [[0.0, 0.0]]])
    loss = soft_cross_entropy(logits, labels, torch.ones(2), label_smoothing=0.1)
    assert loss.item() == pytest.approx(np.log(2) / 2)


@pytest.mark.parametrize("head", ["score", "reward"])
def test_a_batch_holds_the_teachers_in_the_orders_of_the_labels(head):
    row = {"id": "x", "sequences": [[5], [6]], "labels": [1.0, 0.0], "teacher": [0.75, 0.25], "weight": 1.0}
    batch = PairCollator(None, head, TWO, "both", pad_token_id=0)([row])
    expected = [[[0.75, 0.25], [0.25, 0.75]]] if head == "score" else [[[0.75, 0.25]]]
    assert batch["teacher"].tolist() == expected
    assert "teacher" not in PairCollator(None, head, TWO, "both", pad_token_id=0)([row | {"teacher": []}])


@pytest.fixture
def pairs_file(tmp_path):
    """Twenty pairs with votes, four of the pool, and two of the lockbox."""
    file = tiny.pairs_parquet(tmp_path / "pairs.parquet", 26)
    number = pl.int_range(pl.len())
    role = pl.when(number < 20).then(pl.lit("train")).when(number < 24).then(pl.lit("pool")).otherwise(pl.lit("test"))
    votes = ["winner", "p_model_a", "p_model_b", "p_tie"]
    pairs = pl.read_parquet(file).with_columns(role=role)
    pairs = pairs.with_columns(pl.when(pl.col("role") != "pool").then(pl.col(votes)))
    pairs.with_columns(fold=pl.when(pl.col("role") != "test").then("fold")).write_parquet(file)
    return file


def read(teachers, pairs_file):
    distill = DistillBlock(teachers=teachers, pool=True)
    train, _ = datasets.split(datasets.read_pairs(pairs_file), 0, pairs_file, with_pool=True)
    return train, read_teachers(distill, train, pairs_file, TWO)


def test_teachers_are_averaged_by_their_weights_and_the_pool_is_among_the_rows(tmp_path, pairs_file):
    first = tiny.teacher_labels(tmp_path / "first", pairs_file)
    second = tiny.teacher_labels(tmp_path / "second", pairs_file)
    flipped = pl.read_parquet(second / "labels.parquet").rename({"p_model_a": "p_model_b", "p_model_b": "p_model_a"})
    flipped.write_parquet(second / "labels.parquet")
    train, teacher_rv = read({str(first): 3.0, str(second): 1.0}, pairs_file)
    assert dict(train["role"].value_counts().iter_rows()) == {"train": 16, "pool": 3}
    is_a = train["winner"] == "model_a"
    assert teacher_rv[is_a.fill_null(False).to_numpy()][:, 0] == pytest.approx(0.75 * 0.8 + 0.25 * 0.2)
    assert teacher_rv.sum(axis=1) == pytest.approx(1)


def saw_its_fold(folder, pairs_file):
    file = folder / "labels.parquet"
    pl.read_parquet(file).with_columns(runs=pl.lit(["fold-3"])).write_parquet(file)


def of_another_file(folder, pairs_file):
    pl.read_parquet(pairs_file).with_columns(language=pl.lit("x")).write_parquet(pairs_file)


def lacks_a_row(folder, pairs_file):
    file = folder / "labels.parquet"
    pl.read_parquet(file).filter(pl.col("id") != "row00022").write_parquet(file)


def trained_since(folder, pairs_file):
    (folder / "fold-1" / "contract.json").write_text("{}")


def of_three_verdicts(folder, pairs_file):
    record = json.loads((folder / "labels.json").read_text())
    (folder / "labels.json").write_text(json.dumps(record | {"verdicts": [*TWO, "tie"]}))


def never_made(folder, pairs_file):
    (folder / "labels.parquet").unlink()


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (saw_its_fold, "row00001 of fold 1 is labelled by the run fold-3, which was trained on it"),
        (of_another_file, "these labels were made from another pairs file than"),
        (lacks_a_row, "no label of 1 of the 19 training rows, such as row00022 (role pool)"),
        (trained_since, "fold-1 was trained again, or removed, after these labels were made"),
        (of_three_verdicts, "the teacher's verdicts are model_a, model_b, tie, the student's model_a, model_b"),
        (never_made, "no such file; train the teacher's folds with make cv R=teacher"),
    ],
)
def test_labels_that_would_mislead_a_student_are_refused(tmp_path, pairs_file, damage, problem):
    folder = tiny.teacher_labels(tmp_path / "teacher", pairs_file)
    damage(folder, pairs_file)
    with pytest.raises(UserError) as refused:
        read({str(folder): 1.0}, pairs_file)
    assert problem in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_pool_row_that_is_in_the_lockbox_is_refused(pairs_file):
    pairs = pl.read_parquet(pairs_file)
    group = pl.when(pl.col("id") == "row00025").then(21).otherwise("group")
    pairs.with_columns(group=group).write_parquet(pairs_file)
    with pytest.raises(UserError, match=r"row00021 \(role pool\) has a prompt like one of the lockbox"):
        datasets.split(datasets.read_pairs(pairs_file), 0, pairs_file, with_pool=True)


def test_a_student_trains_on_votes_and_pool_and_is_measured_against_votes(tmp_path, tiny_models, pairs_file):
    recipe = tiny.twin(ROOT / "recipes/minilm_student.yml", tmp_path / "outputs", tiny_models("bert"), pairs_file)
    forked.train(recipe)
    metrics = read_json(tmp_path / "outputs/minilm_student/metrics.json")
    assert (metrics["training_rows"], metrics["rows"]) == (19, 4)
    assert list(metrics["labels_sha256"]) == [str(tmp_path / "outputs/teacher/labels.parquet")]
