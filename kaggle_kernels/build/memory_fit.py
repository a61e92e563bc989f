"""Does a spec fit two T4s? Each of its packages is matched with its recipe, placed and measured against a T4's memory.

`build`, `list`, `rehearse` and `push` call fit_packages. Only recipes are read, so that a kernel can be built on a machine
where nothing was trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kaggle_kernels.build.spec import PackageBlock, Spec
from kaggle_kernels.runtime.settings import PackageSettings
from postprocess.memory.model_size import GIB, GPU_BYTES, Served, served_of, weight_bytes_limit
from postprocess.memory.t4_fit import in_gib, place, refusal
from preprocess.competitions import COMPETITIONS
from preprocess.core.errors import UserError
from recipes.pairwise.config.schema import Recipe, read_recipe

RECIPES = Path(__file__).parents[2] / "recipes"

# The formats that need bitsandbytes on Kaggle. The runtime unpacks GPTQ itself.
BITSANDBYTES = ("nf4", "int8")


@dataclass(frozen=True)
class Fit:
    """A package of a spec, with its recipe and its place on the GPUs."""

    package: PackageBlock
    recipe: Recipe
    served: Served
    placement: str  # each: a copy on every GPU; split: one copy, its layers over both
    gpu_bytes: tuple[int, ...]  # what one copy needs on each GPU that it stands on
    weight_bytes_limit: int | None = None  # split: what a GPU has for weights


def fit_packages(spec_path: Path, spec: Spec) -> list[Fit]:
    """Place every package of a spec on the GPUs, in the spec's order. Error messages name `spec_path`.

    Raises:
        UserError: where a package has no recipe, contradicts it, or does not fit the memory of two T4s.
    """
    fits = []
    for number, package in enumerate(spec.packages):
        package_key = f"{spec_path}: packages.{number}"
        recipe = find_recipe(package.run, package_key)
        check_recipe(package, recipe, spec, package_key)

        # What the kernel loads, with the spec's budget of tokens in place of training's.
        served = served_of(recipe)
        if spec.budget_tokens is not None:
            served = replace(served, budget_tokens=spec.budget_tokens)
        check_row_length(served, spec_path, spec, package, recipe)

        # An encoder is small enough for one GPU, and the runtime has no way to split it.
        if package.placement == "split" and served.base.is_encoder:
            raise UserError(
                f"{package_key}.placement: found split, but {package.run} is an encoder, which the "
                "kernel cannot split; write each"
            )
        if served.quantize in BITSANDBYTES and spec.wheels is None:
            raise UserError(
                f"{spec_path}: wheels: missing; {package.run} is quantised with bitsandbytes, which "
                "Kaggle's image lacks; name the dataset that holds its wheel, e.g. pairwise-wheels"
            )

        # On each GPU, or split over both if one cannot hold it; refused if both cannot.
        placement, gpu_bytes = place(served, spec.tokens_per_batch, package.placement)
        if max(gpu_bytes) > GPU_BYTES:
            reason = refusal(
                package.run, served, spec.tokens_per_batch, package.placement, recipe.path
            )
            raise UserError(f"{package_key}: {reason}")
        byte_limit = None
        if placement == "split":
            byte_limit = weight_bytes_limit(served, spec.tokens_per_batch, len(gpu_bytes))
        fits.append(Fit(package, recipe, served, placement, gpu_bytes, byte_limit))
    return fits


def find_recipe(run: str, package_key: str) -> Recipe:
    """Find the recipe that a run was trained by: it has the run's name.

    The current folder's recipes/ comes before the project's own. `package_key` says in messages where the
    spec names the run.
    """
    # A run may be a part of another, as in gemma2_cls/mean.
    name = run.split("/")[0]
    for folder in (Path("recipes"), RECIPES):
        path = folder / f"{name}.yml"
        if path.is_file():
            return read_recipe(path)

    raise UserError(
        f"{package_key}.run: there is no recipes/{name}.yml, which would say the base model and the "
        "quantisation; name a run that has a recipe"
    )


def check_recipe(package: PackageBlock, recipe: Recipe, spec: Spec, package_key: str) -> None:
    """Check that a recipe's model can serve in a kernel: it knows all verdicts, and is packaged as the spec's dataset.

    Args:
        package: The spec's entry for the model.
        recipe: The recipe that it is trained and packaged by.
        spec: The kernel's spec.
        package_key: Where the entry stands in the spec, for messages: FILE: packages.0.

    Raises:
        UserError: The recipe lacks a verdict of the competition, or packages as another dataset.
    """
    block = recipe.pairwise

    # A kernel cannot answer with a verdict that its model has never learnt.
    missing_verdicts = set(COMPETITIONS[spec.competition].verdicts) - set(block.verdicts)
    if missing_verdicts:
        raise UserError(
            f"{recipe.path}: pairwise.verdicts: no {', '.join(sorted(missing_verdicts))}, which the "
            f"competition {spec.competition} asks for; add it and train again, or name another run in "
            f"{package_key}"
        )

    # The package's metadata holds the recipe's slug, and Kaggle mounts a dataset under its slug.
    if package.dataset != block.package.slug:
        raise UserError(
            f"{package_key}.dataset: found {package.dataset!r}, but {recipe.path} makes the dataset "
            f"{block.package.slug!r}; name this one"
        )


def check_row_length(
    served: Served, spec_path: Path, spec: Spec, package: PackageBlock, recipe: Recipe
) -> None:
    """Check that the kernel can score the longest row that a model is given.

    A row has at most `served.budget_tokens` tokens. They must fit into one batch, and the model must have a
    position for each of them.

    Raises:
        UserError: The longest row is too long for a batch, or for the model.
    """
    # Where the longest row's length is written: the spec's own key replaces the recipe's.
    if spec.budget_tokens is not None:
        budget_key = f"{spec_path}: budget_tokens"
    else:
        budget_key = f"{recipe.path}: pairwise.budget_tokens"

    if served.budget_tokens > spec.tokens_per_batch:
        raise UserError(
            f"{spec_path}: tokens_per_batch: found {spec.tokens_per_batch}, but one row of "
            f"{package.run} may have {served.budget_tokens} tokens ({budget_key}); raise tokens_per_batch"
        )

    # Beyond its positions a model has no embedding, or was never trained.
    positions = served.base.positions
    if positions and served.budget_tokens > positions:
        raise UserError(
            f"{budget_key}: found {served.budget_tokens}, but {recipe.axolotl['base_model']} has only "
            f"{positions} positions; lower it"
        )


def package_settings(fit: Fit) -> PackageSettings:
    """Collect what the kernel has to know of a package."""
    return PackageSettings(
        run=fit.package.run,
        dataset=fit.package.dataset,
        weight=fit.package.weight,
        placement=fit.placement,
        verdicts=tuple(fit.recipe.pairwise.verdicts),
        weight_bytes_limit=fit.weight_bytes_limit,
    )


def describe_memory(fits: Sequence[Fit], spec: Spec) -> str:
    """Say what the kernel needs on each GPU, for the text at its top."""
    needs = []
    for fit in fits:
        need = f"{fit.package.run} {in_gib(fit.gpu_bytes)} GiB"
        if fit.placement == "split":
            need += " (split)"
        needs.append(need)

    sentence = (
        f"On each GPU, which offers {GPU_BYTES / GIB} GiB, computed for batches of "
        f"{spec.tokens_per_batch:,} tokens: {', '.join(needs)}"
    )
    if len(fits) > 1:
        sentence += ", one model at a time"
    return f"{sentence}."
