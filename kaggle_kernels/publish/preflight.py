"""Everything that a push needs, checked before the first byte goes up. All problems are told at once; nothing is changed.

What Kaggle documents is checked here, for its command line ends well on much of it: titles, slugs, licences, sizes, flat
folders. Then what is ours: the build, each package against its manifest, its agreement, the rehearsal of this very build, and
secrets. Whether credentials exist is looked up, what they are is not.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from slugify import slugify as slug_of_kaggle

from kaggle_kernels.build.bundle import kernel_folder, stale_files
from kaggle_kernels.build.memory_fit import BITSANDBYTES, Fit, fit_packages
from kaggle_kernels.build.packages import build_of, find_package, package_folder, spec_folder
from kaggle_kernels.build.spec import Spec, read_spec
from kaggle_kernels.publish import leak_scan
from postprocess.package import MANIFEST, METADATA, OWNER
from postprocess.wheels.build import MANIFEST as WHEELS_MANIFEST
from preprocess.core.errors import UserError
from preprocess.core.files import read_object, sha256
from preprocess.core.ledger import git_state
from recipes.pairwise.config.schema import SLUG

WHEELS = Path("outputs/wheels")
DATASET_BYTES = 200 * 10**9  # Kaggle's documentation: of one dataset, and of all private ones of an account together
TOP_LEVEL_FILES = 50  # of a dataset, as documented
LICENCES = (
    *("apache-2.0", "MIT", "CC0-1.0", "CC-BY-3.0", "CC-BY-3.0-IGO", "CC-BY-4.0", "CC-BY-SA-3.0", "CC-BY-SA-4.0"),
    *("CC-BY-NC-4.0", "CC-BY-NC-SA-3.0-IGO", "CC-BY-NC-SA-4.0", "CC-BY-ND-4.0", "CC-BY-NC-ND-4.0", "GPL-2.0", "GPL-3.0"),
    *("LGPL-3.0", "AGPL-3.0", "FDL-1.3", "ODbL-1.0", "DbCL-1.0", "ODC-BY-1.0", "PDDL", "CDLA-Permissive-1.0"),
    *("CDLA-Sharing-1.0", "US-Government-Works", "EU-ODP-Legal-Notice", "copyright-authors", "other", "unknown"),
)
OWNERS = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class Preflight:
    """A line for each check that was made, every problem, and what is only worth knowing."""

    checks: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def preflight(spec_path: Path, owner: str) -> Preflight:
    """Check what a push of the spec by the account `owner` needs. Bad input is among the errors; nothing is raised for it."""
    report = Preflight()
    check(report, "credentials of the kaggle command", credentials)
    if owner:
        check(report, f"owner {owner}", owner_problems, owner)

    # Without a spec that can be read there is nothing more to check.
    spec = read_and_note(report, str(spec_path), read_spec, spec_path)
    if spec is None:
        return report
    check(report, "title and slug of the kernel", title_problems, spec_path, spec)
    fits = read_and_note(report, "two T4s hold it", fit_packages, spec_path, spec)
    if fits is None:
        fits = []
    else:
        check(report, f"{kernel_folder(spec_path)} is up to date", build_problems, spec_path)

    folders = {package.dataset: package_folder(package.run) for package in spec.packages}
    fit_by_dataset = {fit.package.dataset: fit for fit in fits}
    for dataset, folder in folders.items():
        check(report, f"{folder} is what was packaged", package_problems, folder, dataset, fit_by_dataset.get(dataset))
        check(report, f"{folder}: dataset {dataset}", dataset_problems, folder, dataset)
        check(report, f"{folder.parent / 'agreement.json'}: agreement passed", agreement_problems, folder)
    if spec.wheels:
        check(report, f"{WHEELS}: dataset {spec.wheels}", wheels_problems, spec.wheels, fits)

    uploaded = list(folders.values())
    if spec.wheels:
        uploaded.append(WHEELS)
    uploaded = [folder for folder in uploaded if folder.is_dir()]
    pairs = list(dict.fromkeys(Path(fit.recipe.pairwise.pairs) for fit in fits))
    secrets = "no secret, home path or row of data in what goes up"
    check(report, secrets, secret_problems, [*uploaded, kernel_folder(spec_path)], pairs)
    check(report, "rehearsal of this build passed", rehearsal_problems, spec_path, folders)

    report.warnings.extend(warnings_of(uploaded, pairs))
    report.errors[:] = dict.fromkeys(report.errors)  # two checks may come upon the same problem
    return report


def check(report: Preflight, name: str, find_problems: Callable[..., list[str]], *arguments) -> bool:
    """Make one check and note it; whether it found nothing wrong. A UserError is a problem like the others."""
    try:
        problems = find_problems(*arguments)
    except UserError as error:
        problems = [str(error)]
    note_check(report, name, problems)
    return not problems


def read_and_note(report: Preflight, name: str, read: Callable, *arguments) -> object | None:
    """Read what later checks need, and note as a check whether it can be read; None where it cannot."""
    try:
        value = read(*arguments)
    except UserError as error:
        note_check(report, name, [str(error)])
        return None
    note_check(report, name, [])
    return value


def note_check(report: Preflight, name: str, problems: Sequence[str]) -> None:
    """Write a check down with the problems that it found."""
    report.errors.extend(problems)
    if not problems:
        outcome = "ok"
    elif len(problems) == 1:
        outcome = "1 problem"
    else:
        outcome = f"{len(problems)} problems"
    report.checks.append(f"{name}: {outcome}")


def credentials() -> list[str]:
    """Whether the kaggle command will find credentials, in its order: a token, a key, OAuth. None of them is read."""
    home = Path.home() / ".kaggle"
    folder = Path(os.environ.get("KAGGLE_CONFIG_DIR") or home)
    if not folder.exists():
        folder = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "kaggle"
    files = (home / "access_token", home / "access_token.txt", folder / "kaggle.json", home / "credentials.json")
    in_environment = os.environ.get("KAGGLE_API_TOKEN") or (os.environ.get("KAGGLE_USERNAME") and os.environ.get("KAGGLE_KEY"))
    if in_environment or any(file.is_file() and file.stat().st_size for file in files):
        return []
    return [
        "no credentials of Kaggle (KAGGLE_API_TOKEN, ~/.kaggle/access_token, kaggle.json, KAGGLE_USERNAME and KAGGLE_KEY): "
        "run `kaggle auth login`, or make a token on kaggle.com/settings/api and put it into KAGGLE_API_TOKEN"
    ]


def owner_problems(owner: str) -> list[str]:
    """What is wrong with the account's name."""
    if owner != OWNER and OWNERS.fullmatch(owner):
        return []
    return [f"owner: {owner!r} is no user name of Kaggle; it is the part after kaggle.com/ in the address of your profile"]


