"""`python -m postprocess.memory [BASE_MODEL…]`: measure base models, and keep the numbers in base_models.yml.

Without arguments: every base model in there again, and those that recipes name and that are no folders.
"""

from pathlib import Path

import click
from transformers import AutoConfig, PretrainedConfig

from postprocess.memory.base_model import make_record, read_records, write_records
from postprocess.memory.measure import measure
from preprocess.core.errors import exits_with_2
from preprocess.core.files import read_yaml
from recipes.pairwise.config.model_checks import read_config

# Keys of a configuration that say nothing of sizes.
NOT_SIZES = ("architectures", "dtype", "transformers_version")
RECIPES = Path(__file__).parents[2] / "recipes"


@click.command(help=__doc__)
@click.argument("base_models", nargs=-1)
@exits_with_2
def main(base_models: tuple[str, ...]) -> None:
    """Measure base models, and keep the numbers."""
    records = dict(read_records())
    for name in base_models or [*records, *find_new_names(records)]:
        if name in records and not base_models:
            sizes = records[name]["config"]
        else:
            sizes = pick_sizes(read_config(name, None))
        records[name] = make_record(sizes, measure(AutoConfig.for_model(**sizes)))
        click.echo(f"{name}: measured")
    write_records(records)


def find_new_names(records: dict[str, dict]) -> list[str]:
    """Find the hub's base models that recipes name and that have no record."""
    names = set()
    for path in RECIPES.glob("*.yml"):
        name = read_yaml(path)["base_model"]
        if name not in records and not Path(name).is_dir():
            names.add(name)
    return sorted(names)


def pick_sizes(config: PretrainedConfig) -> dict[str, object]:
    """Pick the keys of a configuration that differ from its class's and may decide a size."""
    sizes: dict[str, object] = {"model_type": config.model_type}
    for key, value in config.to_diff_dict().items():
        is_token = key.endswith("_token_id")
        if isinstance(value, int | str | list) and not is_token and key not in NOT_SIZES:
            sizes[key] = value
    return sizes


if __name__ == "__main__":
    main()
