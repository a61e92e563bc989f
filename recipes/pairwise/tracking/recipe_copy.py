"""Keep the recipe as it ran, with what the command line and the environment changed, as recipe.yml of the run folder.

A sweep needs it: Axolotl trains each trial from a temporary file, removes that, and says nowhere which
parameters `sweep0003` had. The copy is a recipe itself, which can be packaged:
`python -m postprocess outputs/R/sweep0003/recipe.yml`. The plugin calls this.
"""

import re
import tempfile
from pathlib import Path

import yaml

from preprocess.core.errors import UserError
from preprocess.core.files import atomic_file, read_yaml
from recipes.pairwise.config.axolotl_keys import schema
from recipes.pairwise.config.schema import read_environment, run_folder
from recipes.pairwise.processes import is_first_on_machine
from recipes.pairwise.tracking.results import FILES

RECIPE_COPY = "recipe.yml"
LOG = "debug.log"  # Axolotl's, which holds everything that a run prints
TRIAL = re.compile(r"sweep\d{4,}")
HEADER = """\
# The recipe as it ran in this folder, with what the command line and the environment changed: written by axolotl train.
# Its package: python -m postprocess {path}
"""


def resolve_recipe(cfg: dict, recipe: Path) -> dict:
    """Return a recipe's keys with the values that they have in this run.

    The command line, a sweep, and PAIRWISE_FOLD and PAIRWISE_PAIRS may have changed some of the file's.

    Args:
        cfg: Axolotl's configuration, which has the changes but those of the two variables.
        recipe: The recipe's file.

    Returns:
        The keys, in the order of the file, with the run folder as output_dir.

    Raises:
        UserError: All trials of a sweep would write to one folder, or PAIRWISE_FOLD is no fold.
    """
    keys_of_file = {}
    if recipe.is_file():
        keys_of_file = read_yaml(recipe)

    # A trial's file names a folder of its own, such as outputs/R/sweep0003. Where the command line names
    # another one, it is the same for all trials.
    output_dir = cfg.get("output_dir")
    if is_trial(recipe) and output_dir != keys_of_file["output_dir"]:
        raise UserError(
            f"--output-dir {output_dir}: the trials of a sweep would write over each other; name the folder in the "
            f"sweep's file instead: output_dir: [{output_dir}]"
        )

    # Axolotl's configuration is a DictDefault, whose nested parts only to_dict makes plain.
    configuration = cfg.to_dict() if hasattr(cfg, "to_dict") else dict(cfg)
    values = keep_recipe_keys(configuration, keys_of_file)

    # The environment wins over the file, as it does in the run.
    if isinstance(values.get("pairwise"), dict):
        values["pairwise"] = values["pairwise"] | read_environment()
    folder = output_dir if isinstance(output_dir, str) else None
    values["output_dir"] = str(run_folder(folder, recipe))
    return values


def keep_recipe_keys(configuration: dict, keys_of_file: dict) -> dict:
    """Keep the values of Axolotl's configuration that a recipe may hold, the keys of its file first.

    Axolotl adds keys while it runs. They are not in its schema, and a recipe that held them would be refused.
    """
    axolotl_keys = schema()["properties"].keys() - {"axolotl_config_path"}
    allowed_keys = keys_of_file.keys() | axolotl_keys

    # A key that is there twice keeps its first place.
    values = {}
    for key in (*keys_of_file, *configuration):
        if key in allowed_keys and configuration.get(key) is not None:
            values[key] = configuration[key]
    return values


def write_copy(values: dict) -> None:
    """Write a recipe's resolved keys (see resolve_recipe) as recipe.yml into their run folder."""
    path = Path(values["output_dir"]) / RECIPE_COPY
    # The order of keys is the recipe's own.
    keys = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)
    with atomic_file(path) as temporary:
        temporary.write_text(HEADER.format(path=path) + keys, encoding="utf-8")


def begin_trial(values: dict, recipe: Path) -> None:
    """Keep the recipe of a sweep's trial before it runs, so that one that fails is listed with its parameters too."""
    if not is_trial(recipe) or not is_first_on_machine():
        return

    # An earlier sweep may have left its results in the folder. Beside this trial's recipe they would be
    # taken for this trial's own.
    folder = Path(values["output_dir"])
    for name in (*FILES, LOG):
        (folder / name).unlink(missing_ok=True)
    write_copy(values)


def end_refused_trial(values: dict | None, recipe: Path, error: UserError) -> None:
    """Write why a sweep's trial is refused into its log, debug.log of its run folder.

    Axolotl would write that log, but has not begun it when a recipe is refused. A recipe that is not one of
    a trial gets no log: its error is on the screen.
    """
    is_known_trial = bool(values) and is_trial(recipe)
    if is_known_trial and is_first_on_machine():
        # The message names the trial's temporary file, which is gone when somebody reads the log.
        reason = str(error).removeprefix(f"{recipe}: ")
        log = Path(values["output_dir"]) / LOG
        log.write_text(f"error: {reason}\n", encoding="utf-8")


def is_trial(recipe: Path) -> bool:
    """Return whether a recipe is the temporary file that Axolotl writes for one trial of a sweep."""
    if recipe.parent != Path(tempfile.gettempdir()) or not recipe.is_file():
        return False

    # The folder of a trial is numbered: outputs/R/sweep0003.
    output_dir = str(read_yaml(recipe).get("output_dir"))
    return TRIAL.fullmatch(Path(output_dir).name) is not None


def lasting_recipe(recipe: Path, folder: str | Path) -> Path:
    """Find the file that will still hold a run's recipe later."""
    if is_trial(recipe):
        return Path(folder) / RECIPE_COPY
    return recipe
