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
from postprocess.run_folder import ADAPTER
from preprocess.core.errors import UserError, exits_with_2
from recipes.pairwise.config.schema import read_recipe


@click.command(help=__doc__)
@click.argument("recipe", type=click.Path(path_type=Path))
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
    recipe: Path, keep_merged: bool, repeat: int, adapters: tuple[str, ...], rank: int | None
) -> None:
    """Package one run, or the mean of several."""
    logging.disable(
        logging.WARNING
    )  # libraries tell of GPUs and kernels that are absent; what matters to the user is raised
    options = Options(keep_merged, repeat)
    if rank and not adapters:
        raise UserError(
            "--rank is for the mean of several runs; name them: --adapter outputs/R/fold-0 --adapter outputs/R/fold-1"
        )
    if adapters and not read_recipe(recipe).pairwise.train:
        raise UserError(
            f"{recipe}: train: false, so that there are no adapters; leave out --adapter"
        )
    if adapters:
        package_mean(read_recipe(recipe), members_of(adapters), rank, options)
    else:
        package_recipe(read_recipe(recipe), options)


def members_of(adapters: Sequence[str]) -> dict[Path, float]:
    """The shares of the runs named as FOLDER or FOLDER=WEIGHT; they sum to 1."""
    weights: dict[Path, float] = {}
    for text in adapters:
        folder, _, weight = (
            text.rpartition("=") if "=" in text and not Path(text).exists() else (text, "", "1")
        )
        try:
            weights[Path(folder)] = float(weight)
        except ValueError:
            raise UserError(
                f"--adapter {text}: {weight!r} is no weight; write FOLDER or FOLDER=WEIGHT"
            ) from None
        if not 0 < weights[Path(folder)] < math.inf:
            raise UserError(f"--adapter {text}: expected a weight above 0")
        if not (Path(folder) / ADAPTER[0]).is_file():
            found = f"no {ADAPTER[0]} there" if Path(folder).is_dir() else "no such folder"
            raise UserError(f"--adapter {text}: {found}; it takes the folder of a trained LoRA run")
    if len({folder.resolve() for folder in weights}) < len(adapters):
        raise UserError("--adapter: a folder is named twice; give it a weight instead")
    if not math.isfinite(sum(weights.values())):
        raise UserError(
            "--adapter: the weights are too large; only what one is beside the other counts"
        )
    return {folder: weight / sum(weights.values()) for folder, weight in weights.items()}


if __name__ == "__main__":
    main()
