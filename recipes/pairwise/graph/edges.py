"""What a recipe or a spec needs of other runs: the edges of the graph that `pairwise make` brings up to date.

A student needs its teachers' labels, a recipe with `base_model: outputs/X/merged` the merged model of X, a spec the packages
of its runs. `make.py` calls `derive_graph` and hands the result to recipes/Snakefile. Nothing here imports torch.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from preprocess import model_input
from preprocess.core.errors import UserError
from preprocess.core.files import read_yaml, sha256
from recipes.pairwise.config.recipe_files import RECIPES, find_recipe
from recipes.pairwise.config.schema import Recipe, read_recipe

# Of the project; recipes and specs are those of the current folder.
ROOT = RECIPES.parent
RUN = re.compile(r"(?:outputs/)?(?P<run>[^/]+)/?")
MERGED_MODEL = re.compile(r"(?:\./)?outputs/(?P<run>[^/]+)/merged/?")
# With these keys one training spreads over all GPUs of a machine.
SHARDING_KEYS = ("deepspeed", "fsdp", "fsdp_config")
# A trained model is not thrown away because some code changed; what is cheap to make is made again.
CODE_OF_STEPS = {
    "preprocess": ("preprocess",),
    "postprocess": ("postprocess", "kaggle_kernels/runtime"),
    "kernel": ("kaggle_kernels/build", "kaggle_kernels/runtime"),
    "rehearsal": ("kaggle_kernels/rehearsal",),
    "report": ("postprocess/report",),
}
CODE_SUFFIXES = (".py", ".jinja", ".css", ".js")


@dataclass(frozen=True)
class Run:
    """One recipe's run."""

    recipe: str  # its path
    pairs: str
    folds: list[int]  # of the pairs file
    is_trained: bool  # and not only packaged (`train: false`)
    teachers: list[str]  # the runs whose labels it trains on
    base_run: str | None  # whose merged model it starts from; None for a model from elsewhere
    keeps_merged: bool  # as some recipe starts from its merged model
    is_packaged: bool  # as a spec of the graph serves its package
    uses_all_gpus: bool  # of a machine, for one training
    training_hash: str  # of everything but data that decides what is trained
    packaging_hash: str  # of the whole recipe


@dataclass(frozen=True)
class Kernel:
    """One spec's kernel: the spec's file, its hash, and the runs whose packages it serves (R or R/mean)."""

    spec: str
    spec_hash: str
    packages: list[str]


@dataclass(frozen=True)
class Graph:
    """Everything that recipes/Snakefile needs to know, by the names of runs and specs."""

    runs: dict[str, Run]
    kernels: dict[str, Kernel]
    code_hashes: dict[str, str]


def derive_graph(target: str) -> Graph:
    """Follow the edges from a recipe or a spec back to everything that it is made from.

    Args:
        target: The name of a recipe, of a spec, or of both, as they mostly have the same; or a recipe's file.

    Raises:
        UserError: There is no such recipe or spec, one is invalid, or pairs are missing.
    """
    name = target
    is_file_name = target.endswith((".yml", ".yaml"))
    if is_file_name:
        name = Path(target).stem

    # A spec leads to the runs that it serves: to R for its package R, or for R/mean, the mean of R's folds.
    kernels = {}
    recipes_to_read = []
    spec_path = Path(f"kaggle_kernels/specs/{name}.yml")
    if spec_path.is_file():
        kernels[name] = read_kernel(spec_path)
        recipes_to_read += [package.split("/")[0] for package in kernels[name].packages]

    # The target is a recipe too, unless it is the spec of an ensemble, which has no recipe of its name.
    # Where it is neither, read_recipes says that there is no such recipe.
    has_recipe = is_file_name or Path(f"recipes/{name}.yml").is_file()
    if has_recipe or not kernels:
        recipes_to_read.append(target)
    recipes = read_recipes(recipes_to_read)

    # A run that no kernel serves is not packaged, which a teacher of 70 billion parameters need not be.
    packaged_runs = set()
    for kernel in kernels.values():
        packaged_runs.update(kernel.packages)

    merged_bases = find_merged_bases(recipes)
    runs = {}
    for run_name, recipe in recipes.items():
        is_packaged = run_name in packaged_runs
        keeps_merged = run_name in merged_bases
        runs[run_name] = describe_run(recipe, is_packaged, keeps_merged)
    return Graph(runs, kernels, hash_code_of_steps())


def describe_run(recipe: Recipe, is_packaged: bool, keeps_merged: bool) -> Run:
    """Describe what the graph needs to know of a recipe's run; Run explains the two arguments beside the recipe."""
    block = recipe.pairwise

    # A training depends on the keys of the recipe, but for those that change no weight, and on the code
    # that makes the token ids.
    training_keys = block.model_dump(mode="json", exclude={"package", "hardware"})
    training = [recipe.axolotl, training_keys, sha256(model_input.__file__)]

    # Packaging depends on all keys, and on the training itself, which the graph knows by its files.
    packaging = [recipe.axolotl, block.model_dump(mode="json")]
    return Run(
        recipe=str(recipe.path),
        pairs=block.pairs,
        folds=read_folds(block.pairs),
        is_trained=block.train,
        teachers=teachers_of(recipe),
        base_run=base_run_of(recipe.axolotl),
        keeps_merged=keeps_merged,
        is_packaged=is_packaged,
        uses_all_gpus=spreads_over_gpus(recipe),
        training_hash=hash_values(training),
        packaging_hash=hash_values(packaging),
    )


