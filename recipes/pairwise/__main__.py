"""python -m recipes.pairwise RECIPE…: check recipes in a second, without torch."""

import click

from preprocess.core.errors import UserError, exits_with_2
from preprocess.core.files import read_object
from recipes.pairwise.config.schema import Recipe, read_recipe
from recipes.pairwise.memory.hardware import check_hardware


def read_deepspeed(recipe: Recipe) -> dict | None:
    """Read the file of a recipe's `deepspeed` key; None without one. UserError where it is absent, or no JSON object."""
    file = recipe.axolotl.get("deepspeed")
    if not isinstance(file, str):
        return file
    try:
        return read_object(file)
    except UserError as error:
        raise UserError(
            f"deepspeed: {error}; see recipes/deepspeed, and run this from the repository's root"
        ) from None


@click.command()
@click.argument("recipes", nargs=-1, required=True)
@exits_with_2
def main(recipes: tuple[str, ...]) -> None:
    """Check RECIPES: every key known, every value allowed, memory that fits the hardware.

    All problems are listed; exit code 2 if there is one.
    """
    problems = []
    for path in recipes:
        try:
            recipe = read_recipe(path)
        except UserError as error:
            problems.append(str(error))
            continue

        lines = [f"{path}: ok, {recipe.axolotl['base_model']}, writes {recipe.run_folder}"]
        try:
            deepspeed = read_deepspeed(recipe)
            if recipe.pairwise.hardware is not None:
                lines.append(f"  {check_hardware(recipe, deepspeed)}")
        except UserError as error:
            problems.append(f"{path}: {error}")
            continue
        print("\n".join(lines))

    if problems:
        raise UserError("\nerror: ".join(problems))


if __name__ == "__main__":
    main()
