"""Axolotl trains on a GPU: LoRA in bf16, QLoRA on a base in nf4; what comes out is packaged and agrees with its training."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from postprocess.pipeline import package_recipe
from preprocess.core.files import read_json
from recipes.pairwise.config.schema import read_recipe
from tests import tiny
from tests.conftest import ROOT

STEPS = 20


def train(recipe: Path, *launcher: str) -> subprocess.CompletedProcess:
    """Run axolotl in a process of its own."""
    command = [sys.executable, "-m", "axolotl.cli.main", "train", str(recipe), "--launcher", *launcher]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "name, more",
    [
        ("gemma2_cls", {"bf16": "auto", "deepspeed": None}),
        ("gemma2_qlora", {"bf16": "auto"}),
        ("gemma2_reward", {"bf16": "auto", "deepspeed": None}),
        ("gemma2_causal", {"bf16": "auto", "deepspeed": None}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_twin_trains_and_its_package_agrees(name, more, tiny_models, tmp_path, measure):
    recipe = ROOT / "recipes" / f"{name}.yml"
    base = tiny_models(tiny.architecture(yaml.safe_load(recipe.read_text())["base_model"]))
    pairs = tiny.pairs_parquet(tmp_path / "pairs.parquet", 200)
    twin = tiny.twin(recipe, tmp_path, base, pairs)
    values = yaml.safe_load(twin.read_text()) | more | {"max_steps": STEPS}
    twin.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))

    trained = train(twin, "python")
    assert trained.returncode == 0, (trained.stdout + trained.stderr)[-3000:]

    checked = read_recipe(twin)
    package_recipe(checked)
    agreement = read_json(checked.run_folder / "agreement.json")
    [recorded] = [line for line in agreement["models"] if line["model"] == "recorded"]
    measure(f"{name} twin, bf16: recorded against trained, mean", round(recorded["against_trained"]["mean"], 5))
    measure(f"{name} twin: packaged", agreement["packaged"])
    assert agreement["agrees"] is True
