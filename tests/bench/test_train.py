"""The bench of training, tiny: its contenders compute the same training, and its table says so."""

import os

import pytest
import torch

from preprocess.core.files import read_yaml
from tests import tiny
from tests.bench import processes
from tests.bench.train import __main__ as bench
from tests.bench.train import shapes, work

RECIPES = tiny.ROOT / "recipes"


@pytest.fixture(autouse=True)
def one_thread_a_training(monkeypatch):
    def in_process(function, *arguments, imports):
        return processes.in_process(run_on_one_thread, function, *arguments, imports=imports)

    for module in (bench, shapes):
        monkeypatch.setattr(module, "in_process", in_process)


def run_on_one_thread(function, *arguments):
    """Threads that outnumber the cores wait for each other. A training takes all of them where this variable is 1."""
    os.environ.pop("OMP_NUM_THREADS", None)
    torch.set_num_threads(1)
    return function(*arguments)


def write_inputs(folder, base, recipe, trained):
    pairs = tiny.pairs_parquet(folder / "tiny.parquet", 100)
    work.write_base(folder, base)
    block = read_yaml(RECIPES / f"{recipe}.yml")["pairwise"]
    work.write_rows(folder, work.draw_rows(pairs, trained, held_out=8), block)


@pytest.mark.timeout(580)
def test_all_contenders_train_the_same_model_on_the_same_rows(tmp_path, tiny_models):
    write_inputs(tmp_path, tiny_models("bert"), "minilm_reward", trained=64)
    results = {"matrix_rate": 1e11, "runs": {}}
    bench.add_round(results, tmp_path, ["trl", "trainer", "ours"])
    runs = {name: run for name, [run] in results["runs"].items()}

    # In random order all take the same rows at each step, so that the curves are the same.
    for name in ("trl", "trainer"):
        for figure in ("losses", "held_out_before", "held_out_after"):
            assert runs[name][figure] == pytest.approx(runs["ours"][figure], abs=5e-7)
        assert runs[name]["padding"] > 1.1
    assert runs["ours"]["padding"] == 1
    assert runs["ours"]["held_out_after"] != pytest.approx(runs["ours"]["held_out_before"], abs=2e-6)

    ours = bench.format_table(results).splitlines()[-1]
    assert ours.startswith("| ours | random | ")
    assert "| 1.00 (1.00 to 1.00) | 1.00 |" in ours


@pytest.mark.timeout(300)
def test_a_switch_is_measured_and_one_that_fails_is_a_line_of_the_table(tmp_path, tiny_models):
    write_inputs(tmp_path, tiny_models("gemma2"), "gemma2_reward", trained=8)
    figures = shapes.measure_switches(tmp_path, "gemma2_reward", ["LoRA"], ["gradient checkpointing", "flash-attention"])
    run = figures["LoRA, gradient checkpointing"]
    assert run["pairs"] == 8
    # Each of two layers has 29,000 weights, a step with LoRA takes four operations a weight and token.
    assert run["operations"] > 8 * 2 * 20 * 4 * 2 * 28_000
    table = shapes.format_table(figures, matrix_rate=1e12).splitlines()
    assert table[2].startswith("| LoRA, gradient checkpointing | ")
    assert table[3].startswith("| LoRA, flash-attention | failed: ")
