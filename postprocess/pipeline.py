"""A run → its package: which stages there are, what each is made from, and in which order they come.

Nothing here imports torch: a run that is up to date is told so in a second.
"""

import contextlib
import functools
import importlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import click
from filelock import FileLock, Timeout

from postprocess.gptq.environment import REQUIREMENTS
from postprocess.memory.t4_fit import check_target
from postprocess.package import package
from postprocess.run_folder import (
    ADAPTER,
    Run,
    find_base,
    hub_commit,
    read_run,
    refuse_weights,
    weight_files,
)
from postprocess.staleness import is_current, run_stage, stage_key
from preprocess.core.errors import UserError
from preprocess.core.files import read_json, remove_leftovers
from recipes.pairwise.config.schema import GPTQ_BITS, Recipe
from recipes.pairwise.contract import MODEL_INPUT, TOKENIZER_FILES

RUN_FILES = ("contract.json", "model_input.py", "metrics.json", "predictions.parquet", *TOKENIZER_FILES)
MODELS = ("merged", "quantised", "quantised-*", "unmerged", ".*.partial")
RECIPES = Path(__file__).parents[1] / "recipes" / "pairwise"
CODE = (MODEL_INPUT, *(RECIPES / name for name in ("contract.py", "data.py", "metrics.py", "templates.py")))


@dataclass(frozen=True)
class Options:
    """What the command line asks for: the merged model on the disk too, and how often to quantise where chance is in it."""

    keep_merged: bool = False
    repeat: int = 1


def package_recipe(recipe: Recipe, options: Options = Options()) -> Path:
    """Bring the package of `recipe` up to date, whose run was trained, or is made here; the package's folder."""
    with alone(recipe.run_folder):
        if not recipe.pairwise.train:
            use_as_it_is(recipe)
        return postprocess(read_run(recipe), options)


def package_mean(recipe: Recipe, shares: Mapping[Path, float], rank: int | None, options: Options = Options()) -> Path:
    """Bring the package of the mean of several runs of `recipe` up to date, in the folder `mean` of its run folder."""
    recipe = replace(recipe, run_folder=recipe.run_folder / "mean")
    folder = recipe.run_folder

    def begin() -> None:
        shutil.rmtree(folder / "package", ignore_errors=True)  # what it was made from has changed
        work()

    with alone(folder):
        run_stage(
            folder,
            "average",
            [
                *(member / name for member in shares for name in (*RUN_FILES, *ADAPTER, "config.json")),
                Path(recipe.pairwise.pairs),
                *CODE,
            ],
            {"shares": {str(member): share for member, share in shares.items()}, "rank": rank},
            [folder / name for name in (*RUN_FILES, *ADAPTER)],
            lambda: work().average(recipe, shares, rank),
            begin,
        )
        return postprocess(read_run(recipe), options)


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


def postprocess(run: Run, options: Options) -> Path:
    """Bring every stage of `run` up to date; the package's folder. Where the models do not agree, no package is left."""
    settings = run.recipe.pairwise.package
    report, out = run.folder / "agreement.json", run.folder / "package"

    @functools.cache
    def begin() -> None:
        work().check_memory(run)
        if settings.quantize in GPTQ_BITS:
            work().check_gptq(run)
        check_target(run)
        shutil.rmtree(out, ignore_errors=True)  # what it was made from has changed

    stage = functools.partial(run_stage, run.folder, before=begin)
    folders = candidates(run, stage, options)
    made = [file for folder in dict.fromkeys(folders.values()) if folder for file in files(folder)]
    compared = [*run.source_files(), *made, *run.validation_files(), *CODE]
    tolerance = {"tolerance": settings.tolerance}
    told = [report, *(report.with_suffix(suffix) for suffix in (".parquet", ".png"))]
    stage("agreement", compared, tolerance, told, lambda: work().agreement(run, folders, report))
    packaged = read_json(report)["packaged"]
    chosen = folders[packaged]
    beside = (run.folder / name for name in ("contract.json", "model_input.py", "metrics.json"))
    inputs = [*files(chosen), report, *beside, *run.validation_files()]
    action = lambda: package(run, chosen, report, work().validation_ids(run), out)  # noqa: E731
    stage("package", inputs, settings.model_dump(), out, action, before=work)
    remove_others(run, folders)
    return out


