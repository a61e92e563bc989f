"""`python -m postprocess.labels TEACHER`: score rows with trained runs that did not see them.

The rows of a fold, extra ones too, are scored by the run that held that fold out; pool and lockbox rows
by the runs of all folds, whose mean they get. outputs/TEACHER/labels.parquet holds the probabilities in
both orders. An interrupted call goes on where it was.
"""

import os
import queue
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path

import click

from postprocess.pipeline import import_torch
from preprocess.core.errors import UserError, exits_with_2
from recipes.pairwise.config.recipe_files import find_recipe
from recipes.pairwise.config.schema import Recipe, read_recipe
from recipes.pairwise.data.datasets import list_folds, read_pairs
from recipes.pairwise.graph.step import visible_gpus


@click.command(help=__doc__)
@click.argument("teacher")
@click.option(
    "--run",
    "only_run",
    help="Score with this run alone, e.g. fold-0; labels.parquet is not written.",
)
@click.option(
    "--ray",
    "ray_workers",
    type=click.IntRange(min=0),
    default=0,
    metavar="WORKERS",
    help="Score with this many workers of a Ray cluster, e.g. on several machines; 0: without Ray.",
)
@exits_with_2
def main(teacher: str, only_run: str | None, ray_workers: int) -> None:
    """Label the rows of a teacher's pairs file."""
    # The variable makes a recipe hold out that one fold. A teacher labels with the runs of all folds.
    if "PAIRWISE_FOLD" in os.environ:
        raise UserError(
            "PAIRWISE_FOLD is set, but a teacher labels with the runs of all its folds; unset it"
        )
    recipe = read_recipe(find_recipe(teacher))

    # With several GPUs, a process for each fold scores first. Here its scores are then read and joined.
    gpus = visible_gpus()
    if len(gpus) > 1 and only_run is None and not ray_workers:
        score_on_gpus(recipe, gpus)

    # Imported late, so that --help and mistakes in the recipe are quick.
    import_torch()
    from postprocess.labels.labels import make_labels  # noqa: PLC0415  needs torch

    make_labels(recipe, only_run, ray_workers)


def score_on_gpus(recipe: Recipe, gpus: list[str]) -> None:
    """Score with the run of each fold in a process of its own, one on each GPU at a time.

    Raises:
        UserError: A process failed; it has printed why.
    """
    run_names = []
    for fold in list_folds(read_pairs(Path(recipe.pairwise.pairs))):
        name = f"fold-{fold}"
        if (recipe.run_folder / name).is_dir():
            run_names.append(name)

    # There are as many threads as GPUs, so a thread that begins with a run always finds a free GPU.
    free_gpus: queue.Queue[str] = queue.Queue()
    for gpu in gpus:
        free_gpus.put(gpu)
    with ThreadPoolExecutor(max_workers=len(gpus)) as threads:
        exit_codes = threads.map(score_on_free_gpu, repeat(recipe), run_names, repeat(free_gpus))

    # The processes of all folds have ended by now, also where one of them failed.
    if any(exit_codes):
        raise UserError(f"{recipe.run_folder}: a fold could not be scored; see above")


def score_on_free_gpu(recipe: Recipe, run_name: str, free_gpus: queue.Queue[str]) -> int:
    """Score with one run in a process that sees one GPU, and return its exit code."""
    gpu = free_gpus.get()
    command = [sys.executable, "-m", "postprocess.labels", str(recipe.path), "--run", run_name]
    # The process sees this GPU as its only one.
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": gpu}
    exit_code = subprocess.run(command, env=environment, check=False).returncode
    free_gpus.put(gpu)
    return exit_code


if __name__ == "__main__":
    main()
