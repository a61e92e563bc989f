"""`python -m postprocess RECIPE`: the trained run of a recipe → merged → quantised → checked → its package folder.

Stages that are up to date are skipped. Exit code 2, after one line, for what the user can mend.
"""

import functools
import importlib
import logging
import shutil
import time
from pathlib import Path
from types import ModuleType

import click

from postprocess.package import package
from postprocess.run import Run, read_run
from postprocess.stages import run_stage
from preprocess.errors import exits_with_2
from recipes.pairwise.schema import read_recipe


@click.command(help=__doc__)
@click.argument("recipe", type=click.Path(path_type=Path))
@exits_with_2
def main(recipe: Path) -> None:
    logging.disable(logging.WARNING)  # libraries tell of GPUs and kernels that are absent; what matters to the user is raised
    postprocess(read_run(read_recipe(recipe)))


def postprocess(run: Run) -> Path:
    """Bring every stage of `run` up to date; the package's folder. Where the models do not agree, no package is left."""
    settings = run.recipe.pairwise.package
    merged, report, out = run.folder / "merged", run.folder / "agreement.json", run.folder / "package"
    quantised = merged if settings.quantize == "none" else run.folder / "quantised"

    def begin() -> None:
        shutil.rmtree(out, ignore_errors=True)  # what it was made from has changed
        work()

    stage = functools.partial(run_stage, run.folder)
    stage("merge", run.source_files(), {}, merged, lambda: work().merge(run, merged), begin)
    if quantised != merged:
        kind = settings.quantize
        stage("quantise", files(merged), {"to": kind}, quantised, lambda: work().quantize(run, merged, kind, quantised), begin)
    compared = [*run.source_files(), *files(merged), *files(quantised), *run.validation_files()]
    tolerance = {"tolerance": settings.tolerance}
    stage("agreement", compared, tolerance, report, lambda: work().agreement(run, merged, quantised, report), begin)
    packaged = [*files(quantised), report, run.folder / "contract.json", run.folder / "model_input.py"]
    stage("package", packaged, settings.model_dump(), out, lambda: package(run, quantised, report, out))
    return out


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
