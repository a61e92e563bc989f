"""A training that is killed and resumed ends with the weights of one that was left alone."""

import os
import signal
import time

import yaml

from preprocess.core.files import read_json
from tests import forked
from tests.recipes import comparable

SAVES = {"max_steps": 12, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1, "lora_dropout": 0.1}
BATCHES = {"micro_batch_size": 3, "gradient_accumulation_steps": 2}  # 6 steps an epoch: checkpoints stand within epochs


def with_checkpoints(folder, base):
    folder.mkdir()
    recipe = comparable.twin("demo", folder, base)
    values = yaml.safe_load(recipe.read_text()) | SAVES | BATCHES
    values["pairwise"]["tokens_per_micro_batch"] = 2048
    recipe.write_text(yaml.safe_dump(values))
    return recipe


def kill_after_a_checkpoint(recipe, run) -> None:
    """Train, and send SIGKILL as soon as a checkpoint is there: its step, and what comes after it, are left to chance."""
    process = forked.start("train", recipe)
    deadline = time.monotonic() + 300
    while not any(run.glob("checkpoint-*/trainer_state.json")):
        assert process.is_alive() and time.monotonic() < deadline, recipe.with_suffix(".log").read_text()[-3000:]
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (run / "contract.json").exists()


def test_a_killed_run_that_is_resumed_ends_with_the_weights_of_one_left_alone(tiny_models, tmp_path):
    whole = with_checkpoints(tmp_path / "whole", tiny_models("gemma2"))
    assert forked.axolotl("train", whole).code == 0
    killed = with_checkpoints(tmp_path / "killed", tiny_models("gemma2"))
    run = tmp_path / "killed/demo"
    kill_after_a_checkpoint(killed, run)
    resumed = forked.axolotl("train", killed, auto_resume_from_checkpoints=True)
    assert resumed.code == 0, resumed.output[-3000:]
    history = read_json(run / "history.json")
    assert [record["step"] for record in history if "loss" in record][-1] == 12
    weights = comparable.trained_weights(run)
    assert comparable.largest_difference(weights, comparable.trained_weights(tmp_path / "whole/demo")) < 1e-6
