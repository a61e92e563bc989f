"""Does a spec fit? What each of its packages needs on a T4, from the recipe that makes it; what does not fit is refused.

Only the recipe is read: a kernel can be built where nothing was trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kaggle_kernels.build.spec import COMPETITIONS, PackageBlock, Spec
from kaggle_kernels.runtime.settings import PackageSettings
from postprocess.memory.model_size import GIB, Served, served_of
from postprocess.memory.t4_fit import GPU_BYTES, in_gib, place, refusal
from preprocess.core.errors import UserError
from preprocess.core.files import read_yaml
from recipes.pairwise.config.schema import Recipe, read_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
BITSANDBYTES = ("nf4", "int8")  # the runtime unpacks GPTQ itself
HEADS = {"score": "classifier", "label_tokens": "label tokens", "reward": "reward model"}


@dataclass(frozen=True)
class Fit:
    """A package of a spec with its recipe. `gpu_bytes` is what one copy needs, one number for each GPU that it stands on."""

    package: PackageBlock
    recipe: Recipe
    served: Served
    placement: str  # each or split
    gpu_bytes: tuple[int, ...]

    @property
    def approach(self) -> str:
        """How the model was trained and what its head is, in a few words."""
        block = self.recipe.pairwise
        adapter = {"qlora": "QLoRA", "lora": "LoRA"}.get(self.recipe.axolotl.get("adapter"), "full")
        return f"{HEADS[block.head]}, {adapter if block.train else 'untrained'}"


def fit_packages(spec_path: Path, spec: Spec) -> list[Fit]:
    """Every package of a spec, placed; a UserError where one does not suit its recipe or does not fit."""
    fits = []
    for number, package in enumerate(spec.packages):
        where = f"{spec_path}: packages.{number}"
        recipe = find_recipe(package.run, where)
        check_recipe(package, recipe, spec, where)
        served = served_as(served_of(recipe), spec)
        if served.budget_tokens > spec.tokens_per_batch:
            raise UserError(
                f"{spec_path}: tokens_per_batch: {spec.tokens_per_batch}, but a row of {package.run} may have "
                f"{served.budget_tokens} ({recipe.path}: pairwise.budget_tokens); raise it"
            )
        positions = served.dimensions.max_position_embeddings
        if positions and served.budget_tokens > positions:
            key = (
                f"{spec_path}: budget_tokens"
                if spec.budget_tokens
                else f"{recipe.path}: pairwise.budget_tokens"
            )
            raise UserError(
                f"{key}: {served.budget_tokens}, but {recipe.axolotl['base_model']} has {positions} positions; lower it"
            )
        if package.placement == "split" and served.dimensions.model_type == "bert":
            raise UserError(
                f"{where}.placement: split is for decoders, {package.run} is an encoder; write each"
            )
        if served.quantize in BITSANDBYTES and spec.wheels is None:
            raise UserError(
                f"{spec_path}: wheels: missing; {package.run} is quantised with bitsandbytes, which Kaggle's image lacks; name "
                "the dataset that holds its wheel, e.g. pairwise-wheels"
            )
        placement, needs = place(served, spec.tokens_per_batch, package.placement)
        if max(needs) > GPU_BYTES:
            raise UserError(
                f"{where}: {refusal(package.run, served, spec.tokens_per_batch, package.placement, recipe.path)}"
            )
        fits.append(Fit(package, recipe, served, placement, needs))
    return fits


def find_recipe(run: str, where: str) -> Recipe:
    """The recipe of a run: recipes/RUN.yml here, or among the project's; else the one whose output_dir ends with the run."""
    name = run.split("/")[0]
    folders = (Path("recipes"), RECIPES)
    for folder in folders:
        if (folder / f"{name}.yml").is_file():
            return read_recipe(folder / f"{name}.yml")
    for path in (path for folder in folders for path in sorted(folder.glob("*.yml"))):
        try:
            values = read_yaml(path)
        except UserError:
            continue  # another recipe, which its own check tells of
        if Path(str(values.get("output_dir") or "")).name == name:
            return read_recipe(path)
    raise UserError(
        f"{where}.run: no recipes/{name}.yml, which says base model and quantisation; name a recipe's run"
    )


def check_recipe(package: PackageBlock, recipe: Recipe, spec: Spec, where: str) -> None:
    """Raise UserError where the recipe's verdicts lack one that the competition asks for, or its dataset is another one."""
    block = recipe.pairwise
    if missing := set(COMPETITIONS[spec.competition].verdicts) - set(block.verdicts):
        raise UserError(
            f"{recipe.path}: pairwise.verdicts: no {', '.join(sorted(missing))}, which {spec.competition} asks for and "
            f"{where} is to answer; train with it, or name another run"
        )
    if package.dataset != block.package.slug:
        raise UserError(
            f"{where}.dataset: found {package.dataset!r}, {recipe.path} packages as {block.package.slug!r}; write that"
        )


def served_as(served: Served, spec: Spec) -> Served:
    """With the spec's token budget, where it names one."""
    return replace(served, budget_tokens=spec.budget_tokens) if spec.budget_tokens else served


def package_settings(fit: Fit) -> PackageSettings:
    """What the kernel is told of a package."""
    package, recipe = fit.package, fit.recipe
    return PackageSettings(
        run=package.run,
        dataset=package.dataset,
        weight=package.weight,
        placement=fit.placement,
        verdicts=tuple(recipe.pairwise.verdicts),
        base_model=recipe.axolotl["base_model"],
        model_type=fit.served.dimensions.model_type,
    )


def memory_sentence(fits: Sequence[Fit], spec: Spec) -> str:
    """What the kernel needs on each GPU, for its first lines."""
    needs = [
        f"{fit.package.run} {in_gib(fit.gpu_bytes)} GiB{' (split)' if fit.placement == 'split' else ''}"
        for fit in fits
    ]
    together = ", one model at a time" if len(fits) > 1 else ""
    return (
        f"On each GPU, which offers {GPU_BYTES / GIB} GiB, computed for batches of {spec.tokens_per_batch:,} tokens: "
        f"{', '.join(needs)}{together}."
    )
