"""`python -m postprocess RECIPE`: the trained run of a recipe → merged → quantised → checked → its package folder.

A recipe with `train: false` has its run folder made first, from the base model as it is. Stages that are up to date are
skipped. Exit code 2, after one line, for what the user can mend.
"""

import functools
import importlib
import logging
import shutil
import time
from pathlib import Path
from types import ModuleType

import click

from postprocess.gptq_environment import REQUIREMENTS
from postprocess.package import package
from postprocess.run import Run, find_base, hub_commit, read_run, refuse_weights, weight_files
from postprocess.stages import run_stage
from preprocess.errors import exits_with_2
from preprocess.files import read_json
from recipes.pairwise.contract import MODEL_INPUT, TOKENIZER_FILES
from recipes.pairwise.schema import GPTQ_BITS, Recipe, read_recipe

RUN_FILES = ("contract.json", "model_input.py", "metrics.json", "predictions.parquet", *TOKENIZER_FILES)
RECIPES = Path(__file__).parents[1] / "recipes" / "pairwise"
CODE = (MODEL_INPUT, *(RECIPES / name for name in ("contract.py", "data.py", "metrics.py", "templates.py")))


@click.command(help=__doc__)
@click.argument("recipe", type=click.Path(path_type=Path))
@exits_with_2
def main(recipe: Path) -> None:
    logging.disable(logging.WARNING)  # libraries tell of GPUs and kernels that are absent; what matters to the user is raised
    package_recipe(read_recipe(recipe))


def package_recipe(recipe: Recipe) -> Path:
    """Bring the package of `recipe` up to date, whose run was trained, or is made here; the package's folder."""
    if not recipe.pairwise.train:
        use_as_it_is(recipe)
    return postprocess(read_run(recipe))


def use_as_it_is(recipe: Recipe) -> None:
    """Bring the run folder of a recipe with `train: false` up to date: contract, calibration, validation."""
    refuse_weights(recipe)
    base = find_base(recipe.axolotl["base_model"], recipe.axolotl.get("model_revision"), str(recipe.path))
    tokenizer = [base / name for name in TOKENIZER_FILES]
    settings = recipe.pairwise.model_dump(mode="json", exclude={"package"})
    settings |= {key: recipe.axolotl.get(key) for key in ("base_model", "special_tokens", "attn_implementation")}
    folder = recipe.run_folder
    run_stage(
        folder,
        "untrained",
        [*weight_files(base), *tokenizer, Path(recipe.pairwise.pairs), *CODE],
        settings,
        [folder / name for name in RUN_FILES],
        lambda: work().untrained(recipe, base, hub_commit(base)),
        work,
    )


def postprocess(run: Run) -> Path:
    """Bring every stage of `run` up to date; the package's folder. Where the models do not agree, no package is left."""
    settings = run.recipe.pairwise.package
    report, out = run.folder / "agreement.json", run.folder / "package"

    def begin() -> None:
        shutil.rmtree(out, ignore_errors=True)  # what it was made from has changed
        work().check_memory(run)
        if settings.quantize in GPTQ_BITS:
            work().check_gptq(run)

    stage = functools.partial(run_stage, run.folder)
    folders = candidates(run, stage, begin)
    made = [file for folder in dict.fromkeys(folders.values()) for file in files(folder)]
    compared = [*run.source_files(), *made, *run.validation_files()]
    tolerance = {"tolerance": settings.tolerance}
    stage("agreement", compared, tolerance, report, lambda: work().agreement(run, folders, report), begin)
    packaged = read_json(report)["packaged"]
    chosen = folders[packaged]
    inputs = [*files(chosen), report, run.folder / "contract.json", run.folder / "model_input.py"]
    stage("package", inputs, settings.model_dump(), out, lambda: package(run, chosen, report, out))
    return out


def candidates(run: Run, stage, begin) -> dict[str, Path]:
    """Bring the models that could be packaged up to date; their folders by name, `merged` among them where it was made."""
    settings, folders = run.recipe.pairwise.package, {}
    if settings.adapter != "unmerged":
        merged = folders["merged"] = folders["quantised"] = run.folder / "merged"
        stage("merge", run.source_files(), {}, merged, lambda: work().merge(run, merged), begin)
    if settings.quantize in GPTQ_BITS:
        folders["quantised"] = quantised_by_gptq(run, stage, begin)
    elif settings.adapter != "unmerged" and settings.quantize != "none":
        kind, quantised = settings.quantize, run.folder / "quantised"
        folders["quantised"] = quantised
        stage("quantise", files(merged), {"to": kind}, quantised, lambda: work().quantize(run, merged, kind, quantised), begin)
    if settings.adapter != "merged":
        unmerged = folders["unmerged"] = run.folder / "unmerged"
        stage("unmerged", run.source_files(), {"to": "nf4"}, unmerged, lambda: work().unmerged(run, unmerged), begin)
    return folders


def quantised_by_gptq(run: Run, stage, begin) -> Path:
    """Bring the GPTQ model up to date, which is made from the merged one and from the rows that it is calibrated on."""
    merged, quantised, block = run.folder / "merged", run.folder / "quantised", run.recipe.pairwise
    made_from = [*files(merged), *run.validation_files(), REQUIREMENTS]
    how = {"to": block.package.quantize, "fold": block.fold}
    bits = GPTQ_BITS[block.package.quantize]
    stage("quantise", made_from, how, quantised, lambda: work().gptq(run, merged, bits, quantised), begin)
    return quantised


@functools.cache
def work() -> ModuleType:
    """The stages that need torch, imported when the first of them has something to do."""
    started = time.perf_counter()
    module = importlib.import_module("postprocess.work")
    click.echo(f"{'start-up':<10} {time.perf_counter() - started:7.1f} s   torch, transformers, peft")
    return module


def files(folder: Path) -> list[Path]:
    """The files in a stage's folder."""
    return sorted(path for path in folder.iterdir() if path.is_file())


if __name__ == "__main__":
    main()
