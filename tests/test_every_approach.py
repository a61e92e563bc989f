"""Every recipe and spec, found by glob: checked, then end to end and small: trained, packaged, rehearsed to a submission."""

import json
from functools import cache
from pathlib import Path

import jsonschema
import polars as pl
import pytest
import yaml
from transformers import AutoTokenizer

from kaggle_kernels.build.bundle import build
from kaggle_kernels.build.spec import all_specs, read_spec
from kaggle_kernels.publish.package_files import check_package
from kaggle_kernels.rehearsal.rehearse import rehearse
from postprocess.pipeline import package_recipe
from preprocess.core.files import read_json, sha256
from preprocess.model_input import check_golden, read_contract
from recipes.pairwise.config.schema import read_recipe
from tests import forked, tiny
from tests.conftest import ROOT

RECIPES = sorted((ROOT / "recipes").glob("*.yml"))
TRAINED = [recipe for recipe in RECIPES if read_recipe(recipe).pairwise.train]
UNTRAINED = sorted({*RECIPES} - {*TRAINED})
SPECS = all_specs()
ROWS = 40

# `make test` takes recipes of these the whole way, `make test-slow` all others.
QUICK_ARCHITECTURES = ("gemma2", "bert")


def architecture_of(name: str) -> str:
    """Name the tiny architecture of a recipe's twin."""
    recipe = ROOT / "recipes" / f"{name}.yml"
    return tiny.architecture(yaml.safe_load(recipe.read_text())["base_model"])


def recipe_cases(recipes):
    """Make a test case of each recipe; those of other architectures are slow."""
    cases = []
    for recipe in recipes:
        is_quick = architecture_of(recipe.stem) in QUICK_ARCHITECTURES
        cases.append(pytest.param(recipe, id=recipe.stem, marks=[] if is_quick else pytest.mark.slow))
    return cases


def kind_of(package) -> tuple:
    """What of a package makes a kernel take another path."""
    block = read_recipe(ROOT / "recipes" / f"{package.run}.yml").pairwise
    form = block.package
    return architecture_of(package.run), block.head, form.quantize, form.adapter, package.placement


def spec_cases():
    """Make a test case of each spec; it is slow where a recipe is, or where an earlier spec serves packages of its kinds."""
    cases, kinds_seen = [], set()
    for spec in SPECS:
        settings = read_spec(spec)
        kinds = (settings.competition, *(kind_of(package) for package in settings.packages))
        architectures = {architecture_of(package.run) for package in settings.packages}
        is_quick = architectures.issubset(QUICK_ARCHITECTURES) and kinds not in kinds_seen
        kinds_seen.add(kinds)
        cases.append(pytest.param(spec, id=spec.stem, marks=[] if is_quick else pytest.mark.slow))
    return cases


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with pairs, test rows in both competitions' layouts, and the repository's recipes."""
    folder = tmp_path_factory.mktemp("approaches")
    tiny.pairs_parquet(folder / "pairs.parquet", ROWS)
    (folder / "recipes").symlink_to(ROOT / "recipes")
    rows = tiny.pairs(12, seed=4, prefix="test")
    rows.write_parquet(folder / "test.parquet")
    as_turns = [
        pl.col(name).map_elements(lambda text: json.dumps([text]), pl.String) for name in ("prompt", "response_a", "response_b")
    ]
    verdicts = [(pl.col("winner") == name).cast(pl.Int8).alias(f"winner_{name}") for name in ("model_a", "model_b", "tie")]
    rows.with_columns(*as_turns, *verdicts).drop("winner", "language").write_csv(folder / "test.csv")
    return folder


@pytest.fixture(scope="module")
def twin_of(workplace, tiny_models):
    """The twin of a recipe, by name: twin_of("gemma2_cls")."""

    @cache
    def write(name: str) -> Path:
        recipe = ROOT / "recipes" / f"{name}.yml"
        base = tiny_models(architecture_of(name))
        if "Reward" in yaml.safe_load(recipe.read_text())["base_model"]:
            base = tiny.reward_model(base, workplace / "bases" / name)
        return tiny.twin(recipe, workplace / "outputs", base, workplace / "pairs.parquet")

    return write


@pytest.fixture(scope="module")
def trained(workplace, twin_of):
    """The run folder of a recipe's twin, trained on first use."""

    @cache
    def train(name: str) -> Path:
        ended = forked.axolotl("train", twin_of(name))
        assert ended.code == 0, ended.output[-3000:]
        return workplace / "outputs" / name

    return train


