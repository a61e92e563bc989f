"""`make demo` as a newcomer runs it, in a copy of the repository: all stages, then nothing to do, then only what changed."""

import json
import os
import shutil
import subprocess

import polars as pl
import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.slow
STAGES = ["input", "preprocess", "train", "postprocess", "build", "rehearse", "report"]


def demo(folder) -> str:
    ended = subprocess.run(
        ["python", "-m", "tests.demo"], cwd=folder, env=os.environ | {"PYTHONPATH": str(folder)}, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_the_demo_learns_submits_and_does_nothing_twice(tmp_path):
    folder = tmp_path / "copy"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in tracked:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    for environment in (".venv-kaggle", ".venv-graph"):
        (folder / environment).symlink_to(ROOT / environment)
    first = demo(folder)
    assert [line.split()[0] for line in first.splitlines()[:-2]] == STAGES
    result = json.loads((folder / "outputs/demo/demo.json").read_text())
    assert sorted(result) == ["accuracy", "log_loss", "report", "stages", "submission"]
    assert result["accuracy"] > 0.75, first
    submission = pl.read_csv(folder / result["submission"])
    test = pl.read_parquet(folder / "outputs/demo/input/test.parquet")
    assert submission.columns == ["id", "winner"]
    assert submission["id"].to_list() == test["id"].to_list()
    assert set(submission["winner"]) == {"model_a", "model_b"}

    assert first.splitlines()[-1] == "report: outputs/demo/report.html"
    assert "<h1>demo</h1>" in (folder / result["report"]).read_text()

    assert [line.split(":")[0] for line in demo(folder).splitlines()[:-2]] == ["up to date", "up to date"]
    (folder / "outputs/demo/rehearsal/submission.csv").unlink()
    third = demo(folder)
    assert [line.split()[0] for line in third.splitlines()[1:-2]] == ["rehearse"]
