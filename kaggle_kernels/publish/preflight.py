"""Everything that a push needs, checked before the first byte goes up. All problems are told at once; nothing is changed.

First Kaggle's documented rules: titles, slugs, licences, sizes. Then what is ours: the build, the files of each package, its
agreement, the rehearsal of this very build, and secrets.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kagglesdk.kernels.types.kernels_api_service import ApiGetAcceleratorQuotaStatisticsRequest
from rich.box import SIMPLE_HEAD
from rich.table import Table
from slugify import slugify as slug_of_kaggle

from kaggle_kernels.build.bundle import kernel_folder, stale_files
from kaggle_kernels.build.listing import table_console
from kaggle_kernels.build.memory_fit import BITSANDBYTES, Fit, fit_packages
from kaggle_kernels.build.packages import build_of, find_package, package_folder, spec_folder
from kaggle_kernels.build.spec import Spec, read_spec
from kaggle_kernels.publish.client import Kaggle, Pace, Refused, ask, connect
from kaggle_kernels.publish.kernels import CODE
from kaggle_kernels.publish.kernels import METADATA as KERNEL_METADATA
from kaggle_kernels.publish.leak_scan import find_rows, scan
from kaggle_kernels.publish.package_files import check_package, check_wheels
from postprocess.package import MANIFEST, METADATA, OWNER
from postprocess.wheels.build import MANIFEST as WHEELS_MANIFEST
from preprocess.core.errors import UserError
from preprocess.core.files import read_object
from preprocess.core.ledger import git_state
from recipes.pairwise.config.schema import SLUG

SECONDS_PER_HOUR = 3600
FEW_HOURS = 1.0

WHEELS = Path("outputs/wheels")
# Kaggle's documentation: of one dataset, and of all private ones of an account together.
DATASET_BYTES = 200 * 10**9
KERNEL_FILES = (CODE, KERNEL_METADATA)
# Kaggle's names.
LICENCES = (
    *("apache-2.0", "MIT", "CC0-1.0", "CC-BY-3.0", "CC-BY-3.0-IGO", "CC-BY-4.0", "CC-BY-SA-3.0"),
    *("CC-BY-SA-4.0", "CC-BY-NC-4.0", "CC-BY-NC-SA-3.0-IGO", "CC-BY-NC-SA-4.0", "CC-BY-ND-4.0"),
    *("CC-BY-NC-ND-4.0", "GPL-2.0", "GPL-3.0", "LGPL-3.0", "AGPL-3.0", "FDL-1.3", "ODbL-1.0"),
    *("DbCL-1.0", "ODC-BY-1.0", "PDDL", "CDLA-Permissive-1.0", "CDLA-Sharing-1.0"),
    *("US-Government-Works", "EU-ODP-Legal-Notice", "copyright-authors", "other", "unknown"),
)
OWNERS = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class Quota:
    """The hours of one kind of accelerator, and until when they count."""

    hours_used: float
    hours_allowed: float
    until: str

    @property
    def hours_left(self) -> float:
        """What is left of the week's hours."""
        return max(self.hours_allowed - self.hours_used, 0.0)


@dataclass(frozen=True)
class Preflight:
    """A line for each check that was made, every problem, and what is only worth knowing."""

    checks: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def preflight(spec_path: Path, owner: str) -> Preflight:
    """Check what a push of a spec needs; `owner` is empty where there is no account.

    Returns:
        All checks, errors and warnings. Bad input is among the errors; nothing is raised for it.
    """
    report = Preflight()
    if owner:
        check(report, f"owner {owner}", check_owner, owner)

    # Without a spec that can be read there is nothing more to check.
    spec = read_and_note(report, str(spec_path), read_spec, spec_path)
    if spec is None:
        return report
    check(report, "title and slug of the kernel", check_title, spec_path, spec)
    fits = read_and_note(report, "two T4s hold it", fit_packages, spec_path, spec)
    if fits is None:
        fits = []
    else:
        check(report, f"{kernel_folder(spec_path)} is up to date", check_build, spec_path)

    # By dataset: a package whose recipe cannot be read has no fit, and is checked all the same.
    folders = {package.dataset: package_folder(package.run) for package in spec.packages}
    fit_by_dataset = {fit.package.dataset: fit for fit in fits}
    for dataset, folder in folders.items():
        check(
            report,
            f"{folder} is what was packaged",
            check_package_files,
            folder,
            dataset,
            fit_by_dataset.get(dataset),
        )
        check(report, f"{folder}: dataset {dataset}", check_dataset, folder, dataset)
        check(
            report, f"{folder.parent / 'agreement.json'}: agreement passed", check_agreement, folder
        )
    if spec.wheels:
        check(report, f"{WHEELS}: dataset {spec.wheels}", check_wheels_dataset, spec.wheels, fits)

    # Everything that leaves this machine, as far as it is there: what is absent is told above.
    uploaded = [*folders.values(), kernel_folder(spec_path)]
    if spec.wheels:
        uploaded.append(WHEELS)
    scanned = [folder for folder in uploaded if folder.is_dir()]
    pairs = list(dict.fromkeys(Path(fit.recipe.pairwise.pairs) for fit in fits))
    secrets = "no secret, home path or row of data in what goes up"
    check(report, secrets, check_secrets, scanned, pairs)
    check(report, "rehearsal of this build passed", check_rehearsal, spec_path, folders)

    # Two checks may come upon the same problem.
    report.warnings.extend(find_warnings(pairs))
    report.errors[:] = dict.fromkeys(report.errors)
    return report


