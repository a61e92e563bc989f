"""A training that is killed and resumed ends with the weights of one that was left alone, in one process or in several."""

import random
import time
from multiprocessing import Process
from pathlib import Path

import pytest
import yaml

from preprocess.core.files import read_json
from tests import forked, tiny
from tests.conftest import ROOT
from tests.recipes import comparable, two_processes

STEPS = 8
SAVES = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1, "logging_steps": 1}
RANDOM_ORDERS = {"orders": "random"}
TOKEN_BUDGET = {"tokens_per_micro_batch": 2048} | RANDOM_ORDERS
BLOCKS = [(TOKEN_BUDGET, 0), pytest.param(RANDOM_ORDERS, 5, marks=pytest.mark.slow)]


def with_checkpoints(folder: Path, base: Path, block: dict, stage: str | None = None, processes: int = 1) -> Path:
    """Write a recipe that saves checkpoints, whose 8 steps end in the third epoch of three steps, and that has dropout."""
    recipe = comparable.twin("gemma2_cls", folder, base, stage, processes, rows=30)
    group_by_length = None if "tokens_per_micro_batch" in block else True
    return tiny.change(recipe, block, **SAVES, lora_dropout=0.1, group_by_length=group_by_length)


def kill_at_random_step(processes: list[Process], recipe: Path, seed: int) -> None:
    """Send SIGKILL to all processes of a run as soon as its log shows a step that a seed draws."""
    step = random.Random(seed).randint(3, STEPS - 2)
    log = recipe.with_suffix(".log")
    deadline = time.monotonic() + 300
    while not log.exists() or log.read_text(errors="replace").count("'loss'") < step:
        is_running = all(process.is_alive() for process in processes)
        assert is_running and time.monotonic() < deadline, log.read_text(errors="replace")[-3000:]
        time.sleep(0.005)

    for process in processes:
        process.kill()
        process.join()
    assert not recipe.with_suffix("").joinpath("contract.json").exists()


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yml")), ids=lambda recipe: recipe.stem)
def test_a_recipe_of_more_than_an_hour_keeps_its_last_checkpoint(recipe):
    text = recipe.read_text()
    hardware = next(line for line in text.splitlines() if line.startswith("# Hardware:"))
    values = yaml.safe_load(text)
    if "minute" in hardware or values["pairwise"].get("train") is False:
        return
    assert values["save_strategy"] == "steps"
    assert values["save_steps"] <= 100
    assert values["save_total_limit"] >= 1


def assert_resumed_to_equal_weights(killed: Path, whole: Path) -> None:
    """Assert that a killed recipe went on from a checkpoint, to the weights of one that was left alone."""
    steps_after_resuming = killed.with_suffix(".log").read_text(errors="replace").count("'loss'")
    assert 0 < steps_after_resuming < STEPS
    run = killed.with_suffix("")
    history = read_json(run / "history.json")
    assert [record["step"] for record in history if "loss" in record][-1] == STEPS
    weights = comparable.trained_weights(run)
    assert comparable.largest_difference(weights, comparable.trained_weights(whole.with_suffix(""))) < 1e-6


@pytest.mark.parametrize(("block", "seed"), BLOCKS, ids=["token budget", "length grouping"])
def test_a_killed_run_ends_with_the_weights_of_one_left_alone(block, seed, tiny_models, tmp_path):
    whole = with_checkpoints(tmp_path / "whole", tiny_models("gemma2"), block)
    forked.train(whole)

    killed = with_checkpoints(tmp_path / "killed", tiny_models("gemma2"), block)
    kill_at_random_step([forked.start("train", killed)], killed, seed)

    forked.train(killed, auto_resume_from_checkpoints=True)
    assert_resumed_to_equal_weights(killed, whole)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "seed"), [(None, 0), ("zero2", 3), ("zero3", 5)], ids=["DDP", "ZeRO-2", "ZeRO-3"])
def test_two_killed_processes_end_with_the_weights_of_two_left_alone(stage, seed, tiny_models, tmp_path):
    whole = with_checkpoints(tmp_path / "whole", tiny_models("gemma2"), TOKEN_BUDGET, stage, processes=2)
    two_processes.train(whole)

    killed = with_checkpoints(tmp_path / "killed", tiny_models("gemma2"), TOKEN_BUDGET, stage, processes=2)
    kill_at_random_step(two_processes.start(killed), killed, seed)

    two_processes.train(killed, auto_resume_from_checkpoints=True)
    assert_resumed_to_equal_weights(killed, whole)
