"""Write spec.schema.json, from which editors complete and check specs.

`python -m kaggle_kernels.build.json_schema` writes it, `make lint` checks with `--check` that it is up to date.
"""

from pathlib import Path

import click

from kaggle_kernels.build.spec import Spec
from preprocess.core.errors import exits_with_2
from recipes.pairwise.config.json_schema import DRAFT, block_schema, write_or_check

SPEC_SCHEMA = Path(__file__).parents[1] / "spec.schema.json"
COMMAND = "python -m kaggle_kernels.build.json_schema"


def spec_schema() -> dict:
    """Describe a spec as JSON Schema, from its pydantic model."""
    head = {
        "$schema": DRAFT,
        "$comment": f"Written by `{COMMAND}`; change nothing here.",
        "title": "A spec: one kernel",
    }
    return head | block_schema(Spec)


@click.command()
@click.option(
    "--check", is_flag=True, help="Write nothing; exit with 2 if the file is out of date."
)
@exits_with_2
def main(check: bool) -> None:
    """Write kaggle_kernels/spec.schema.json."""
    write_or_check(SPEC_SCHEMA, spec_schema(), COMMAND, check)


if __name__ == "__main__":
    main()
