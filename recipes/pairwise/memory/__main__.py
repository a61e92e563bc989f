"""`python -m recipes.pairwise.memory [BASE_MODEL…]`: measure base models, and keep the numbers in base_models.yml.

A name is a folder or a repository of the hub. Without names, all that are in the file are measured again.
"""

import click
from transformers import AutoConfig

from preprocess.core.errors import exits_with_2
from recipes.pairwise.config.model_checks import read_config
from recipes.pairwise.memory.base_model import make_record, read_records, write_records
from recipes.pairwise.memory.measure import measure


@click.command(help=__doc__)
@click.argument("base_models", nargs=-1)
@exits_with_2
def main(base_models: tuple[str, ...]) -> None:
    """Measure base models, and keep the numbers."""
    records = dict(read_records())

    # The keys of config.json stand in the file, so that licences and the hub are asked only once.
    for name in base_models:
        records[name] = {"config": read_config(name, None).to_diff_dict()}

    for name in base_models or records:
        keys = records[name]["config"]
        records[name] = make_record(keys, measure(AutoConfig.for_model(**keys)))
        click.echo(f"{name}: measured")
    write_records(records)


if __name__ == "__main__":
    main()
