"""A workplace with recipes, specs and pairs, in which stand-ins of the commands write what the next step looks for."""

import os

import polars as pl
import pytest
import yaml
from click.testing import CliRunner

from recipes.pairwise.graph.make import main
from tests import tiny
from tests.conftest import ROOT

# What all of them do: a line in calls.txt, and files that hold something.
MAKE = """
import json, os, sys, time
from pathlib import Path

def make(call, *files):
    with open("calls.txt", "a") as calls:
        calls.write(call.strip() + "\\n")
    for file in map(Path, files):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
"""
# `axolotl train` fails, or waits, where a file says so.
STAND_INS = {
    "axolotl/cli/main.py": """
import polars as pl

def main():
    recipe = Path(sys.argv[2])
    fold = os.environ["PAIRWISE_FOLD"]
    folder = Path("outputs", recipe.stem, f"fold-{fold}" if fold else "")
    make(f"train {folder} {os.environ.get('CUDA_VISIBLE_DEVICES', '')}")
    if Path(f"{recipe.stem}.fails").exists():
        sys.exit("no memory left")
    while Path(f"{recipe.stem}.waits").exists():
        time.sleep(0.1)
    folder.mkdir(parents=True, exist_ok=True)
    rows = pl.read_parquet("data/pairs.parquet").filter(pl.col("fold") == int(fold or 0))
    rows.select("id").write_parquet(folder / "predictions.parquet")
    names = ("accuracy", "log_loss", "flip_rate", "accuracy_of_longer", "rows")
    (folder / "metrics.json").write_text(json.dumps(dict.fromkeys(names, rows.height)))
    (folder / "contract.json").write_text("{}")
""",
    "postprocess/__main__.py": """
folder = Path("outputs", Path(sys.argv[1]).stem, "mean" if "--adapter" in sys.argv else "")
files = [folder / "package/manifest.json", folder / "agreement.json"]
if "--keep-merged" in sys.argv:
    files.append(folder / "merged/config.json")
make(f"postprocess {' '.join(sys.argv[1:])}", *files)
""",
    "postprocess/labels.py": """
make(f"labels {sys.argv[1]}", Path("outputs", Path(sys.argv[1]).stem, "labels.parquet"))
""",
    "postprocess/report.py": """
make(f"report {sys.argv[1]}", Path(sys.argv[1], "report.html"))
""",
    "kaggle_kernels/__main__.py": """
name = Path(sys.argv[2]).stem
outputs = {"build": [f"outputs/kernels/{name}/kernel.py"],
           "rehearse": [f"outputs/{name}/rehearsal/submission.csv", f"outputs/{name}/rehearsal/rehearsal.json"]}
make(f"{sys.argv[1]} {name}", *outputs[sys.argv[1]])
""",
}


class Workplace:
    """The current folder of a test."""

    def __init__(self, folder):
        self.folder = folder

    def write_recipe(self, name: str, pairwise: dict | None = None, **changes):
        """Write the demo's recipe with other keys, in its block too."""
        block = {"pairs": "data/pairs.parquet"} | (pairwise or {})
        tiny.change(ROOT / "recipes/demo.yml", block, self.folder / f"recipes/{name}.yml", **changes)

    def write_spec(self, name: str, *runs: str):
        packages = [{"run": run, "dataset": f"pairwise-{run}"} for run in runs]
        (self.folder / f"kaggle_kernels/specs/{name}.yml").write_text(yaml.safe_dump({"packages": packages}))

    def make(self, *arguments: str):
        """Run `pairwise make`, and return its result, with the calls of commands as `calls`."""
        calls = self.folder / "calls.txt"
        calls.unlink(missing_ok=True)
        result = CliRunner().invoke(main, arguments)
        result.calls = calls.read_text().splitlines() if calls.exists() else []
        return result


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    for name, source in STAND_INS.items():
        file = tmp_path / "stand_ins" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        (file.parent / "__init__.py").touch()
        file.write_text(MAKE + source)
    (tmp_path / "stand_ins/axolotl/__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'stand_ins'}{os.pathsep}{ROOT}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    for name in ("recipes", "kaggle_kernels/specs", "data"):
        (tmp_path / name).mkdir(parents=True)
    pairs = tiny.pairs_parquet(tmp_path / "data/pairs.parquet", 20)
    pl.read_parquet(pairs).with_columns(pl.col("fold") % 2).write_parquet(pairs)
    monkeypatch.chdir(tmp_path)
    return Workplace(tmp_path)
