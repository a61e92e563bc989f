"""The recipe as it ran, with what the command line and the environment changed, kept in the run folder as recipe.yml.

A sweep needs it: Axolotl trains each trial from a temporary file, removes that, and says nowhere which parameters
`sweep0003` had. The copy is a recipe itself: `python -m postprocess outputs/R/sweep0003/recipe.yml` packages the trial.
"""

import os
import re
import tempfile
from pathlib import Path

import yaml

from preprocess.core.errors import UserError
from preprocess.core.files import atomic_file, read_yaml
from recipes.pairwise.config.axolotl_keys import schema
from recipes.pairwise.config.schema import run_folder
from recipes.pairwise.processes import is_first_on_machine

RECIPE_COPY = "recipe.yml"
LOG = "debug.log"  # Axolotl's, which holds everything that a run prints
TRIAL = re.compile(r"sweep\d{4,}")
VOUCHERS = ("contract.json", "metrics.json", "predictions.parquet")
HEADER = """\
# The recipe as it ran in this folder, with what the command line and the environment changed: written by axolotl train.
# Its package: python -m postprocess {path}
"""


def resolved(cfg: dict, recipe: Path) -> dict:
    """The keys of `recipe` in its order, with the values that `cfg` (of Axolotl: file and command line) and PAIRWISE_* give.

    Raises UserError where all trials of a sweep would write to one folder.
    """
    file = read_yaml(recipe) if recipe.is_file() else {}
    if is_trial(recipe) and cfg.get("output_dir") != file["output_dir"]:
        raise UserError(
            f"--output-dir {cfg.get('output_dir')}: the trials of a sweep would write over each other; name the folder in the "
            f"sweep's file instead: output_dir: [{cfg.get('output_dir')}]"
        )
    given = cfg.to_dict() if hasattr(cfg, "to_dict") else dict(cfg)
    known = file.keys() | schema()["properties"].keys() - {"axolotl_config_path"}
    values = {key: given[key] for key in (*file, *given) if key in known and given.get(key) is not None}
    if isinstance(values.get("pairwise"), dict):
        values["pairwise"] = values["pairwise"] | overrides()
    output_dir = cfg.get("output_dir")
    if not isinstance(output_dir, str):
        output_dir = None
    return values | {"output_dir": str(run_folder(output_dir, recipe))}


def overrides() -> dict:
    """What PAIRWISE_FOLD and PAIRWISE_PAIRS say of the `pairwise` block."""
    fold, pairs = os.environ.get("PAIRWISE_FOLD"), os.environ.get("PAIRWISE_PAIRS")
    changes = {}
    if fold:
        changes["fold"] = int(fold) if fold.isdecimal() else fold
    if pairs:
        changes["pairs"] = pairs
    return changes


def keep(values: dict) -> None:
    """Write `values` (see resolved) as recipe.yml into their run folder."""
    path = Path(values["output_dir"]) / RECIPE_COPY
    text = HEADER.format(path=path) + yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def begin_trial(values: dict, recipe: Path) -> None:
    """Where `recipe` is a sweep's trial, keep it at once: one that is refused, or fails, is listed with its parameters too.

    What an earlier sweep left in the folder then vouches for nothing.
    """
    if is_trial(recipe) and is_first_on_machine():
        for name in (*VOUCHERS, LOG):
            (Path(values["output_dir"]) / name).unlink(missing_ok=True)
        keep(values)


def end_refused_trial(values: dict | None, recipe: Path, error: UserError) -> None:
    """Write why a sweep's trial is refused into its log, which Axolotl has not begun yet."""
    if values and is_trial(recipe) and is_first_on_machine():
        reason = str(error).removeprefix(f"{recipe}: ")
        (Path(values["output_dir"]) / LOG).write_text(f"error: {reason}\n", encoding="utf-8")


def is_trial(recipe: Path) -> bool:
    """Whether `recipe` is the temporary file that Axolotl writes for one trial of a sweep."""
    if recipe.parent != Path(tempfile.gettempdir()) or not recipe.is_file():
        return False
    return bool(TRIAL.fullmatch(Path(str(read_yaml(recipe).get("output_dir"))).name))


def lasting(recipe: Path, folder: str | Path) -> Path:
    """The file that tells the recipe of the run in `folder` for good: of a sweep's trial that is the copy."""
    return Path(folder) / RECIPE_COPY if is_trial(recipe) else recipe