def title_problems(spec_path: Path, spec: Spec) -> list[str]:
    """Kaggle makes the slug of the title; where the two part, the kernel lands elsewhere."""
    theirs = slug_of_kaggle(spec.title)
    if theirs != spec.slug:
        return [
            f"{spec_path}: title: {spec.title!r} is {theirs!r} on Kaggle, not {spec.slug!r}; use letters, digits and spaces"
        ]
    return []


def build_problems(spec_path: Path) -> list[str]:
    """Whether the generated kernel is what spec, recipes and runtime give now."""
    return [
        f"{path}: {'not up to date' if path.is_file() else 'not built'}; run `python -m kaggle_kernels build {spec_path.stem}`"
        for path in stale_files(spec_path)
    ]


def package_problems(folder: Path, dataset: str, fit: Fit | None) -> list[str]:
    """Whether the package is there, is the recipe's, is flat, and holds what its manifest lists and nothing else."""
    if not (folder / MANIFEST).is_file():
        recipe = fit.recipe.path if fit else f"the recipe of {dataset}"
        return [f"{folder}: no package; run `python -m postprocess {recipe}`"]
    if fit:
        find_package(fit)
    return content_problems(folder, read_object(folder / MANIFEST).get("files"), MANIFEST)


def content_problems(folder: Path, listed: object, manifest: str) -> list[str]:
    """How the folder's content differs from the manifest's list of {name: {sha256, bytes}}. Every byte is read."""
    if not isinstance(listed, Mapping) or not all(isinstance(facts, Mapping) for facts in listed.values()):
        return [f"{folder / manifest}: files: expected names with sha256 and bytes; make the folder again"]
    told = []
    for path in sorted(folder.iterdir()):
        if not path.is_file():
            told.append(f"{path}: {'a folder' if path.is_dir() else 'no file'}, which the kaggle command leaves out; remove it")
        elif path.name not in {*listed, manifest, METADATA}:
            told.append(f"{path}: not in {manifest}, so that nobody checked it; remove it, or make the folder again")
    for name, facts in listed.items():
        path = folder / name
        if name == METADATA:  # its owner may have been filled in, and no kernel sees it
            continue
        if not path.is_file():
            told.append(f"{path}: missing; make the folder again")
        elif path.stat().st_size != facts.get("bytes") or sha256(path) != facts.get("sha256"):
            told.append(f"{path}: changed since it was made, {manifest} has another size or SHA-256; make the folder again")
    return told


