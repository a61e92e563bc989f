"""Two processes on the CPU, started by Axolotl's own launcher: they train what one does, and their rows are not mixed up."""

import os
import subprocess

import polars as pl
import pytest

from preprocess.core.files import read_json
from tests import forked
from tests.conftest import ROOT
from tests.recipes import comparable

pytestmark = pytest.mark.slow
TORCHRUN = ("--launcher", "torchrun", "--")


@pytest.fixture(scope="module")
def one_process(tiny_models, tmp_path_factory):
    """The run folder of gemma2_cls's comparable twin, trained by one process without DeepSpeed."""
    folder = tmp_path_factory.mktemp("one")
    ended = forked.axolotl("train", comparable.twin("gemma2_cls", folder, tiny_models("gemma2"), rows=205))
    assert ended.code == 0, ended.output[-3000:]
    return folder / "gemma2_cls"


def run(command: list[str], **environment: str) -> None:
    ended = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, cwd=ROOT, timeout=400, check=False
    )
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]


@pytest.mark.parametrize("stage", [None, "zero2", "zero3"], ids=["DDP", "ZeRO-2", "ZeRO-3"])
def test_two_processes_train_predict_and_package_what_one_does(stage, one_process, tiny_models, tmp_path):
    """The micro-batches of a step are the same, and so are the sums over them but for their order: hence the tolerances."""
    twin = comparable.twin("gemma2_cls", tmp_path, tiny_models("gemma2"), stage, processes=2, rows=205)
    command = ["axolotl", "train", str(twin), *TORCHRUN, "--nproc_per_node", "2"]
    run(command, ACCELERATE_USE_CPU="true", DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")

    folder = tmp_path / "gemma2_cls"
    weights, expected = comparable.trained_weights(folder), comparable.trained_weights(one_process)
    assert comparable.largest_difference(weights, expected) < comparable.ROUNDING
    predicted, as_one = (pl.read_parquet(place / "predictions.parquet") for place in (folder, one_process))
    assert predicted["id"].to_list() == as_one["id"].to_list()
    assert len(predicted) == 41
    # A hundredth of what tells the rows apart: a row that stands in another's place is much further off.
    assert (predicted["p_model_a"] - as_one["p_model_a"]).abs().max() < as_one["p_model_a"].std() / 100

    run(["python", "-m", "postprocess", str(twin)])
    recorded, trained, *_ = read_json(folder / "agreement.json")["models"]
    assert (recorded["model"], trained["model"]) == ("recorded", "trained")
    assert recorded["against_trained"]["largest"] < 1e-4