def check(
    report: Preflight, name: str, find_problems: Callable[..., list[str]], *arguments
) -> None:
    """Make one check and note it. A UserError is a problem like the others."""
    try:
        problems = find_problems(*arguments)
    except UserError as error:
        problems = [str(error)]
    note_check(report, name, problems)


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


def check_owner(owner: str) -> list[str]:
    """Check the account's name."""
    if owner != OWNER and OWNERS.fullmatch(owner):
        return []
    return [
        f"owner: {owner!r} is no user name of Kaggle; it is the part after kaggle.com/ in the address "
        "of your profile"
    ]


def check_title(spec_path: Path, spec: Spec) -> list[str]:
    """Check that Kaggle makes the kernel's slug of its title: else the kernel lands elsewhere."""
    slug_on_kaggle = slug_of_kaggle(spec.title)
    if slug_on_kaggle == spec.slug:
        return []
    return [
        f"{spec_path}: title: {spec.title!r} is {slug_on_kaggle!r} on Kaggle, not {spec.slug!r}; use "
        "letters, digits and spaces"
    ]


def check_build(spec_path: Path) -> list[str]:
    """Check that the generated kernel is what spec, recipes and runtime give now, and has no other file."""
    problems = []
    stale = stale_files(spec_path)
    for path in stale:
        state = "not up to date" if path.is_file() else "not built"
        problems.append(f"{path}: {state}; run `python -m kaggle_kernels build {spec_path.stem}`")
    for path in sorted(kernel_folder(spec_path).glob("*")):
        if path.name not in KERNEL_FILES:
            problems.append(f"{path}: no file of a kernel; remove it")
    return problems


def check_package_files(folder: Path, dataset: str, fit: Fit | None) -> list[str]:
    """Check that the package is there, is the recipe's, and holds what a package holds and nothing else."""
    if not (folder / MANIFEST).is_file():
        recipe = fit.recipe.path if fit else f"the recipe of {dataset}"
        return [f"{folder}: no package; run `python -m postprocess {recipe}`"]
    if fit:
        find_package(fit)
    return check_package(folder)


def check_dataset(folder: Path, dataset: str) -> list[str]:
    """Check Kaggle's rules for a dataset's metadata and size."""
    # An absent folder is told by the check of its content.
    if not folder.is_dir():
        return []
    file = folder / METADATA
    values = read_object(file)
    slug = str(values.get("id")).split("/")[-1]

    problems = []
    if slug != dataset:
        problems.append(
            f"{file}: id: found the dataset {slug!r}, the spec says {dataset!r}; package again, or "
            "mend the spec"
        )
    for key, text in (("id", slug), ("title", values.get("title"))):
        if not isinstance(text, str) or not 6 <= len(text) <= 50:
            problems.append(
                f"{file}: {key}: {text!r}, Kaggle takes 6 to 50 characters; change package.slug in "
                "the recipe"
            )
    if not re.fullmatch(SLUG, slug):
        problems.append(
            f"{file}: id: {slug!r}, Kaggle takes a to z, digits and single hyphens; change "
            "package.slug in the recipe"
        )
    problems.extend(check_licences(file, values.get("licenses")))

    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    if size > DATASET_BYTES:
        problems.append(
            f"{folder}: {size / 1e9:.1f} GB, Kaggle takes {DATASET_BYTES / 1e9:.0f} in a dataset; "
            "package fewer bits"
        )
    return problems


def check_licences(file: Path, licences: object) -> list[str]:
    """Check that there is exactly one licence, by a name of Kaggle's own."""
    names = []
    if isinstance(licences, list):
        names = [licence.get("name") for licence in licences if isinstance(licence, Mapping)]
    if len(names) == 1 and names[0] in LICENCES:
        return []
    return [
        f"{file}: licenses: found {names}, Kaggle takes exactly one of its own names: "
        f"{', '.join(LICENCES)}; set package.licence"
    ]


def check_agreement(folder: Path) -> list[str]:
    """Check that the comparison with the trained model passed, and was of this package."""
    if not (folder / MANIFEST).is_file():
        return []
    file = folder.parent / "agreement.json"
    remedy = "run `python -m postprocess` on its recipe again"
    if not file.is_file():
        return [
            f"{file}: missing, so that it is unknown whether the package is what was trained; {remedy}"
        ]

    # The golden rows' probabilities tell which package the report is of.
    report = read_object(file)
    if report.get("agrees") is not True:
        return [f"{file}: the package does not agree with the trained model; {remedy}"]
    if report.get("golden") != read_object(folder / MANIFEST).get("golden"):
        return [
            f"{file}: is of another package than {folder}, their golden probabilities differ; {remedy}"
        ]
    return []


