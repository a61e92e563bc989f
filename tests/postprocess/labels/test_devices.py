"""Folds are scored side by side, one on each GPU that the user has chosen."""

import subprocess
from types import SimpleNamespace

from postprocess.labels.__main__ import score_on_gpus
from tests import tiny


def test_each_fold_gets_one_of_the_chosen_gpus(tmp_path, monkeypatch):
    pairs = tiny.pairs_parquet(tmp_path / "pairs.parquet", 20)
    for fold in range(4):
        (tmp_path / f"fold-{fold}").mkdir()
    calls = []

    def run(command, env, check):
        calls.append((command[-1], env["CUDA_VISIBLE_DEVICES"]))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    recipe = SimpleNamespace(path="R.yml", run_folder=tmp_path, pairwise=SimpleNamespace(pairs=str(pairs)))
    score_on_gpus(recipe, ["4", "6"])
    assert sorted(name for name, _ in calls) == ["fold-0", "fold-1", "fold-2", "fold-3"], "fold 4 has no run"
    assert {device for _, device in calls} == {"4", "6"}
