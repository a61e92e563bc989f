"""The packages of a spec as they lie in outputs/: what the recipe says they are, and what tells one build from another."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from kaggle_kernels.build.memory_fit import Fit
from postprocess.memory.model_size import GIB, weight_bytes
from postprocess.package import MANIFEST, METADATA
from postprocess.run_folder import is_same_model
from preprocess.core.errors import UserError
from preprocess.core.files import read_object, sha256

AS_TRAINED = (
    "head",
    "budget_tokens",
    "truncation",
    "softcap",
)  # keys that contract.json and the recipe share
ROOM = 1.1  # weights on disk may be a little more than computed: names, and how they were quantised


def package_folder(run: str) -> Path:
    """Where the package of a run lies."""
    return Path("outputs") / run / "package"


def spec_folder(spec_path: Path) -> Path:
    """Where everything that is done with a spec's kernel is kept: rehearsal, push, output."""
    return Path("outputs") / spec_path.stem


def find_package(fit: Fit) -> Path:
    """The run's package; a UserError where it is absent, or is not what the spec and the recipe say."""
    folder, recipe = package_folder(fit.package.run), fit.recipe
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder}: no package; run `python -m postprocess {recipe.path}` first")
    slug = str(read_object(folder / METADATA).get("id")).split("/")[-1]
    if slug != fit.package.dataset:
        raise UserError(
            f"{folder / METADATA}: id: found the dataset {slug!r}, the spec says {fit.package.dataset!r}; run "
            f"`python -m postprocess {recipe.path}` again"
        )
    contract, config, manifest = (
        read_object(folder / f"{name}.json") for name in ("contract", "config", "manifest")
    )
    for file, key, found, expected in (
        ("contract.json", "verdicts", contract.get("verdicts"), list(recipe.pairwise.verdicts)),
        *(
            ("contract.json", key, contract.get(key), getattr(recipe.pairwise, key))
            for key in AS_TRAINED
        ),
        (
            "contract.json",
            "template",
            contract.get("template"),
            asdict(recipe.pairwise.resolved_template()),
        ),
        ("config.json", "model_type", config.get("model_type"), fit.served.dimensions.model_type),
        ("manifest.json", "quantize", manifest.get("quantize"), recipe.pairwise.package.quantize),
    ):
        if found != expected:
            raise UserError(
                f"{folder / file}: {key}: found {found}, {recipe.path} says {expected}, which the kernel was built for; train "
                "and package again with this recipe, or put the recipe back"
            )
    base, trained_with = recipe.axolotl["base_model"], str(contract.get("base_model"))
    stands_in = (
        Path(trained_with).exists() and not Path(base).exists()
    )  # axolotl train R.yml --base-model FOLDER
    if not is_same_model(base, trained_with) and not stands_in:
        raise UserError(
            f"{recipe.path}: base_model is {base}, {folder} was made of {trained_with}; put that back, or train, package and "
            "build again"
        )
    held, computed = (
        sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        sum(weight_bytes(fit.served)),
    )
    if held > computed * ROOM + 2**20:
        raise UserError(
            f"{folder}: {held / GIB:.1f} GiB of weights, {recipe.path} comes to {computed / GIB:.1f}, which the kernel's "
            f"memory was computed for; it was packaged from {contract.get('base_model')}: make that the base_model, and build"
        )
    return folder


def build_of(generated: Path, packages: Mapping[str, Path]) -> dict:
    """What tells one build from another: the built kernel's SHA-256, and by dataset that of each package's manifest."""
    manifests = {dataset: sha256(folder / "manifest.json") for dataset, folder in packages.items()}
    return {"kernel_sha256": sha256(generated / "kernel.py"), "packages": manifests}
