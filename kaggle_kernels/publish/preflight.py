"""What push checks before the first byte goes up, and Kaggle would not: that the right things are pushed, and nothing private.

The kernel is the one that was built last, fits two T4s, and was rehearsed with these packages; each package is the recipe's,
agrees with the trained model, and holds nothing but its files. All problems are told at once; nothing is changed.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from kaggle_kernels.build.bundle import kernel_folder, stale_files
from kaggle_kernels.build.memory_fit import Fit, fit_packages
from kaggle_kernels.build.packages import build_of, find_package, package_folder, spec_folder
from kaggle_kernels.build.spec import read_spec
from kaggle_kernels.publish.kernels import CODE
from kaggle_kernels.publish.leak_scan import find_rows, scan
from kaggle_kernels.publish.package_files import check_package, check_wheels
from postprocess.package import MANIFEST, METADATA
from preprocess.core.errors import UserError
from preprocess.core.files import read_object

WHEELS = Path("outputs/wheels")


def find_problems(spec_path: Path) -> list[str]:
    """List everything that keeps a spec from being pushed, a line for each problem."""
    # Without a spec and recipes that can be read there is nothing more to check.
    try:
        spec = read_spec(spec_path)
        fits = fit_packages(spec_path, spec)
    except UserError as error:
        return [str(error)]

    problems = check_build(spec_path)
    for fit in fits:
        problems += collect_problems(check_files_and_agreement, fit)
    if spec.wheels:
        problems += collect_problems(check_wheels_dataset, spec.wheels)

    # Look for secrets and rows of data in everything that would be uploaded.
    folders = {package.dataset: package_folder(package.run) for package in spec.packages}
    uploaded_folders = [*folders.values(), kernel_folder(spec_path)]
    if spec.wheels:
        uploaded_folders.append(WHEELS)
    pairs_files = {Path(fit.recipe.pairwise.pairs) for fit in fits}
    problems += collect_problems(check_secrets, uploaded_folders, sorted(pairs_files))
    problems += collect_problems(check_rehearsal, spec_path, folders)

    # Two checks may find the same problem: each is listed once, in the order of the checks.
    return list(dict.fromkeys(problems))


def collect_problems(check: Callable[..., list[str]], *arguments) -> list[str]:
    """Call a check, and list the problems that it returns or raises as a UserError."""
    try:
        return check(*arguments)
    except UserError as error:
        return [str(error)]


def check_build(spec_path: Path) -> list[str]:
    """Check that the generated kernel is what spec, recipes and runtime give now."""
    problems = []
    for path in stale_files(spec_path):
        state = "not up to date" if path.is_file() else "not built"
        problems.append(f"{path}: {state}; run `python -m kaggle_kernels build {spec_path.stem}`")
    return problems


def check_files_and_agreement(fit: Fit) -> list[str]:
    """Check that a package is the recipe's, holds its files only, and answers as the trained model did.

    Packaging has compared the answers and written the result to agreement.json. It is not measured again.
    """
    folder = find_package(fit)
    problems = check_package(folder)

    file = folder.parent / "agreement.json"
    agreement = read_object(file) if file.is_file() else {}
    remedy = f"run `python -m postprocess {fit.recipe.path}` again"
    if agreement.get("agrees") is not True:
        problems.append(f"{file}: no agreement with the trained model; {remedy}")
        return problems

    # Both files hold the probabilities of the golden rows, which differ from package to package.
    if agreement.get("golden") != read_object(folder / MANIFEST).get("golden"):
        problems.append(
            f"{file}: is of another package than {folder}: their golden probabilities differ; {remedy}"
        )
    return problems


def check_wheels_dataset(slug: str) -> list[str]:
    """Check the folder of wheels, the libraries that Kaggle's image lacks: it is there, whole, and for the dataset `slug`."""
    remedy = f"run `python -m postprocess.wheels --slug {slug}`"
    if not WHEELS.is_dir():
        return [f"{WHEELS}: no such folder, but the spec names the dataset {slug}; {remedy}"]

    problems = check_wheels(WHEELS)
    dataset = read_object(WHEELS / METADATA).get("id")
    if str(dataset).split("/")[-1] != slug:
        problems.append(
            f"{WHEELS / METADATA}: id: found {dataset}, but the spec names {slug}; {remedy}"
        )
    return problems


def check_secrets(folders: Sequence[Path], pairs: Sequence[Path]) -> list[str]:
    """Look for secrets, home folders and texts of the pairs in the folders that would be uploaded."""
    # An absent folder is reported by its own check.
    present_folders = [folder for folder in folders if folder.is_dir()]
    problems = []
    for folder in present_folders:
        problems += scan(folder)
    for file in pairs:
        if file.is_file():
            problems += find_rows(present_folders, file)
        else:
            print(f"warning: {file}: not on this machine, so that its rows were not looked for")
    return problems


def check_rehearsal(spec_path: Path, folders: Mapping[str, Path]) -> list[str]:
    """Check that a rehearsal passed, with the kernel and the packages as they are now.

    A rehearsal that passes writes rehearsal.json. `folders` are those of the packages, by dataset.
    """
    file = spec_folder(spec_path) / "rehearsal" / "rehearsal.json"
    remedy = f"run `python -m kaggle_kernels rehearse {spec_path.stem} --test FILE`"
    if not file.is_file():
        return [f"{file}: missing, so that no rehearsal has passed; {remedy}"]

    # Without these files there is nothing to compare; each is reported by its own check.
    manifests = [folder / MANIFEST for folder in folders.values()]
    needed_files = [kernel_folder(spec_path) / CODE, *manifests]
    if not all(path.is_file() for path in needed_files):
        return []

    rehearsed = read_object(file).get("build") or {}
    current = build_of(kernel_folder(spec_path), folders)
    if rehearsed.get("kernel_sha256") != current["kernel_sha256"]:
        return [f"{file}: is of another build of the kernel; {remedy}"]

    problems = []
    for dataset, manifest in current["packages"].items():
        if rehearsed["packages"].get(dataset) != manifest:
            problems.append(
                f"{file}: was with another package for {dataset} than that in {folders[dataset]}; {remedy}"
            )
    return problems