def dataset_problems(folder: Path, dataset: str) -> list[str]:
    """Kaggle's rules for a dataset's metadata and size."""
    if not folder.is_dir():
        return []  # told by the check of its content
    file, told = folder / METADATA, []
    values = read_object(file)
    slug, title, subtitle = str(values.get("id")).split("/")[-1], values.get("title"), values.get("subtitle")
    if slug != dataset:
        told.append(f"{file}: id: found the dataset {slug!r}, the spec says {dataset!r}; package again, or mend the spec")
    for key, text in (("id", slug), ("title", title)):
        if not isinstance(text, str) or not 6 <= len(text) <= 50:
            told.append(f"{file}: {key}: {text!r}, Kaggle takes 6 to 50 characters; change package.slug in the recipe")
    if not re.fullmatch(SLUG, slug):
        told.append(f"{file}: id: {slug!r}, Kaggle takes a to z, digits and single hyphens; change package.slug in the recipe")
    if subtitle and not (isinstance(subtitle, str) and 20 <= len(subtitle) <= 80):
        told.append(f"{file}: subtitle: {len(str(subtitle))} characters, Kaggle takes 20 to 80; change it, or leave it out")
    told += licence_problems(file, values.get("licenses"))
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    if size > DATASET_BYTES:
        told.append(f"{folder}: {size / 1e9:.1f} GB, Kaggle takes {DATASET_BYTES / 1e9:.0f} in a dataset; package fewer bits")
    return told


def licence_problems(file: Path, licences: object) -> list[str]:
    """Kaggle takes exactly one licence, by a name of its own."""
    names = [one.get("name") for one in licences if isinstance(one, Mapping)] if isinstance(licences, list) else []
    if len(names) == 1 and names[0] in LICENCES:
        return []
    alike = [known for known in LICENCES for name in names if str(name).lower() == known.lower()]
    known = f"{alike[0]}?" if alike else ", ".join(LICENCES)
    return [f"{file}: licenses: found {names}, Kaggle takes exactly one of its own names: {known}; set package.licence"]


def agreement_problems(folder: Path) -> list[str]:
    """Whether the comparison with the trained model passed, and was of this package."""
    if not (folder / MANIFEST).is_file():
        return []
    file, again = folder.parent / "agreement.json", "run `python -m postprocess` on its recipe again"
    if not file.is_file():
        return [f"{file}: missing, so that it is unknown whether the package is what was trained; {again}"]
    report = read_object(file)
    if report.get("agrees") is not True:
        return [f"{file}: the package does not agree with the trained model; {again}"]
    if report.get("golden") != read_object(folder / MANIFEST).get("golden"):
        return [f"{file}: is of another package than {folder}, their golden probabilities differ; {again}"]
    return []


