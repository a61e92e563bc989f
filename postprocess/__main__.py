"""`python -m postprocess RECIPE`: the trained run of a recipe → merged → quantised → checked → its package folder.

A recipe with `train: false` has its run folder made first, from the base model as it is. Stages that are up to date are
skipped, and one that was killed goes on where it was. Exit code 2, after one line, for what the user can mend.
"""

import logging
from pathlib import Path

import click

from postprocess.pipeline import MOST_REPEATS, Options, package_mean, package_recipe
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
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="A trained run; given several times, the mean of their adapters is packaged, in outputs/R/mean.",
)
@exits_with_2
def main(recipe: str, keep_merged: bool, repeat: int, adapters: tuple[Path, ...]) -> None:
    """Package one run, or the mean of several."""
    # Libraries warn of GPUs and kernels that are absent; what matters to the user is raised.
    logging.disable(logging.WARNING)
    checked_recipe = read_recipe(find_recipe(recipe))
    if adapters and not checked_recipe.pairwise.train:
        raise UserError(
            f"{recipe}: says train: false, so nothing is trained and there are no adapters to average; "
            "leave out --adapter"
        )

    options = Options(keep_merged, repeat)
    if adapters:
        package_mean(checked_recipe, adapters, options)
    else:
        package_recipe(checked_recipe, options)


if __name__ == "__main__":
    main()
