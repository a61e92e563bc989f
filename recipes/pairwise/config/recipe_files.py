"""Find a recipe by its name or path, and read the file that its `deepspeed` key names."""

from pathlib import Path

from preprocess.core.errors import UserError
from preprocess.core.files import read_object

RECIPES = Path(__file__).parents[2]


def find_recipe(name: str) -> Path:
    """Find a recipe by a path that ends in .yml or .yaml, or by the name of a file in recipes/ without its ending.

    Raises:
        UserError: There is no such file.
    """
    path = Path(name)
    if not name.endswith((".yml", ".yaml")):
        path = RECIPES / f"{name}.yml"
    if not path.is_file():
        names = ", ".join(sorted(recipe.stem for recipe in RECIPES.glob("*.yml")))
        raise UserError(f"{name}: no such recipe; there are {names}, or give a file")

    # Recipes name their files relative to the current folder too.
    if path.is_relative_to(Path.cwd()):
        return path.relative_to(Path.cwd())
    return path


def read_deepspeed(deepspeed: str | dict | None) -> dict:
    """Read the settings that a recipe's `deepspeed` key holds or names; empty without DeepSpeed.

    Raises:
        UserError: The file is absent, or no JSON object.
    """
    if not isinstance(deepspeed, str):
        return deepspeed or {}
    try:
        return read_object(deepspeed)
    except UserError as error:
        raise UserError(
            f"deepspeed: {error}; see recipes/deepspeed, and run this from the repository's root"
        ) from None
