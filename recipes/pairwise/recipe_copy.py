"""The recipe as it ran, with what the command line and the environment changed, kept in the run folder as recipe.yml.

A sweep needs it: Axolotl trains each trial from a temporary file, removes that, and says nowhere which parameters
`sweep0003` had. The copy is a recipe itself: `python -m postprocess outputs/R/sweep0003/recipe.yml` packages the trial.
"""

import os
import re
import tempfile
from pathlib import Path

import yaml

from preprocess.errors import UserError
from preprocess.files import atomic_file, read_yaml
from recipes.pairwise.axolotl_keys import schema
from recipes.pairwise.schema import run_folder

RECIPE_COPY = "recipe.yml"
TRACKED = "wandb.json"  # by which name the run goes in wandb, where it is tracked: see tracking.py
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
    named = file.get("output_dir")
    if is_trial(recipe, Path(str(named))) and cfg.get("output_dir") != named:
        raise UserError(
            f"--output-dir {cfg.get('output_dir')}: the trials of a sweep would write over each other; name the folder in the "
            f"sweep's file instead: output_dir: [{cfg.get('output_dir')}]"
        )
    given = cfg.to_dict() if hasattr(cfg, "to_dict") else dict(cfg)
    known = file.keys() | schema()["properties"].keys() - {"axolotl_config_path"}
    values = {key: given[key] for key in (*file, *given) if key in known and given.get(key) is not None}
    if isinstance(values.get("pairwise"), dict):
        values["pairwise"] = values["pairwise"] | overrides()
    return values | {"output_dir": str(run_folder(cfg.get("output_dir"), recipe))}


def overrides() -> dict:
    """What PAIRWISE_FOLD and PAIRWISE_PAIRS say of the `pairwise` block."""
    fold, pairs = os.environ.get("PAIRWISE_FOLD"), os.environ.get("PAIRWISE_PAIRS")
    told = {"fold": int(fold) if fold and fold.isdecimal() else fold, "pairs": pairs}
    return {key: value for key, value in told.items() if value not in (None, "")}


def keep(values: dict) -> None:
    """Write `values` (see resolved) as recipe.yml into their run folder; what another recipe left there vouches for nothing."""
    path = Path(values["output_dir"]) / RECIPE_COPY
    text = HEADER.format(path=path) + yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)
    if int(os.environ.get("LOCAL_RANK", "0")) or (path.is_file() and path.read_text(encoding="utf-8") == text):
        return
    for name in VOUCHERS:
        (path.parent / name).unlink(missing_ok=True)
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def keep_refused_trial(cfg: dict, recipe: Path, error: UserError) -> None:
    """A sweep's trial that is refused leaves its recipe and why, so that the sweep's index can list it."""
    folder = Path(str(cfg.get("output_dir")))
    if is_trial(recipe, folder) and folder == Path(read_yaml(recipe)["output_dir"]):
        keep(resolved(cfg, recipe))
        told = str(error).removeprefix(f"{recipe}: ")
        (run_folder(cfg.get("output_dir"), recipe) / LOG).write_text(f"error: {told}\n", encoding="utf-8")


def is_trial(recipe: Path, folder: Path) -> bool:
    """Whether Axolotl wrote `recipe` for one trial of a sweep, which trains into `folder`."""
    return bool(TRIAL.fullmatch(folder.name)) and recipe.parent == Path(tempfile.gettempdir())