def read_kernel(spec_path: Path) -> Kernel:
    """Read which runs a spec serves; `pairwise build` checks the spec itself."""
    spec = read_yaml(spec_path)
    try:
        packages = [package["run"] for package in spec["packages"]]
    except (KeyError, TypeError):
        raise UserError(
            f"{spec_path}: packages: expected a list of packages, each with its run"
        ) from None
    return Kernel(str(spec_path), hash_values(spec), packages)


def read_recipes(names: Iterable[str]) -> dict[str, Recipe]:
    """Read the named recipes and, from one to the next, all whose runs they need.

    Raises:
        UserError: One does not exist or is invalid, or writes elsewhere than the graph looks.
    """
    recipes: dict[str, Recipe] = {}
    names_to_visit = list(names)
    while names_to_visit:
        name = names_to_visit.pop()
        # A recipe of the current folder comes before the project's own of that name.
        path = Path("recipes") / f"{name}.yml"
        if not path.is_file():
            path = find_recipe(name)
        recipe = read_recipe(path)

        # Several recipes may need the same run. Two runs may also need each other, by mistake: the loop
        # ends all the same, and Snakemake names them in its error.
        run_name = recipe.path.stem
        if run_name in recipes:
            continue

        # The steps of the Snakefile name their files after the run.
        expected_folder = Path("outputs") / run_name
        if recipe.run_folder != expected_folder:
            raise UserError(
                f"{recipe.path}: its run goes to {recipe.run_folder}, but pairwise make looks for it in {expected_folder}; "
                "remove output_dir, and unset PAIRWISE_FOLD"
            )

        recipes[run_name] = recipe
        names_to_visit += teachers_of(recipe)
        base_run = base_run_of(recipe.axolotl)
        if base_run is not None:
            names_to_visit.append(base_run)
    return recipes


def spreads_over_gpus(recipe: Recipe) -> bool:
    """Return whether one training takes all GPUs of a machine: where the recipe is for several, or shards."""
    hardware = recipe.pairwise.hardware
    if hardware is not None:
        return hardware.gpus > 1
    return any(recipe.axolotl.get(key) for key in SHARDING_KEYS)


def teachers_of(recipe: Recipe) -> list[str]:
    """List the runs whose labels a recipe trains on.

    A teacher is a run, R or outputs/R. Any other path is a file of labels from elsewhere, which is not made here.
    """
    distillation = recipe.pairwise.distill
    if distillation is None:
        return []

    teachers = []
    for teacher in distillation.teachers:
        match = RUN.fullmatch(teacher)
        if match:
            teachers.append(match["run"])
    return teachers


def base_run_of(axolotl_keys: dict) -> str | None:
    """Name the run whose merged model `base_model` is; None if it is a model from elsewhere."""
    match = MERGED_MODEL.fullmatch(str(axolotl_keys.get("base_model")))
    return match["run"] if match else None


def find_merged_bases(recipes: dict[str, Recipe]) -> set[str]:
    """Find all runs whose merged model some recipe starts from, among the graph's recipes and all of recipes/.

    A run keeps its merged model if some recipe starts from it, whether or not that recipe is in the graph.
    Otherwise the run would be packaged with it for one target and without it for the next, in turns.
    """
    merged_bases = set()
    for recipe in recipes.values():
        merged_bases.add(base_run_of(recipe.axolotl))
    for path in Path("recipes").glob("*.yml"):
        merged_bases.add(base_run_of(read_yaml(path)))

    # Most recipes start from a model that no run here made, for which base_run_of gives None.
    return merged_bases - {None}


def read_folds(pairs: str) -> list[int]:
    """List the folds of a pairs file, without reading its texts, which may be gigabytes.

    Raises:
        UserError: The file does not exist, or is no pairs.parquet.
    """
    if not Path(pairs).is_file():
        raise UserError(f"{pairs}: no such file; make it with pairwise preprocess")

    try:
        # Read lazily: only the columns that are asked for below.
        table = pl.scan_parquet(pairs)
        # Rows of other roles (extra, pool, test) are in no fold that is validated on.
        if "role" in table.collect_schema():
            table = table.filter(role="train")
        folds = table.select("fold").collect()["fold"]
    except pl.exceptions.PolarsError as error:
        first_line = str(error).splitlines()[0]
        raise UserError(
            f"{pairs}: no pairs.parquet ({first_line}); make it with pairwise preprocess"
        ) from None
    return sorted(folds.unique().to_list())


def hash_code_of_steps() -> dict[str, str]:
    """Hash the code of the steps that are made again when it changes."""
    return {step: hash_code(folders) for step, folders in CODE_OF_STEPS.items()}


def hash_code(folders: Iterable[str]) -> str:
    """Hash the sources in folders of the project, by content, so that a fresh checkout changes nothing."""
    hashes = {}
    for folder in folders:
        for file in sorted((ROOT / folder).rglob("*")):
            if file.suffix in CODE_SUFFIXES:
                hashes[str(file.relative_to(ROOT))] = sha256(file)
    return hash_values(hashes)


def hash_values(values: object) -> str:
    """Hash values of YAML or JSON."""
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
