"""Does a spec fit? What each of its packages needs on a T4, from the recipe that makes it; what does not fit is refused.

Only the recipe is read: a kernel can be built where nothing was trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kaggle_kernels.runtime.settings import PackageSettings
from kaggle_kernels.spec import COMPETITIONS, PackageBlock, Spec
from postprocess.sizes import GIB, Served, gpu_bytes, served_of, weight_bytes
from preprocess.errors import UserError
from preprocess.files import read_yaml
from recipes.pairwise.schema import GPTQ_BITS, Recipe, read_recipe

RECIPES = Path(__file__).parents[1] / "recipes"
GPUS = 2
GPU_BYTES = 29 * GIB // 2  # of a T4's 15 GiB, out-of-memory messages of PyTorch say that 14.56 to 14.76 can be had
BITSANDBYTES = ("nf4", "int8")  # the runtime unpacks GPTQ itself
SMALLER = {"none": ("int8", "gptq8", "nf4", "gptq4"), "int8": ("nf4", "gptq4"), "gptq8": ("gptq4", "nf4")}
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
            key = f"{spec_path}: budget_tokens" if spec.budget_tokens else f"{recipe.path}: pairwise.budget_tokens"
            raise UserError(
                f"{key}: {served.budget_tokens}, but {recipe.axolotl['base_model']} has {positions} positions; lower it"
            )
        if package.placement == "split" and served.dimensions.model_type == "bert":
            raise UserError(f"{where}.placement: split is for decoders, {package.run} is an encoder; write each")
        if served.quantize in BITSANDBYTES and spec.wheels is None:
            raise UserError(
                f"{spec_path}: wheels: missing; {package.run} is quantised with bitsandbytes, which Kaggle's image lacks; name "
                "the dataset that holds its wheel, e.g. pairwise-wheels"
            )
        placement, needs = place(served, spec.tokens_per_batch, package.placement)
        if max(needs) > GPU_BYTES:
            raise UserError(f"{where}: {refusal(package, served, spec, needs, recipe)}")
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
    raise UserError(f"{where}.run: no recipes/{name}.yml, which says base model and quantisation; name a recipe's run")


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


def place(served: Served, tokens_per_batch: int, placement: str) -> tuple[str, tuple[int, ...]]:
    """Where a package goes, and what that needs on each GPU. `auto`: a copy on every GPU if that fits, else split."""
    alone = tuple(gpu_bytes(served, tokens_per_batch))
    is_encoder = served.dimensions.model_type == "bert"
    if placement == "each" or is_encoder or (placement == "auto" and max(alone) <= GPU_BYTES):
        return "each", alone
    return "split", tuple(gpu_bytes(served, tokens_per_batch, GPUS))


def refusal(package: PackageBlock, served: Served, spec: Spec, needs: Sequence[int], recipe: Recipe) -> str:
    """What a package that does not fit needs, and each single change that would make it fit."""

    def most(changed: Served, tokens: int, placement: str) -> float:
        return max(place(changed, tokens, placement)[1])

    tokens, placement = spec.tokens_per_batch, package.placement
    smaller = [fewer for fewer in (4096, 2048, 1024) if served.budget_tokens <= fewer < tokens]
    fitting = [fewer for fewer in smaller if most(served, fewer, placement) <= GPU_BYTES][:1]
    changes = {f"tokens_per_batch: {fewer}": most(served, fewer, placement) for fewer in fitting}
    if placement == "each":
        changes["placement: split"] = most(served, tokens, "auto")
    is_encoder = served.dimensions.model_type == "bert"
    for kind in SMALLER.get(served.quantize, ()):
        if is_encoder and kind in GPTQ_BITS:
            continue
        changes[f"pairwise.package.quantize: {kind} in {recipe.path}"] = most(replace(served, quantize=kind), tokens, placement)
    ways = [f"{text} ({size / GIB:.1f} GiB)" for text, size in changes.items() if size <= GPU_BYTES]
    held = max(weight_bytes(served, len(needs))) / GIB
    return f"{package.run} needs {in_gib(needs)} GiB on a GPU ({held:.1f} of it weights), a T4 offers {GPU_BYTES / GIB}; " + (
        f"what would fit: {', or '.join(ways)}" if ways else "no single change makes it fit; take a smaller base model"
    )


def in_gib(sizes: Sequence[int]) -> str:
    """GiB on each GPU, e.g. "9.9", or "12.1 + 11.9" where the layers stand on two."""
    return " + ".join(f"{size / GIB:.1f}" for size in sizes)


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
    needs = [f"{fit.package.run} {in_gib(fit.gpu_bytes)} GiB{' (split)' if fit.placement == 'split' else ''}" for fit in fits]
    together = ", one model at a time" if len(fits) > 1 else ""
    return (
        f"On each GPU, which offers {GPU_BYTES / GIB} GiB, computed for batches of {spec.tokens_per_batch:,} tokens: "
        f"{', '.join(needs)}{together}."
    )
