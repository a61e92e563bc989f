"""The bench of training, tiny: its contenders compute the same training, and its table says so."""

import pytest
from click.testing import CliRunner

from preprocess.core.files import read_json, read_yaml
from tests import tiny
from tests.bench.train import __main__ as bench
from tests.bench.train import shapes, work


@pytest.mark.timeout(580)
def test_all_contenders_train_the_same_model_on_the_same_rows(tmp_path, tiny_models, monkeypatch):
    pairs = tiny.pairs_parquet(tmp_path / "pairs.parquet", 100)
    monkeypatch.chdir(tmp_path)
    arguments = ["--pairs", str(pairs), "--base", str(tiny_models("bert")), "--rounds", "1"]
    arguments += ["--trained", "64", "--held-out", "8", "--tokens", "128"]
    arguments += ["--only", "trl,trainer,ours"]
    outcome = CliRunner().invoke(bench.main, arguments, catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output

    runs = {}
    for name, [run] in read_json(tmp_path / "outputs/bench/train.json")["runs"].items():
        runs[name] = run
    for run in runs.values():
        assert run["pairs"] == 64
        assert run["seconds"] > 0
        assert run["held_out_before"] == pytest.approx(runs["ours"]["held_out_before"], abs=1e-5)

    # In random order all take the same rows at each step, whatever they pad.
    for name in ("trl", "trainer"):
        assert runs[name]["losses"] == pytest.approx(runs["ours"]["losses"], abs=1e-4)
    assert runs["ours"]["padding"] == 1 < runs["trl"]["padding"]
    assert "| TRL RewardTrainer | random |" in outcome.output


@pytest.mark.timeout(300)
def test_a_switch_is_measured_and_one_that_fails_is_a_line_of_the_table(tmp_path, tiny_models):
    pairs = tiny.pairs_parquet(tmp_path / "pairs.parquet", 60)
    work.write_base(tmp_path, tiny_models("gemma2"))
    block = read_yaml(tiny.ROOT / "recipes" / "gemma2_reward.yml")["pairwise"]
    work.write_rows(tmp_path, work.draw_rows(pairs, 8, 4), block)

    figures = shapes.measure_switches(tmp_path, "gemma2_reward", ["LoRA"], ["gradient checkpointing", "flash-attention"])
    run = figures["LoRA, gradient checkpointing"]
    assert run["pairs"] == 8
    # Each of two layers has 29,000 weights, a step with LoRA takes four operations a weight and token.
    assert run["operations"] > 8 * 2 * 20 * 4 * 2 * 28_000
    table = shapes.format_table(figures, matrix_rate=1e12).splitlines()
    assert table[2].startswith("| LoRA, gradient checkpointing | ")
    assert table[3].startswith("| LoRA, flash-attention | failed: ")
