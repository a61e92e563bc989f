"""Axolotl trains in bf16 on a GPU: LoRA, QLoRA, flash-attention, ZeRO-2. Its package agrees with the training."""

import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from postprocess.pipeline import package_recipe
from preprocess.core.files import read_json
from recipes.pairwise.config.axolotl_keys import PLUGIN
from recipes.pairwise.config.schema import read_recipe
from tests import tiny
from tests.conftest import ROOT

STEPS = 20
ONE_PROCESS = ("torchrun", "--", "--nproc_per_node", "1")  # DeepSpeed wants a launcher's variables
NO_DEEPSPEED = {"deepspeed": None}
# Axolotl's kernels for LoRA, and Liger's layers, are on in every other case.
NO_KERNELS = {"lora_qkv_kernel": False, "lora_o_kernel": False, "lora_mlp_kernel": False, "plugins": [PLUGIN]}
FLASH = {"attn_implementation": "flash_attention_2"}
PADDING_FREE = {"pairwise": {"padding_free": True}}
needs_flash = pytest.mark.skipif(find_spec("flash_attn") is None, reason="flash-attn is not installed")


def train(recipe: Path, launcher: Sequence[str]) -> subprocess.CompletedProcess:
    """Run axolotl in a process of its own."""
    command = [sys.executable, "-m", "axolotl.cli.main", "train", str(recipe), "--launcher", *launcher]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("name", "keys", "launcher"),
    [
        pytest.param("gemma2_cls", NO_DEEPSPEED, ("python",), id="LoRA"),
        pytest.param("gemma2_cls", NO_DEEPSPEED | NO_KERNELS, ("python",), id="LoRA, no kernels"),
        pytest.param("gemma2_cls", NO_DEEPSPEED | FLASH, ("python",), id="LoRA, flash-attention", marks=needs_flash),
        pytest.param("gemma2_causal", NO_DEEPSPEED, ("python",), id="LoRA, label tokens"),
        pytest.param("gemma2_cls", NO_DEEPSPEED | PADDING_FREE, ("python",), id="LoRA, padding-free"),
        pytest.param("gemma2_qlora", {}, ("python",), id="QLoRA"),
        pytest.param("gemma2_reward", {}, ONE_PROCESS, id="LoRA, reward, ZeRO-2"),
    ],
)
def test_a_twin_trains_in_bf16_and_its_package_agrees(name, keys, launcher, tiny_models, tmp_path, measure, request):
    recipe = ROOT / "recipes" / f"{name}.yml"
    base = tiny_models(tiny.architecture(yaml.safe_load(recipe.read_text())["base_model"]))
    pairs = tiny.pairs_parquet(tmp_path / "pairs.parquet", 200)
    twin = tiny.twin(recipe, tmp_path, base, pairs)
    values = yaml.safe_load(twin.read_text())
    block = values["pairwise"] | keys.get("pairwise", {})
    values |= keys | {"pairwise": block, "bf16": "auto", "max_steps": STEPS}
    twin.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))

    trained = train(twin, launcher)
    assert trained.returncode == 0, (trained.stdout + trained.stderr)[-3000:]

    checked = read_recipe(twin)
    package_recipe(checked)
    agreement = read_json(checked.run_folder / "agreement.json")
    [recorded] = [line for line in agreement["models"] if line["model"] == "recorded"]
    case = request.node.callspec.id
    measure(f"{name} twin, {case}, bf16: recorded against trained, mean", round(recorded["against_trained"]["mean"], 5))
    measure(f"{name} twin, {case}: packaged", agreement["packaged"])
    assert agreement["agrees"] is True
