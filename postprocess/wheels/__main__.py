"""Download the wheels that Kaggle's image lacks into the folder of one Kaggle dataset.

Every wheel must have a hash that is pinned in postprocess/wheels/kaggle-wheels.txt, and must install
without network. A folder that is up to date is left as it is. Exit
code 2, after one line, for what the user can mend.
"""

import re
from pathlib import Path

import click

from postprocess.wheels.build import make_wheels
from preprocess.core.errors import UserError, exits_with_2
from recipes.pairwise.config.schema import SLUG


@click.command(help=__doc__)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("outputs/wheels"), show_default=True
)
@click.option(
    "--slug", default="pairwise-wheels", show_default=True, help="The dataset's slug on Kaggle."
)
@exits_with_2
def main(out: Path, slug: str) -> None:
    """Make the dataset's folder, and say what comes next."""
    if not re.fullmatch(SLUG, slug) or not 6 <= len(slug) <= 50:
        raise UserError(
            f"--slug: {slug!r} cannot be a dataset's name in Kaggle's addresses; use 6 to 50 of the letters "
            "a to z, digits, and single hyphens between them"
        )

    is_new = make_wheels(out, slug)
    click.echo(f"{out}: {'made' if is_new else 'up to date'}")
    click.echo(
        "next: python -m kaggle_kernels push SPEC, which uploads it for every spec that names it"
    )


if __name__ == "__main__":
    main()