def check_wheels_dataset(slug: str, fits: Sequence[Fit]) -> list[str]:
    """Check that the folder of wheels, which the kernel names, is there and whole."""
    if (WHEELS / WHEELS_MANIFEST).is_file():
        return [*check_wheels(WHEELS), *check_dataset(WHEELS, slug)]

    # Only what bitsandbytes quantised needs a wheel.
    remedy = "run `python -m postprocess.wheels`"
    if not any(fit.served.quantize in BITSANDBYTES for fit in fits):
        remedy += ", or take `wheels` out of the spec, which needs none, and build it"
    return [f"{WHEELS}: no wheels, and the spec names the dataset {slug}; {remedy}"]


def check_secrets(folders: Sequence[Path], pairs: Sequence[Path]) -> list[str]:
    """Look for tokens and home paths in the folders, and for texts of the pairs that are on this machine."""
    problems = []
    for folder in folders:
        problems.extend(scan(folder))
    for file in pairs:
        if file.is_file():
            problems.extend(find_rows(folders, file))
    return problems


def check_rehearsal(spec_path: Path, folders: Mapping[str, Path]) -> list[str]:
    """Check that the last rehearsal passed, of the kernel as it is built now with the packages as they are now."""
    file = spec_folder(spec_path) / "rehearsal" / "rehearsal.json"
    remedy = f"run `python -m kaggle_kernels rehearse {spec_path.stem} --test FILE`"
    if not file.is_file():
        return [f"{file}: missing: no rehearsal passed; {remedy}"]

    # What is absent is told by other checks.
    generated = kernel_folder(spec_path)
    manifests = [folder / MANIFEST for folder in folders.values()]
    if not all(path.is_file() for path in (generated / CODE, *manifests)):
        return []

    rehearsed = read_object(file).get("build") or {}
    current = build_of(generated, folders)
    if rehearsed.get("kernel_sha256") != current["kernel_sha256"]:
        return [f"{file}: is of another build of the kernel; {remedy}"]
    problems = []
    for name, manifest in current["packages"].items():
        if rehearsed.get("packages", {}).get(name) != manifest:
            problems.append(
                f"{file}: was with another package {name} than {folders[name]}; {remedy}"
            )
    return problems


def find_warnings(pairs: Sequence[Path]) -> list[str]:
    """List what does not hinder a push and may matter later; `pairs` are where the recipes' pairs should be."""
    warnings = []
    state = git_state()
    if state["git_commit"] is None:
        warnings.append("no git commit: nothing will tell which code made this push")
    elif state["git_dirty"]:
        warnings.append(
            "the git tree is dirty: commit first, or the push will lead back to code other than "
            f"{state['git_commit'][:12]}"
        )
    for file in pairs:
        if not file.is_file():
            warnings.append(
                f"{file}: not on this machine, so that its rows were not looked for in what goes up"
            )
    return warnings


def read_quotas(kaggle: Kaggle) -> dict[str, Quota]:
    """Read the week's hours of each kind of accelerator that Kaggle names."""
    request = ApiGetAcceleratorQuotaStatisticsRequest()
    answer = ask(kaggle.pace, kaggle.kernels.get_accelerator_quota_statistics, request)
    until = "?"
    if answer.quota_refresh_time:
        until = f"{answer.quota_refresh_time:%Y-%m-%d %H:%M} UTC"

    # Kaggle leaves out what an account has no right to.
    quotas = {}
    for name, values in (("GPU", answer.gpu_quota), ("TPU", answer.tpu_quota)):
        if values is not None and values.total_time_allowed is not None:
            used = values.time_used.total_seconds() / SECONDS_PER_HOUR if values.time_used else 0.0
            allowed = values.total_time_allowed.total_seconds() / SECONDS_PER_HOUR
            quotas[name] = Quota(used, allowed, until)
    return quotas


def print_quota(pace: Pace) -> None:
    """Print a table with the hours of each kind of accelerator."""
    table = Table(
        "accelerator", "hours used", "hours left", "until", box=SIMPLE_HEAD, pad_edge=False
    )
    for name, quota in read_quotas(connect(pace)).items():
        table.add_row(name, f"{quota.hours_used:.2f}", f"{quota.hours_left:.2f}", quota.until)
    table_console().print(table)


def check_gpu_hours(kaggle: Kaggle, report: Preflight) -> None:
    """Add to a push's checks how many GPU hours are left, with a warning where they are few or unknown."""
    try:
        quota = read_quotas(kaggle).get("GPU")
    except Refused as error:
        report.warnings.append(f"GPU hours: not known ({error})")
        return
    if quota is None:
        report.warnings.append("GPU hours: not known (Kaggle names none)")
        return

    # Never an error: Kaggle may know more when the kernel is pushed.
    left = f"{quota.hours_left:g} of {quota.hours_allowed:g} left until {quota.until}"
    report.checks.append(f"GPU hours: {left}")
    if quota.hours_left == 0:
        report.warnings.append(
            f"GPU hours: {left}: Kaggle will take the datasets, and refuse the kernel until then"
        )
    elif quota.hours_left < FEW_HOURS:
        report.warnings.append(f"GPU hours: {left}; a kernel that reaches the end is stopped")
