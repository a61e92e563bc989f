"""`python -m postprocess RECIPE`: the trained run of a recipe → merged → quantised → checked → its package folder.

A recipe with `train: false` has its run folder made first, from the base model as it is. Stages that are up to date are
skipped, and one that was killed goes on where it was. Exit code 2, after one line, for what the user can mend.
"""

import logging
import math
from collections.abc import Sequence
from pathlib import Path

import click

from postprocess.pipeline import MOST_REPEATS, Options, package_mean, package_recipe
from postprocess.run_folder import ADAPTER_WEIGHTS
from preprocess.core.errors import UserError, exits_with_2
from recipes.pairwise.config.recipe_files import find_recipe
from recipes.pairwise.config.schema import read_recipe


@click.command(help=__doc__)
@click.argument("recipe")
@click.option(
    "--keep-merged",
    is_flag=True,
    help="Also write the merged model in 16 bits, to outputs/R/merged.",
)
@click.option(
    "--repeat",
    type=click.IntRange(1, MOST_REPEATS),
    default=1,
    help="Quantise so many times where chance is in it (GPTQ's calibration rows), tell the spread, and package the best.",
)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="FOLDER[=WEIGHT]",
    help="A trained run; given several times, the mean of their adapters is packaged, in outputs/R/mean.",
)
@click.option(
    "--rank", type=click.IntRange(min=1), help="Cut the mean to this rank; by default it is exact."
)
@exits_with_2
def main(
    recipe: str, keep_merged: bool, repeat: int, adapters: tuple[str, ...], rank: int | None
) -> None:
    """Package one run, or the mean of several."""
    # Libraries warn of GPUs and kernels that are absent; what matters to the user is raised.
    logging.disable(logging.WARNING)
    if rank and not adapters:
        raise UserError(
            "--rank is for the mean of several runs; name them: --adapter outputs/R/fold-0 --adapter outputs/R/fold-1"
        )
    checked_recipe = read_recipe(find_recipe(recipe))
    if adapters and not checked_recipe.pairwise.train:
        raise UserError(
            f"{recipe}: train: false, so that there are no adapters; leave out --adapter"
        )

    options = Options(keep_merged, repeat)
    if adapters:
        package_mean(checked_recipe, share_out(adapters), rank, options)
    else:
        package_recipe(checked_recipe, options)


def share_out(adapters: Sequence[str]) -> dict[Path, float]:
    """Compute the share of each run in the mean; the shares sum to 1.

    Args:
        adapters: What the user has written: FOLDER, or FOLDER=WEIGHT.

    Raises:
        UserError: A folder is no LoRA run or named twice, or a weight is not above 0.
    """
    weights: dict[Path, float] = {}
    for text in adapters:
        folder, weight = parse_adapter(text)
        if folder.resolve() in {other.resolve() for other in weights}:
            raise UserError("--adapter: a folder is named twice; give it a weight instead")
        weights[folder] = weight

    total = sum(weights.values())
    if not math.isfinite(total):
        raise UserError(
            "--adapter: the weights are too large; only what one is beside the other counts"
        )
    return {folder: weight / total for folder, weight in weights.items()}


def parse_adapter(text: str) -> tuple[Path, float]:
    """Parse FOLDER or FOLDER=WEIGHT, as --adapter takes it.

    Returns:
        The folder, and its weight, which is 1 where none is given.

    Raises:
        UserError: The folder is no trained LoRA run, or the weight is not above 0.
    """
    # A folder's name may hold an equals sign.
    folder = text
    weight = "1"
    if "=" in text and not Path(text).exists():
        folder, _, weight = text.rpartition("=")

    try:
        number = float(weight)
    except ValueError:
        raise UserError(
            f"--adapter {text}: {weight!r} is no weight; write FOLDER or FOLDER=WEIGHT"
        ) from None
    if not 0 < number < math.inf:
        raise UserError(f"--adapter {text}: expected a weight above 0")

    path = Path(folder)
    if not (path / ADAPTER_WEIGHTS).is_file():
        reason = f"no {ADAPTER_WEIGHTS} there" if path.is_dir() else "no such folder"
        raise UserError(f"--adapter {text}: {reason}; it takes the folder of a trained LoRA run")
    return path, number


if __name__ == "__main__":
    main()