def wheels_problems(slug: str, fits: Sequence[Fit]) -> list[str]:
    """Whether the folder of wheels, which the kernel names, is there and whole."""
    if not (WHEELS / WHEELS_MANIFEST).is_file():
        is_needed = any(fit.served.quantize in BITSANDBYTES for fit in fits)
        other = "" if is_needed else ", or take `wheels` out of the spec, which needs none, and build it"
        return [f"{WHEELS}: no wheels, and the spec names the dataset {slug}; run `python -m postprocess.wheels`{other}"]
    wheels = read_object(WHEELS / WHEELS_MANIFEST).get("wheels")
    if not isinstance(wheels, list) or not all(isinstance(wheel, Mapping) and "file" in wheel for wheel in wheels):
        return [f"{WHEELS / WHEELS_MANIFEST}: wheels: expected a list of files; run `python -m postprocess.wheels` again"]
    listed = {str(wheel["file"]): wheel for wheel in wheels}
    return [*content_problems(WHEELS, listed, WHEELS_MANIFEST), *dataset_problems(WHEELS, slug)]


def secret_problems(folders: Sequence[Path], pairs: Sequence[Path]) -> list[str]:
    """Tokens and home paths in the folders, and texts of the pairs that are on this machine."""
    found = [problem for folder in folders for problem in leak_scan.scan(folder)]
    return [*found, *(problem for file in pairs if file.is_file() for problem in leak_scan.rows_in(folders, file))]


def rehearsal_problems(spec_path: Path, folders: Mapping[str, Path]) -> list[str]:
    """Whether the last rehearsal passed, of the kernel as it is built now with the packages as they are now."""
    file = spec_folder(spec_path) / "rehearsal" / "rehearsal.json"
    again = f"run `python -m kaggle_kernels rehearse {spec_path.stem} --test FILE`"
    generated = kernel_folder(spec_path)
    if not file.is_file():
        return [f"{file}: missing: no rehearsal passed; {again}"]
    if not (generated / "kernel.py").is_file() or not all((folder / MANIFEST).is_file() for folder in folders.values()):
        return []  # told by other checks
    rehearsed, now = read_object(file).get("build") or {}, build_of(generated, folders)
    if rehearsed.get("kernel_sha256") != now["kernel_sha256"]:
        return [f"{file}: is of another build of the kernel; {again}"]
    changed = [name for name, manifest in now["packages"].items() if rehearsed.get("packages", {}).get(name) != manifest]
    return [f"{file}: was with another package {name} than {folders[name]}; {again}" for name in changed]


def warnings_of(folders: Sequence[Path], pairs: Sequence[Path] = ()) -> Iterator[str]:
    """What does not hinder a push and may matter later; `folders` are those of the datasets that are there."""
    state = git_state()
    if state["git_commit"] is None:
        yield "no git commit: nothing will tell which code made this push"
    elif state["git_dirty"]:
        yield f"the git tree is dirty: commit first, or the push will lead back to code other than {state['git_commit'][:12]}"
    for file in (file for file in pairs if not file.is_file()):
        yield f"{file}: not on this machine, so that its rows were not looked for in what goes up"
    sizes = [path.stat().st_size for folder in folders for path in folder.iterdir() if path.is_file()]
    if sum(sizes) > DATASET_BYTES:
        yield f"{sum(sizes) / 1e9:.0f} GB in all: Kaggle holds {DATASET_BYTES / 1e9:.0f} GB of private datasets an account"
    for folder in folders:
        if len(list(folder.iterdir())) > TOP_LEVEL_FILES:
            yield f"{folder}: more than {TOP_LEVEL_FILES} files, which Kaggle advises against"
