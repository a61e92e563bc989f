"""Two processes on the CPU, as with two GPUs: they train what one does, and their rows are not mixed up."""

import numpy as np
import polars as pl
import pytest
from datasets import Dataset

from postprocess.pipeline import package_recipe
from preprocess.core.files import read_json
from recipes.pairwise.config.schema import read_recipe
from recipes.pairwise.data.token_budget import StepShape, TokenBudgetBatches
from tests import forked, tiny
from tests.recipes import comparable, two_processes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def one_process(tiny_models, tmp_path_factory):
    """The run folder of gemma2_cls's comparable twin, trained by one process without DeepSpeed."""
    folder = tmp_path_factory.mktemp("one")
    forked.train(comparable.twin("gemma2_cls", folder, tiny_models("gemma2"), rows=205))
    return folder / "gemma2_cls"


TRAININGS = [(None, two_processes.launch), ("zero2", two_processes.train), ("zero3", two_processes.train)]


@pytest.mark.parametrize(("stage", "train"), TRAININGS, ids=["DDP by torchrun", "ZeRO-2", "ZeRO-3"])
def test_two_processes_train_predict_and_package_what_one_does(stage, train, one_process, tiny_models, tmp_path):
    """The micro-batches of a step are the same, and so are the sums over them but for their order: hence the tolerances."""
    twin = comparable.twin("gemma2_cls", tmp_path, tiny_models("gemma2"), stage, processes=2, rows=205)
    train(twin)

    folder = tmp_path / "gemma2_cls"
    weights, expected = comparable.trained_weights(folder), comparable.trained_weights(one_process)
    assert comparable.largest_difference(weights, expected) < comparable.ROUNDING
    predicted, as_one = (pl.read_parquet(place / "predictions.parquet") for place in (folder, one_process))
    assert predicted["id"].to_list() == as_one["id"].to_list()
    assert len(predicted) == 41
    # A hundredth of what tells the rows apart: a row that stands in another's place is much further off.
    assert (predicted["p_model_a"] - as_one["p_model_a"]).abs().max() < as_one["p_model_a"].std() / 100

    package_recipe(read_recipe(twin))
    recorded, trained, *_ = read_json(folder / "agreement.json")["models"]
    assert (recorded["model"], trained["model"]) == ("recorded", "trained")
    assert recorded["against_trained"]["largest"] < 1e-4


# One step of plain gradient descent at a rate of 1: it moves each weight by its gradient.
ONE_STEP = {"optimizer": "sgd", "learning_rate": 1.0, "weight_decay": 0.0, "lr_scheduler": "constant", "max_steps": 1}
ONE_STEP |= {"group_by_length": None, "warmup_ratio": None}


def make_one_step(twin, block: dict, **batches: int) -> None:
    """Turn a twin of ten rows into one step over its eight training rows, two of which are six times as long."""
    tiny.change(twin, block, **ONE_STEP, **batches)
    file = twin.parent / "pairs.parquet"
    pairs = pl.read_parquet(file)
    long_prompt = pl.concat_list(pl.concat_str([pl.col("prompt").list.first()] * 6, separator=" "))
    is_long = pl.int_range(pl.len()).is_in([1, 2])
    prompt = pl.when(is_long).then(long_prompt).otherwise(pl.col("prompt"))
    pairs.with_columns(prompt=prompt).write_parquet(file)


@pytest.mark.parametrize("stage", [None, "zero2", "zero3"], ids=["DDP", "ZeRO-2", "ZeRO-3"])
def test_unequal_micro_batches_of_two_processes_give_the_gradient_of_one_batch(stage, tiny_models, tmp_path):
    single = comparable.twin("gemma2_cls", tmp_path / "one", tiny_models("gemma2"), rows=10)
    make_one_step(single, {}, micro_batch_size=8)
    forked.train(single)

    double = comparable.twin("gemma2_cls", tmp_path / "two", tiny_models("gemma2"), stage, processes=2, rows=10)
    make_one_step(double, {"tokens_per_micro_batch": 4096})
    two_processes.train(double)

    run = tmp_path / "two/gemma2_cls"
    prepared = next(run.glob("prepared/*/training.arrow"))
    lengths = Dataset.from_file(str(prepared))["length"]
    shape = StepShape(mean_pairs=2, turns=2, processes=2, sequences_per_pair=2)
    micro_batches = TokenBudgetBatches(np.array(lengths), shape, 4096, seed=42)
    assert [len(rows) for rows in micro_batches] == [1, 1, 3, 3]
    gradients, expected = comparable.trained_weights(run), comparable.trained_weights(tmp_path / "one/gemma2_cls")
    assert comparable.largest_difference(gradients, expected) < 1e-6
