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
    """Measure the bytes of base models' weights and activations, and keep them in base_models.yml."""
    # A record of the file holds a model's config.json, and what was measured of a model without weights
    # that was made from it.
    records = dict(read_records())
    config_keys = {name: record["config"] for name, record in records.items()}

    # Models that are named are read from their folder or from the hub. Without names, all models of the
    # file are measured again; their config.json stands there, so that no hub is asked.
    for name in base_models:
        config_keys[name] = read_config(name, None).to_diff_dict()
    names = base_models or records.keys()

    for name in names:
        config = AutoConfig.for_model(**config_keys[name])
        records[name] = make_record(config_keys[name], measure(config))
        click.echo(f"{name}: measured")
    write_records(records)


if __name__ == "__main__":
    main()