def remove_others(run: Run, folders: Mapping[str, Path | None]) -> None:
    """Remove models that an earlier recipe or training left: gigabytes that are not what stands beside them."""
    sources, merged = run.source_files(), run.folder / "merged"
    kept = {merged} if is_current(run.folder, "merge", sources, {}, [merged]) else set()
    for path in [path for pattern in MODELS for path in run.folder.glob(pattern)]:
        if path not in kept | set(folders.values()):
            shutil.rmtree(path, ignore_errors=True)


def candidates(run: Run, stage: Callable, options: Options) -> dict[str, Path | None]:
    """Bring the models that could be packaged up to date; their folders by name.

    Among them is `merged` where a model is made of it: None where it is on no disk, and compared from memory.
    """
    settings, sources = run.recipe.pairwise.package, run.source_files()
    kind, folders = settings.quantize, {}
    if options.repeat > 1 and kind not in GPTQ_BITS:
        raise UserError(
            f"--repeat: quantize: {kind} always gives the same bytes; only {' and '.join(GPTQ_BITS)} depend on chance"
        )
    merged = run.folder / "merged"
    if settings.adapter != "unmerged":
        folders["merged"] = merged if kind == "none" or options.keep_merged else None
    if folders.get("merged"):
        merge_to(run, stage, merged)
    if settings.adapter != "unmerged" and kind == "none":
        folders["quantised"] = merged
    elif kind in GPTQ_BITS:
        folders |= quantised_by_gptq(run, stage, merged, options)
    elif settings.adapter != "unmerged":
        quantised = folders["quantised"] = run.folder / "quantised"
        key = stage_key(sources, {"to": kind})
        action = lambda: work().quantise_in_one_pass(run, kind, quantised, key)  # noqa: E731
        stage("quantise", sources, {"to": kind}, quantised, action)
    if settings.adapter != "merged":
        unmerged = folders["unmerged"] = run.folder / "unmerged"
        key = stage_key(sources, {"to": "nf4"})
        stage("unmerged", sources, {"to": "nf4"}, unmerged, lambda: work().unmerged(run, unmerged, key))
    return folders


def merge_to(run: Run, stage: Callable, merged: Path) -> None:
    """Bring the merged model in the folder `merged` up to date."""
    sources = run.source_files()
    key = stage_key(sources, {})
    stage("merge", sources, {}, merged, lambda: work().merge(run, merged, key=key))


def quantised_by_gptq(run: Run, stage: Callable, merged: Path, options: Options) -> dict[str, Path]:
    """Bring the GPTQ models up to date, each calibrated on other rows; their folders by name.

    They are made of the merged model, which is on the disk for so long, and of the rows that they are calibrated on.
    """
    block = run.recipe.pairwise
    names = ["quantised", *(f"quantised-{number}" for number in range(2, options.repeat + 1))]
    folders = {name: run.folder / name for name in names}
    made_from = [*run.source_files(), *run.validation_files(), REQUIREMENTS, *CODE]
    how = {"to": block.package.quantize, "fold": block.fold, "repeat": options.repeat}
    outputs = list(folders.values())

    def quantise() -> None:
        for seed, folder in enumerate(outputs):
            work().gptq(run, merged, GPTQ_BITS[block.package.quantize], folder, seed)

    is_made = not is_current(run.folder, "quantise", made_from, how, outputs)
    if is_made:
        merge_to(run, stage, merged)
    stage("quantise", made_from, how, outputs, quantise)
    if is_made and not options.keep_merged:
        shutil.rmtree(merged)
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
