"""The packages of a spec in outputs/: where they lie, whether they are what the kernel was built for, and their hashes.

`rehearse` and `push` check every package here before they use it.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from kaggle_kernels.build.memory_fit import Fit
from kaggle_kernels.build.spec import Spec
from postprocess.memory.model_size import GIB, weight_bytes
from postprocess.package import MANIFEST, METADATA
from preprocess.competitions import COMPETITIONS
from preprocess.core.errors import UserError
from preprocess.core.files import read_object, sha256
from recipes.pairwise.config.earlier_runs import is_same_model
from recipes.pairwise.config.schema import Recipe

# Keys that contract.json and the recipe's `pairwise:` block have in common.
AS_TRAINED = ("head", "budget_tokens", "truncation", "softcap")

# How far the weights on disk may exceed the computed size: by a share, and by the headers of the files.
EXCESS_RATIO = 1.1
EXCESS_BYTES = 2**20


def package_folder(run: str) -> Path:
    """The folder of a run's package."""
    return Path("outputs") / run / "package"


def spec_folder(spec_path: Path) -> Path:
    """The folder of what is done with a spec's kernel: its rehearsal, its last push, its output."""
    return Path("outputs") / spec_path.stem


def find_package(fit: Fit) -> Path:
    """Find the folder of a spec's package, and check that the kernel was built for it.

    Raises:
        UserError: where it is absent, or the spec or the recipe says something else.
    """
    folder = package_folder(fit.package.run)
    if not (folder / MANIFEST).is_file():
        raise UserError(
            f"{folder}: no package; run `python -m postprocess {fit.recipe.path}` first"
        )

    # From the cheapest check to those that read more.
    check_dataset(folder, fit)
    check_recipe_is_unchanged(folder, fit)
    check_base_model(folder, fit.recipe)
    check_weight_bytes(folder, fit)
    return folder


def choose_temperature(spec: Spec) -> float:
    """Choose the temperature of a kernel's final probabilities: above 1 they become less sure, below 1 surer.

    A temperature in the spec comes first. Without one, a single model that answers with probabilities has
    the temperature that packaging measured: that of the least log loss on the validation rows.

    Returns:
        The temperature; 1, which changes nothing, where none was measured or the measured one may be chance.
    """
    if spec.temperature is not None:
        return spec.temperature

    # A temperature changes no winner. That of an ensemble is fitted with its weights, by `weigh`.
    answers_winner = COMPETITIONS[spec.competition].answer == "winner"
    if answers_winner or len(spec.packages) > 1:
        return 1.0

    manifest = package_folder(spec.packages[0].run) / MANIFEST
    if not manifest.is_file():
        return 1.0
    measured = read_object(manifest).get("temperature")
    if measured is None:
        return 1.0

    # Where its 95 % interval, from low to high, holds 1, the best temperature may be chance.
    estimate = measured[spec.orders]
    excludes_one = estimate["low"] > 1 or estimate["high"] < 1
    return estimate["best"] if excludes_one else 1.0


def check_dataset(folder: Path, fit: Fit) -> None:
    """Raise UserError unless the package is for the dataset that the spec names."""
    dataset_id = str(read_object(folder / METADATA).get("id"))
    slug = dataset_id.split("/")[-1]  # OWNER/SLUG
    if slug != fit.package.dataset:
        raise UserError(
            f"{folder / METADATA}: id: found the dataset {slug!r}, but the spec names "
            f"{fit.package.dataset!r}; run `python -m postprocess {fit.recipe.path}` again"
        )


def check_recipe_is_unchanged(folder: Path, fit: Fit) -> None:
    """Raise UserError where the recipe was changed since the run was trained and packaged."""
    block = fit.recipe.pairwise
    template = asdict(block.resolved_template())

    # A file of the package, a key in it, and the value that the recipe asks for.
    comparisons = [
        ("contract.json", "verdicts", list(block.verdicts)),
        ("contract.json", "template", template),
        ("config.json", "model_type", fit.served.base.model_type),
        (MANIFEST, "quantize", block.package.quantize),
    ]
    for key in AS_TRAINED:
        comparisons.append(("contract.json", key, getattr(block, key)))

    names = ("contract.json", "config.json", MANIFEST)
    values_by_file = {name: read_object(folder / name) for name in names}
    for name, key, expected in comparisons:
        packaged = values_by_file[name].get(key)
        if packaged != expected:
            raise UserError(
                f"{folder / name}: {key}: found {packaged}, {fit.recipe.path} says {expected}, which the "
                "kernel was built for; train and package again with this recipe, or put the recipe back"
            )


def check_base_model(folder: Path, recipe: Recipe) -> None:
    """Raise UserError where the package was trained from another base model than the recipe's."""
    base_model = recipe.axolotl["base_model"]
    trained_from = str(read_object(folder / "contract.json").get("base_model"))
    if is_same_model(base_model, trained_from):
        return

    # `axolotl train R.yml --base-model FOLDER` trains from a folder on this machine. It counts as a copy of the
    # recipe's model where that is a name on the hub.
    recipe_names_hub = not Path(base_model).exists()
    if recipe_names_hub and Path(trained_from).exists():
        return
    raise UserError(
        f"{recipe.path}: base_model is {base_model}, but {folder} was trained from {trained_from}; put "
        f"{trained_from} back into the recipe, or train, package and build with the new model"
    )


def check_weight_bytes(folder: Path, fit: Fit) -> None:
    """Raise UserError where a package's weights are larger than the base model of its recipe.

    Whether a kernel's models fit the GPUs is computed from the recipe's base model. A package that was
    trained from a larger one, with --base-model, would run out of memory on Kaggle.
    """
    bytes_on_disk = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    bytes_computed = sum(weight_bytes(fit.served))
    most_bytes = bytes_computed * EXCESS_RATIO + EXCESS_BYTES
    if bytes_on_disk <= most_bytes:
        return

    trained_from = read_object(folder / "contract.json").get("base_model")
    raise UserError(
        f"{folder}: its weights have {bytes_on_disk / GIB:.1f} GiB, but the kernel's memory was computed "
        f"for {bytes_computed / GIB:.1f}, from the base_model in {fit.recipe.path}; it was packaged from "
        f"{trained_from}: write that as the base_model, and build again"
    )


def build_of(kernel: Path, packages: Mapping[str, Path]) -> dict:
    """Identify a kernel and its packages by hashes, so that what is pushed can be matched with what was rehearsed.

    `kernel` is the folder with kernel.py, `packages` the folder of each package by its dataset on Kaggle.

    Returns:
        `kernel_sha256`, of kernel.py, and `packages`: the SHA-256 of each manifest.json, by dataset.
    """
    manifest_hashes = {dataset: sha256(folder / MANIFEST) for dataset, folder in packages.items()}
    return {"kernel_sha256": sha256(kernel / "kernel.py"), "packages": manifest_hashes}
