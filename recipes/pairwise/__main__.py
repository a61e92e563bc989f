"""python -m recipes.pairwise RECIPE…: check recipes in a second, without torch."""

import click

from preprocess.core.errors import UserError, exits_with_2
from recipes.pairwise.config.recipe_files import read_deepspeed
from recipes.pairwise.config.schema import read_recipe
from recipes.pairwise.memory.hardware import check_hardware


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
            deepspeed = read_deepspeed(recipe.axolotl.get("deepspeed"))
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