@pytest.fixture(scope="module")
def packaged(workplace, twin_of, trained):
    """The package folder of a recipe's twin, made on first use."""

    @cache
    def package(name: str) -> Path:
        recipe = read_recipe(twin_of(name))
        if recipe.pairwise.train:
            trained(name)
        return package_recipe(recipe)

    return package


def test_recipes_and_specs_are_found():
    assert len(RECIPES) >= 20
    assert len(SPECS) >= 20


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_says_what_it_is_and_satisfies_its_schema(recipe):
    lines = recipe.read_text().splitlines()
    assert lines[0] == "# yaml-language-server: $schema=recipe.schema.json"
    assert [line.split(":")[0] for line in lines[1:4]] == ["# What", "# Command", "# Hardware"]
    values = yaml.safe_load(recipe.read_text())
    assert None not in values.values()
    jsonschema.Draft7Validator(read_json(ROOT / "recipes/recipe.schema.json")).validate(values)


@pytest.mark.parametrize("recipe", recipe_cases(UNTRAINED))
def test_recipe_that_trains_nothing_says_so_and_stops(recipe, twin_of, workplace):
    ended = forked.axolotl("train", twin_of(recipe.stem))
    assert ended.code == 2
    assert (
        "pairwise.train is false, so there is nothing to train; package the base model with python -m postprocess"
        in ended.output
    )
    assert not (workplace / "outputs" / recipe.stem / "contract.json").exists()


@pytest.mark.parametrize("recipe", recipe_cases(TRAINED))
def test_twin_trains_and_leaves_a_whole_run(recipe, trained, workplace):
    run = trained(recipe.stem)
    contract = read_contract(run)
    assert contract.head == read_recipe(recipe).pairwise.head
    assert contract.model_input_sha256 == sha256(run / "model_input.py") == sha256(ROOT / "preprocess/model_input.py")
    assert contract.tokenizer_sha256["tokenizer.json"] == sha256(run / "tokenizer.json")
    assert len(contract.golden) == 20
    check_golden(AutoTokenizer.from_pretrained(run), contract)
    predictions = pl.read_parquet(run / "predictions.parquet")
    assert predictions["id"].to_list() == [f"row{number:05d}" for number in range(0, ROWS, 5)]
    verdicts = pl.sum_horizontal("p_model_a", "p_model_b", "p_tie")
    assert predictions.select((verdicts - 1).abs().max()).item() < 1e-6
    metrics = read_json(run / "metrics.json")
    assert (metrics["rows"], metrics["training_rows"], metrics["fold"]) == (8, 32, 0)
    assert [path.name for path in run.glob("*model*.safetensors")], "no weights were saved"


@pytest.mark.parametrize("recipe", recipe_cases(RECIPES))
def test_twin_is_packaged_and_agrees_with_its_training(recipe, packaged):
    package = packaged(recipe.stem)
    models = {line["model"]: line for line in read_json(package.parent / "agreement.json")["models"]}
    assert models["recorded"]["against_trained"]["largest"] < 1e-4, "the model is not loaded as it was trained"
    block = read_recipe(recipe).pairwise
    assert read_json(package / "dataset-metadata.json")["id"] == f"INSERT_OWNER/{block.package.slug}"
    assert read_contract(package).verdicts == block.verdicts
    assert check_package(package) == [], "push would refuse the package"


@pytest.mark.parametrize("spec", spec_cases())
def test_kernel_submits(spec, packaged, workplace, monkeypatch):
    settings = read_spec(spec)
    for package in settings.packages:
        packaged(package.run)
    monkeypatch.chdir(workplace)
    build(spec)
    test_file = workplace / ("test.csv" if settings.competition == "lmsys" else "test.parquet")
    measured = rehearse(spec, test_file, workplace / "rehearsals" / spec.stem, ROOT / ".venv-kaggle/bin/python")
    assert (measured["rows"], measured["judged"]) == (12, 12)
    submission = pl.read_csv(workplace / "rehearsals" / spec.stem / "submission.csv")
    assert submission["id"].to_list() == [f"test{number:05d}" for number in range(12)]
    kernel = read_json(workplace / "rehearsals" / spec.stem / "kernel.json")
    assert kernel["scored"] == 12
