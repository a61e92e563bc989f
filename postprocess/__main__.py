"""`python -m postprocess RECIPE`: the trained run of a recipe → merged → quantised → checked → its package folder.

A recipe with `train: false` has its run folder made first, from the base model as it is. Stages that are up to date are
skipped. Exit code 2, after one line, for what the user can mend.
"""

import contextlib
import functools
import importlib
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import click
from filelock import FileLock, Timeout

from postprocess.package import package
from postprocess.run import ADAPTER, Run, find_base, hub_commit, read_run, refuse_weights, weight_files
from postprocess.stages import run_stage, stage_key
from preprocess.errors import UserError, exits_with_2
from preprocess.files import read_json, remove_leftovers
from recipes.pairwise.contract import MODEL_INPUT, TOKENIZER_FILES
from recipes.pairwise.schema import Recipe, read_recipe

RUN_FILES = ("contract.json", "model_input.py", "metrics.json", "predictions.parquet", *TOKENIZER_FILES)
RECIPES = Path(__file__).parents[1] / "recipes" / "pairwise"
CODE = (MODEL_INPUT, *(RECIPES / name for name in ("contract.py", "data.py", "metrics.py", "templates.py")))


@click.command(help=__doc__)
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--keep-merged", is_flag=True, help="Also write the merged model in 16 bits, to outputs/R/merged.")
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="FOLDER[=WEIGHT]",
    help="A trained run; given several times, the mean of their adapters is packaged, in outputs/R/mean.",
)
@click.option("--rank", type=click.IntRange(min=1), help="Cut the mean to this rank; by default it is exact.")
@exits_with_2
def main(recipe: Path, keep_merged: bool, adapters: tuple[str, ...], rank: int | None) -> None:
    logging.disable(logging.WARNING)  # libraries tell of GPUs and kernels that are absent; what matters to the user is raised
    if rank and not adapters:
        raise UserError(
            "--rank is for the mean of several runs; name them: --adapter outputs/R/fold-0 --adapter outputs/R/fold-1"
        )
    if adapters:
        package_mean(read_recipe(recipe), members_of(adapters), rank, keep_merged)
    else:
        package_recipe(read_recipe(recipe), keep_merged)


def package_recipe(recipe: Recipe, keep_merged: bool = False) -> Path:
    """Bring the package of `recipe` up to date, whose run was trained, or is made here; the package's folder."""
    with alone(recipe.run_folder):
        if not recipe.pairwise.train:
            use_as_it_is(recipe)
        return postprocess(read_run(recipe), keep_merged)


def package_mean(recipe: Recipe, shares: Mapping[Path, float], rank: int | None, keep_merged: bool = False) -> Path:
    """Bring the package of the mean of several runs of `recipe` up to date, in the folder `mean` of its run folder."""
    recipe = replace(recipe, run_folder=recipe.run_folder / "mean")
    with alone(recipe.run_folder):
        inputs = [folder / name for folder in shares for name in RUN_FILES + ADAPTER]
        settings = {"shares": {str(folder): share for folder, share in shares.items()}, "rank": rank}
        made = [recipe.run_folder / name for name in (*RUN_FILES, *ADAPTER)]
        run_stage(
            recipe.run_folder,
            "average",
            [*inputs, Path(recipe.pairwise.pairs), *CODE],
            settings,
            made,
            lambda: work().average(recipe, shares, rank),
            work,
        )
        return postprocess(read_run(recipe), keep_merged)


def members_of(adapters: Sequence[str]) -> dict[Path, float]:
    """The shares of the runs named as FOLDER or FOLDER=WEIGHT; they sum to 1."""
    weights = {}
    for text in adapters:
        folder, _, weight = text.rpartition("=") if "=" in text and not Path(text).exists() else (text, "", "1")
        try:
            weights[Path(folder)] = float(weight)
        except ValueError:
            raise UserError(f"--adapter {text}: {weight!r} is no weight; write FOLDER or FOLDER=WEIGHT") from None
        if not 0 < weights[Path(folder)] < math.inf:
            raise UserError(f"--adapter {text}: expected a weight above 0")
        if not Path(folder).is_dir():
            raise UserError(f"--adapter {text}: no such folder; it takes the folder of a trained LoRA run")
    if len(weights) < len(adapters):
        raise UserError("--adapter: a folder is named twice; give it a weight instead")
    return {folder: weight / sum(weights.values()) for folder, weight in weights.items()}


@contextlib.contextmanager
def alone(run_folder: Path) -> Iterator[None]:
    """Hold the run folder against another postprocess, and remove what one that was killed left half-written."""
    lock = FileLock(run_folder.with_name(f".{run_folder.name}.lock"), timeout=0)
    try:
        run_folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise UserError(f"{run_folder}: another python -m postprocess is at work there; wait for it, or stop it") from None
    try:
        remove_leftovers(run_folder)
        yield
    finally:
        lock.release()


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


def postprocess(run: Run, keep_merged: bool = False) -> Path:
    """Bring every stage of `run` up to date; the package's folder. Where the models do not agree, no package is left."""
    settings = run.recipe.pairwise.package
    report, out = run.folder / "agreement.json", run.folder / "package"

    def begin() -> None:
        shutil.rmtree(out, ignore_errors=True)  # what it was made from has changed
        work().check_memory(run)

    stage = functools.partial(run_stage, run.folder, before=begin)
    folders = candidates(run, stage, keep_merged)
    made = [file for folder in dict.fromkeys(folders.values()) if folder for file in files(folder)]
    compared = [*run.source_files(), *made, *run.validation_files()]
    tolerance = {"tolerance": settings.tolerance}
    told = [report, *(report.with_suffix(suffix) for suffix in (".parquet", ".png"))]
    stage("agreement", compared, tolerance, told, lambda: work().agreement(run, folders, report))
    packaged = read_json(report)["packaged"]
    chosen = folders[packaged]
    inputs = [*files(chosen), report, run.folder / "contract.json", run.folder / "model_input.py"]
    stage("package", inputs, settings.model_dump(), out, lambda: package(run, chosen, report, out))
    return out


def candidates(run: Run, stage: Callable, keep_merged: bool) -> dict[str, Path | None]:
    """Bring the models that could be packaged up to date; their folders by name.

    Among them is `merged` where a model is made of it: None where it is on no disk, and compared from memory.
    """
    settings, sources = run.recipe.pairwise.package, run.source_files()
    kind, folders = settings.quantize, {}
    if settings.adapter != "unmerged":
        folders["merged"] = run.folder / "merged" if kind == "none" or keep_merged else None
    if merged := folders.get("merged"):
        key = stage_key(sources, {})
        stage("merge", sources, {}, merged, lambda: work().merge(run, merged, key=key))
    if settings.adapter != "unmerged" and kind == "none":
        folders["quantised"] = merged
    elif settings.adapter != "unmerged":
        quantised = folders["quantised"] = run.folder / "quantised"
        to = {"to": kind}
        key = stage_key(sources, to)
        stage("quantise", sources, to, quantised, lambda: work().quantise_in_one_pass(run, kind, quantised, key))
    if settings.adapter != "merged":
        unmerged = folders["unmerged"] = run.folder / "unmerged"
        apart = {"to": "nf4"}
        key = stage_key(sources, apart)
        stage("unmerged", sources, apart, unmerged, lambda: work().unmerged(run, unmerged, key))
    return folders


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
