"""python -m recipes.pairwise RECIPE…: check recipes in a second, without torch."""

import click

from preprocess.core.errors import UserError, exits_with_2
from preprocess.core.files import read_object
from recipes.pairwise.config.axolotl_keys import count_accumulation_steps
from recipes.pairwise.config.schema import HardwareBlock, Recipe, read_recipe
from recipes.pairwise.memory.hardware import compute_fit, find_least_hardware, name_gpus


@click.command()
@click.argument("recipes", nargs=-1, required=True)
@click.option("--gpus", type=click.IntRange(min=1), help="Check for so many GPUs, not the recipe's.")
@click.option("--gib", type=click.FloatRange(min=1), help="Check for GPUs of so many GiB.")
@exits_with_2
def main(recipes: tuple[str, ...], gpus: int | None, gib: float | None) -> None:
    """Check RECIPES: every key known, every value allowed, memory that fits the hardware.

    All problems are listed; exit code 2 if there is one.
    """
    problems = []
    for path in recipes:
        try:
            recipe = read_recipe(path)
            deepspeed = read_deepspeed(recipe)
            hardware = choose_hardware(recipe, gpus, gib)
            memory_line = None
            if hardware is not None and recipe.pairwise.train:
                memory_line = check_memory(recipe, deepspeed, hardware)
        except UserError as error:
            problems.append(str(error))
            continue

        print(f"{path}: ok, {recipe.axolotl['base_model']}, writes {recipe.run_folder}")
        if memory_line is not None:
            print(f"  {memory_line}")
    if problems:
        raise UserError("\nerror: ".join(problems))


def read_deepspeed(recipe: Recipe) -> dict | None:
    """Read the file of a recipe's `deepspeed` key; None without one.

    Raises:
        UserError: It is absent, or no JSON object.
    """
    file = recipe.axolotl.get("deepspeed")
    if not isinstance(file, str):
        return file
    try:
        return read_object(file)
    except UserError as error:
        raise UserError(
            f"{recipe.path}: deepspeed: {error}; see recipes/deepspeed, and run this from the repository's root"
        ) from None


def choose_hardware(recipe: Recipe, gpus: int | None, gib: float | None) -> HardwareBlock | None:
    """Choose the GPUs to check for: the recipe's, where the command line says nothing else.

    Args:
        recipe: The recipe.
        gpus: The command line's number of GPUs, or None.
        gib: The command line's memory of a GPU, or None.

    Returns:
        The GPUs, or None where neither says all of it.
    """
    own = recipe.pairwise.hardware
    if own is not None:
        return HardwareBlock(gpus=gpus or own.gpus, gib=gib or own.gib)
    if gpus is None or gib is None:
        return None
    return HardwareBlock(gpus=gpus, gib=gib)


def check_memory(recipe: Recipe, deepspeed: dict | None, hardware: HardwareBlock) -> str:
    """Check that a recipe fits its hardware, and write the arithmetic.

    Args:
        recipe: The recipe.
        deepspeed: The content of its DeepSpeed file; None without one.
        hardware: The GPUs.

    Raises:
        UserError: It does not fit.
    """
    block = recipe.pairwise
    if block.pairs_per_step is not None:
        micro_batch_size = recipe.axolotl.get("micro_batch_size") or 1
        count_accumulation_steps(block.pairs_per_step, micro_batch_size, hardware.gpus)

    try:
        fit = compute_fit(recipe, deepspeed, hardware)
        least = find_least_hardware(recipe, deepspeed)
    except UserError as error:
        raise UserError(f"{recipe.path}: pairwise.hardware: {error}") from None

    least_words = f"the least is {name_gpus(least)}" if least else "no common GPUs are enough"
    if not fit.is_enough:
        raise UserError(
            f"{recipe.path}: pairwise.hardware: {fit.describe()}; {least_words}. "
            "Lower micro_batch_size or budget_tokens, or set gradient_checkpointing: true"
        )
    return f"{fit.describe()}; {least_words}"


if __name__ == "__main__":
    main()
