"""Two processes on the CPU, started by Axolotl's own launcher: DDP and ZeRO-2 train, and their rows are not mixed up."""

import os
import subprocess

import polars as pl
import pytest
import yaml

from preprocess.files import read_json
from tests import tiny
from tests.conftest import ROOT

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("recipe", ["demo", "gemma2_cls"], ids=["DDP", "ZeRO-2"])
def test_two_processes_train_and_predict_as_one_does(recipe, tiny_models, tmp_path):
    source = ROOT / f"recipes/{recipe}.yml"
    values = yaml.safe_load(source.read_text())
    changes = {}
    if "deepspeed" in values:
        changes["deepspeed"] = str(tiny.deepspeed_numbers(values["deepspeed"], tmp_path, values, processes=2))
    pairs = tiny.pairs_parquet(tmp_path / "pairs.parquet", 205)
    twin = tiny.twin(source, tmp_path, tiny_models("gemma2"), pairs, **changes)
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = ["axolotl", "train", str(twin), "--launcher", "torchrun", "--", "--nproc_per_node", "2"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, timeout=400)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]

    run = tmp_path / recipe
    assert pl.read_parquet(run / "predictions.parquet").height == 41
    packaged = subprocess.run(["python", "-m", "postprocess", str(twin)], capture_output=True, text=True, cwd=ROOT, timeout=400)
    assert packaged.returncode == 0, packaged.stderr[-2000:]
    recorded, trained, *_ = read_json(run / "agreement.json")["models"]
    assert (recorded["model"], trained["model"]) == ("recorded", "trained")
    assert recorded["against_trained"]["largest"] < 1e-4
