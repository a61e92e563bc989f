"""Tiny models of every architecture, from a recipe to a kernel's submission: trained with LoRA, packaged, rehearsed.

Other architectures and heads go the same way as twins of the project's recipes, in test_every_approach.py.
"""

import polars as pl
import pytest
import yaml

from kaggle_kernels.build.bundle import build
from kaggle_kernels.build.new_recipe import write_recipe_and_spec as write_recipe_and_spec_for
from kaggle_kernels.rehearsal.rehearse import rehearse
from postprocess.pipeline import package_recipe
from preprocess.core.files import read_json
from recipes.pairwise.config.axolotl_keys import PLUGIN
from recipes.pairwise.config.schema import read_recipe
from tests import forked, tiny
from tests.conftest import ROOT
from tests.postprocess.runs import DECODER_TARGETS, FEW_ROWS, TARGETS

WALKS = [
    ("deberta-v2", "score", "int8"),
    *[
        pytest.param(kind, head, quantize, marks=pytest.mark.slow)
        for kind, head, quantize in (
            ("deberta-v2", "reward", "none"),
            ("modernbert", "score", "nf4"),
            ("qwen3", "label_tokens", "nf4"),
            ("phi3", "reward", "int8"),
            ("mistral", "label_tokens", "int8"),
            ("mistral", "reward", "nf4"),
        )
    ],
]


def write_recipe_and_spec(folder, base, kind: str, head: str, quantize: str):
    """Write a recipe for a tiny base model, and the spec that serves it."""
    block = {
        "pairs": str(tiny.pairs_parquet(folder / "pairs.parquet", 40)),
        "template": "bert" if kind in tiny.ENCODERS else "gemma",
        "budget_tokens": 192,
        "head": head,
        "package": {"slug": "pairwise-walk", "quantize": quantize, "tolerance": 0.2, **FEW_ROWS},
    }
    values = {
        "base_model": str(base),
        "plugins": [PLUGIN],
        "pairwise": block,
        "adapter": "lora",
        "lora_r": 8,
        "lora_alpha": 16,
        "lora_target_modules": TARGETS.get(kind, DECODER_TARGETS),
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "num_epochs": 1,
        "max_steps": 3,
        "learning_rate": 0.01,
        "optimizer": "adamw_torch",
        "save_strategy": "no",
        "bf16": False,
    }
    recipe = folder / "recipes" / "walk.yml"
    recipe.parent.mkdir()
    recipe.write_text(yaml.safe_dump(values))

    spec = folder / "specs" / "walk.yml"
    spec.parent.mkdir()
    spec.write_text(
        "title: Pairwise Walk\ncompetition: wsdm\nclock_seconds: 600\nwheels: pairwise-wheels\n"
        "packages: [{run: walk, dataset: pairwise-walk}]\n"
    )
    return recipe, spec


@pytest.mark.parametrize(("kind", "head", "quantize"), WALKS)
def test_a_recipe_becomes_a_kernel_that_submits(kind, head, quantize, tiny_models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe, spec = write_recipe_and_spec(tmp_path, tiny_models(kind), kind, head, quantize)
    ended = forked.axolotl("train", recipe)
    assert ended.code == 0, ended.output[-3000:]

    package = package_recipe(read_recipe(recipe))
    models = {line["model"]: line for line in read_json(package.parent / "agreement.json")["models"]}
    assert models["recorded"]["against_trained"]["largest"] < 1e-4, "the model is not loaded as it was trained"

    tiny.pairs(12, seed=4, prefix="test").write_parquet(tmp_path / "test.parquet")
    build(spec)
    rehearse(spec, tmp_path / "test.parquet", tmp_path / "rehearsal", ROOT / ".venv-kaggle/bin/python")
    assert pl.read_csv(tmp_path / "rehearsal" / "submission.csv").height == 12
    assert read_json(tmp_path / "rehearsal" / "kernel.json")["scored"] == 12


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "head"), [("qwen3", "score"), ("phi3", "reward"), ("modernbert", "score")])
def test_a_new_recipe_becomes_a_kernel_that_submits(kind, head, tiny_models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_recipe_and_spec_for("newcomer", str(tiny_models(kind)), head)
    pairs = tiny.pairs_parquet(tmp_path / "pairs.parquet", 40)
    twin = tiny.twin(tmp_path / "recipes/newcomer.yml", tmp_path / "outputs", tiny_models(kind), pairs)
    ended = forked.axolotl("train", twin)
    assert ended.code == 0, ended.output[-3000:]
    package_recipe(read_recipe(twin))

    tiny.pairs(12, seed=4, prefix="test").write_parquet(tmp_path / "test.parquet")
    spec = tmp_path / "kaggle_kernels/specs/newcomer.yml"
    build(spec)
    rehearse(spec, tmp_path / "test.parquet", tmp_path / "rehearsal", ROOT / ".venv-kaggle/bin/python")
    assert pl.read_csv(tmp_path / "rehearsal" / "submission.csv").height == 12
