"""python -m recipes.pairwise RECIPE…: check recipes in a second, without torch."""

import click

from preprocess.errors import UserError, exits_with_2
from recipes.pairwise.schema import read_recipe


@click.command()
@click.argument("recipes", nargs=-1, required=True)
@exits_with_2
def main(recipes: tuple[str, ...]) -> None:
    """Check RECIPES: every key known, every value allowed. All problems are listed; exit code 2 if there is one."""
    problems = []
    for path in recipes:
        try:
            recipe = read_recipe(path)
        except UserError as error:
            problems.append(str(error))
        else:
            print(f"{path}: ok, {recipe.axolotl['base_model']}, writes {recipe.run_folder}")
    if problems:
        raise UserError("\nerror: ".join(problems))


if __name__ == "__main__":
    main()
