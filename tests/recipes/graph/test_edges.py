"""What the graph derives from recipes and specs."""

import polars as pl
import pytest

from preprocess.core.errors import UserError
from recipes.pairwise.graph.edges import derive_graph


def test_runs_are_followed_from_a_spec_to_the_model_that_they_start_from(workplace):
    workplace.write_recipe("first", deepspeed="recipes/deepspeed/zero2.json")
    workplace.write_recipe("second", base_model="outputs/first/merged")
    for_one_gpu = {"hardware": {"gpus": 1, "gib": 40}}
    workplace.write_recipe("other", deepspeed="recipes/deepspeed/zero2.json", pairwise=for_one_gpu)
    workplace.write_spec("both", "second/mean", "other")
    graph = derive_graph("both")
    assert graph.kernels["both"].packages == ["second/mean", "other"]
    assert sorted(graph.runs) == ["first", "other", "second"]
    assert graph.runs["second"].base_run == "first"
    assert [graph.runs[name].keeps_merged for name in ("first", "second")] == [True, False]
    assert [graph.runs[name].uses_all_gpus for name in ("first", "second", "other")] == [True, False, False]
    assert graph.runs["other"].folds == [0, 1]


def test_a_student_needs_the_runs_of_its_teachers_and_not_of_labels_from_elsewhere(workplace):
    workplace.write_recipe("teacher")
    workplace.write_recipe("other")
    distill = {"teachers": {"teacher": 2.0, "outputs/other": 1.0, "elsewhere/runs/big": 1.0}, "pool": True}
    workplace.write_recipe("student", pairwise={"distill": distill})
    graph = derive_graph("student")
    assert sorted(graph.runs) == ["other", "student", "teacher"]
    assert sorted(graph.runs["student"].teachers) == ["other", "teacher"]


def test_only_what_decides_the_training_is_in_its_hash(workplace):
    def training_hash(**changes) -> str:
        workplace.write_recipe("small", **changes)
        return derive_graph("small").runs["small"].training_hash

    original = training_hash()
    assert training_hash(pairwise={"package": {"slug": "pairwise-other"}}) == original
    assert training_hash(learning_rate=0.1) != original
    assert training_hash(pairwise={"budget_tokens": 128}) != original


@pytest.mark.parametrize(
    ("recipes", "message"),
    [
        ({}, "small: no such recipe"),
        ({"small": {"output_dir": "runs/small"}}, "remove output_dir"),
        ({"small": {"pairwise": {"pairs": "data/none.parquet"}}}, "data/none.parquet: no such file; make it with"),
    ],
)
def test_a_graph_that_cannot_be_made_is_one_error(workplace, recipes, message):
    for name, changes in recipes.items():
        workplace.write_recipe(name, **changes)
    with pytest.raises(UserError, match=message):
        derive_graph("small")


def test_only_folds_that_are_validated_in_are_folds(workplace):
    pairs = workplace.folder / "data/pairs.parquet"
    roles = pl.when(pl.col("fold") == 1).then(pl.lit("pool")).otherwise(pl.lit("train"))
    pl.read_parquet(pairs).with_columns(role=roles).write_parquet(pairs)
    workplace.write_recipe("small")
    assert derive_graph("small").runs["small"].folds == [0]
