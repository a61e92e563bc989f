"""A workplace with recipes, specs and pairs, in which stand-ins of the commands write what the next step looks for."""

import os

import pytest
import yaml
from click.testing import CliRunner

from recipes.pairwise.graph.make import main
from tests import tiny
from tests.conftest import ROOT

# Each command appends its line to calls.txt; `axolotl train` fails, or waits, where a file says so.
STAND_INS = {
    "axolotl/cli/main.py": """
import json, os, sys, time
from pathlib import Path
import polars as pl

def main():
    recipe = Path(sys.argv[2])
    fold = os.environ["PAIRWISE_FOLD"]
    folder = Path("outputs", recipe.stem, f"fold-{fold}" if fold else "")
    folder.mkdir(parents=True, exist_ok=True)
    with open("calls.txt", "a") as calls:
        calls.write(f"train {folder} {os.environ.get('CUDA_VISIBLE_DEVICES', '')}".strip() + "\\n")
    if Path(f"{recipe.stem}.fails").exists():
        sys.exit("no memory left")
    while Path(f"{recipe.stem}.waits").exists():
        time.sleep(0.1)
    rows = pl.read_parquet("data/pairs.parquet").filter(pl.col("fold") == int(fold or 0))
    rows.select("id").write_parquet(folder / "predictions.parquet")
    names = ("accuracy", "log_loss", "flip_rate", "accuracy_of_longer", "rows")
    (folder / "metrics.json").write_text(json.dumps(dict.fromkeys(names, rows.height)))
    (folder / "contract.json").write_text("{}")
""",
    "postprocess/__main__.py": """
import sys
from pathlib import Path
folder = Path("outputs", Path(sys.argv[1]).stem, "mean" if "--adapter" in sys.argv else "")
open("calls.txt", "a").write(f"postprocess {' '.join(sys.argv[1:])}\\n")
(folder / "package").mkdir(parents=True, exist_ok=True)
(folder / "package/manifest.json").write_text("{}")
(folder / "agreement.json").write_text("{}")
if "--keep-merged" in sys.argv:
    (folder / "merged").mkdir(exist_ok=True)
    (folder / "merged/config.json").write_text("{}")
""",
    "postprocess/labels.py": """
import sys
from pathlib import Path
open("calls.txt", "a").write(f"labels {sys.argv[1]}\\n")
Path("outputs", Path(sys.argv[1]).stem, "labels.parquet").write_text("labels")
""",
    "postprocess/report.py": """
import sys
from pathlib import Path
open("calls.txt", "a").write(f"report {sys.argv[1]}\\n")
Path(sys.argv[1], "report.html").write_text("report")
""",
    "kaggle_kernels/__main__.py": """
import sys
from pathlib import Path
name = Path(sys.argv[2]).stem
open("calls.txt", "a").write(f"{sys.argv[1]} {name}\\n")
outputs = {"build": [f"outputs/kernels/{name}/kernel.py"],
           "rehearse": [f"outputs/{name}/rehearsal/submission.csv", f"outputs/{name}/rehearsal/rehearsal.json"]}
for file in map(Path, outputs[sys.argv[1]]):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("made")
""",
}


class Workplace:
    """The current folder of a test."""

    def __init__(self, folder):
        self.folder = folder
        self.demo = yaml.safe_load((ROOT / "recipes/demo.yml").read_text())
        self.demo["pairwise"]["pairs"] = "data/pairs.parquet"

    def write_recipe(self, name: str, **changes):
        """Write the demo's recipe with other keys; those of `pairwise` that are given are changed there."""
        block = self.demo["pairwise"] | changes.pop("pairwise", {})
        values = self.demo | changes | {"pairwise": block}
        (self.folder / f"recipes/{name}.yml").write_text(yaml.safe_dump(values))

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
        file.write_text(source)
    (tmp_path / "stand_ins/axolotl/__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'stand_ins'}{os.pathsep}{ROOT}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    for name in ("recipes", "kaggle_kernels/specs", "data"):
        (tmp_path / name).mkdir(parents=True)
    tiny.pairs_parquet(tmp_path / "data/pairs.parquet", 20)
    monkeypatch.chdir(tmp_path)
    return Workplace(tmp_path)
