"""Tiny models of every architecture, from a recipe to a kernel's submission: trained with LoRA, packaged, rehearsed.

Other architectures and heads go the same way as twins of the project's recipes, in test_every_approach.py.
"""

import polars as pl
import pytest

from kaggle_kernels.build.bundle import build
from kaggle_kernels.build.new_recipe import write_recipe_and_spec
from kaggle_kernels.rehearsal.rehearse import rehearse
from postprocess.pipeline import package_recipe
from preprocess.core.files import read_json
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


def write_spec(path, run: str):
    """Write the spec of a kernel that serves one run."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        "title: Pairwise Walk\ncompetition: wsdm\nclock_seconds: 600\nwheels: pairwise-wheels\n"
        f"packages: [{{run: {run}, dataset: pairwise-demo}}]\n"
    )
    return path


def rehearse_twelve_rows(spec, folder):
    """Build a spec's kernel and run it; return the folder of what it wrote, once all twelve rows are answered."""
    tiny.pairs(12, seed=4, prefix="test").write_parquet(folder / "test.parquet")
    build(spec)
    rehearse(spec, folder / "test.parquet", folder / "rehearsal", ROOT / ".venv-kaggle/bin/python")
    assert pl.read_csv(folder / "rehearsal" / "submission.csv").height == 12
    return folder / "rehearsal"


def largest_loading_error(package) -> float:
    """The largest difference in probability that loading a trained model anew makes."""
    models = {line["model"]: line for line in read_json(package.parent / "agreement.json")["models"]}
    return models["recorded"]["against_trained"]["largest"]


@pytest.mark.parametrize(("kind", "head", "quantize"), WALKS)
def test_a_recipe_becomes_a_kernel_that_submits(kind, head, quantize, tiny_models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    block = {
        "pairs": str(tiny.pairs_parquet(tmp_path / "pairs.parquet", 40)),
        "template": "bert" if kind in tiny.ENCODERS else "gemma",
        "budget_tokens": 192,
        "head": head,
        "package": {"slug": "pairwise-demo", "quantize": quantize, "tolerance": 0.2, **FEW_ROWS},
    }
    targets = TARGETS.get(kind, DECODER_TARGETS)
    keys = {"lora_target_modules": targets, "micro_batch_size": 4, "max_steps": 3, "learning_rate": 0.01, "bf16": False}
    recipe = tmp_path / "recipes/walk.yml"
    forked.train(tiny.change(ROOT / "recipes/demo.yml", block, recipe, base_model=str(tiny_models(kind)), **keys))

    package = package_recipe(read_recipe(recipe))
    assert largest_loading_error(package) < 1e-4, "the model is not loaded as it was trained"
    rehearsal = rehearse_twelve_rows(write_spec(tmp_path / "specs/walk.yml", "walk"), tmp_path)
    assert read_json(rehearsal / "kernel.json")["scored"] == 12


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "head"), [("qwen3", "score"), ("phi3", "reward"), ("modernbert", "score")])
def test_a_new_recipe_becomes_a_kernel_that_submits(kind, head, tiny_models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_recipe_and_spec("newcomer", str(tiny_models(kind)), head)
    pairs = tiny.pairs_parquet(tmp_path / "pairs.parquet", 40)
    twin = tiny.twin(tmp_path / "recipes/newcomer.yml", tmp_path / "outputs", tiny_models(kind), pairs)
    forked.train(twin)
    package_recipe(read_recipe(twin))
    rehearsal = rehearse_twelve_rows(tmp_path / "kaggle_kernels/specs/newcomer.yml", tmp_path)
    assert read_json(rehearsal / "kernel.json")["scored"] == 12
