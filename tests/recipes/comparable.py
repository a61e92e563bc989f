"""Twins whose trained weights can be compared number by number, however many processes and whichever stage trained them."""

from pathlib import Path

import yaml
from safetensors.torch import load_file

from tests import tiny
from tests.conftest import ROOT

# No dropout, whose masks differ from process to process; and steps long enough for weights to move by hundredths.
SETTINGS = {"learning_rate": 0.01, "max_steps": 4}
# The largest difference of a weight: float32 sums in another order, magnified by Adam. Weights move by 10 to 40 times it.
ROUNDING = 1e-3


def twin(recipe: str, folder: Path, base: Path, stage: str | None = None, processes: int = 1, rows: int = 40) -> Path:
    """The path of the recipe's twin in `folder`, with one of recipes/deepspeed or none.

    The batch of a step is the recipe's whatever the number of processes: they share its accumulation steps.
    """
    source = ROOT / f"recipes/{recipe}.yml"
    folder.mkdir(exist_ok=True)
    path = tiny.twin(source, folder, base, tiny.pairs_parquet(folder / "pairs.parquet", rows), deepspeed=None)
    values = yaml.safe_load(path.read_text())
    changes = dict(SETTINGS)
    # pairs_per_step is shared out by the plugin.
    if "gradient_accumulation_steps" in values:
        changes["gradient_accumulation_steps"] = values["gradient_accumulation_steps"] // processes
    if stage:
        changes["deepspeed"] = str(tiny.deepspeed_numbers(f"recipes/deepspeed/{stage}.json", folder, values, processes))
    if "adapter" in values:
        changes["lora_dropout"] = 0
    return tiny.change(path, **changes)


def trained_weights(run: Path) -> dict:
    """The adapter or the full model that a run saved, by name."""
    return load_file(next(run.glob("*model.safetensors")))


def largest_difference(weights: dict, others: dict) -> float:
    """The largest difference between weights of the same names and shapes."""
    assert {name: weight.shape for name, weight in weights.items()} == {name: weight.shape for name, weight in others.items()}
    return max((weights[name] - others[name]).abs().max().item() for name in weights)
