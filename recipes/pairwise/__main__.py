"""python -m recipes.pairwise RECIPE…: check recipes in a second, without torch."""

import click

from preprocess.core.errors import UserError, exits_with_2
from preprocess.core.files import read_object
from recipes.pairwise.config.schema import read_recipe


def read_deepspeed(file: str, recipe: str) -> None:
    """Raise UserError where the file of a recipe's `deepspeed` key is absent, or no JSON object."""
    try:
        read_object(file)
    except UserError as error:
        raise UserError(
            f"{recipe}: deepspeed: {error}; see recipes/deepspeed, and run this from the repository's root"
        ) from None


@click.command()
@click.argument("recipes", nargs=-1, required=True)
@exits_with_2
def main(recipes: tuple[str, ...]) -> None:
    """Check RECIPES: every key known, every value allowed. All problems are listed; exit code 2 if there is one."""
    problems = []
    for path in recipes:
        try:
            recipe = read_recipe(path)
            if isinstance(recipe.axolotl.get("deepspeed"), str):
                read_deepspeed(recipe.axolotl["deepspeed"], path)
        except UserError as error:
            problems.append(str(error))
        else:
            print(f"{path}: ok, {recipe.axolotl['base_model']}, writes {recipe.run_folder}")
    if problems:
        raise UserError("\nerror: ".join(problems))


if __name__ == "__main__":
    main()
