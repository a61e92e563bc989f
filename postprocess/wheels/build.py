"""Download the wheels that Kaggle's image lacks, as the folder of one Kaggle dataset.

kaggle-wheels.txt pins the wheels with their hashes. `python -m postprocess.wheels` calls this. A
kernel installs from the dataset, after it compared the wheels with wheels.json
(kaggle_kernels/runtime/inputs.py).
"""

import re
import subprocess
import sys
import tempfile
from importlib.metadata import distributions
from pathlib import Path

import click
from packaging.utils import canonicalize_name

from postprocess.package import METADATA, dataset_metadata
from preprocess.core import ledger
from preprocess.core.errors import UserError
from preprocess.core.files import atomic_folder, read_object, sha256, write_json

WHEELS = Path(__file__).with_name("kaggle-wheels.txt")
MANIFEST = "wheels.json"
# Kaggle's names of licences, by SPDX's names, which wheels have.
LICENCES = {"MIT": "MIT", "Apache-2.0": "apache-2.0"}
PYTHON = "3.12"  # of Kaggle's image
# Kaggle's image has glibc 2.35 or newer. pip takes a wheel for an older one only if that is named too.
GLIBC_MINORS = range(35, 4, -1)
OLD_PLATFORMS = ("manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64")
PLATFORMS = [*(f"manylinux_2_{minor}_x86_64" for minor in GLIBC_MINORS), *OLD_PLATFORMS]
FOR_KAGGLE = (
    "--no-deps",
    "--only-binary=:all:",
    f"--python-version={PYTHON}",
    *(f"--platform={platform}" for platform in PLATFORMS),
)


def make_wheels(out: Path, slug: str) -> bool:
    """Bring the dataset's folder up to date, and print its wheels.

    Returns:
        Whether anything had to be made. The folder is replaced as a whole, or left as it was where this fails.

    Raises:
        UserError: A wheel is missing or not the pinned one; or `out` holds something else, which
            would be deleted.
    """
    if out.is_file():
        raise UserError(f"--out {out}: this is a file; name a folder")
    if is_current(out, slug):
        return False

    # The folder is about to be replaced: refuse one that holds somebody's own files.
    for path in out.glob("*"):
        if path.name not in (MANIFEST, METADATA) and path.suffix != ".whl":
            raise UserError(
                f"--out {out}: holds {path.name}, which is no wheel and would be deleted; name an empty folder"
            )

    with atomic_folder(out) as folder:
        # One retry: without network, pip's five take a minute.
        run_pip(
            "download",
            *FOR_KAGGLE,
            "--retries=1",
            "--require-hashes",
            f"--requirement={WHEELS}",
            f"--dest={folder}",
        )
        check_installs(folder)

        manifest = manifest_of(folder)
        licence = kaggle_licence(manifest["wheels"])
        write_json(folder / MANIFEST, manifest)
        write_json(folder / METADATA, dataset_metadata(slug, licence))

    ledger.record(
        "package",
        dataset=slug,
        package=out,
        manifest=ledger.fingerprint(out / MANIFEST),
        wheels=[f"{wheel['name']} {wheel['version']}" for wheel in manifest["wheels"]],
    )
    return True


def is_current(out: Path, slug: str) -> bool:
    """Find out whether a dataset's folder holds exactly the pinned wheels, byte for byte.

    `slug` is the dataset's name. The account, which `push` adds to the metadata, is not compared.
    """
    try:
        title = read_object(out / METADATA)["title"]
        recorded_manifest = read_object(out / MANIFEST)
        manifest = manifest_of(out)
    except (UserError, KeyError, ValueError):  # a file is missing or damaged
        return False

    # The list of pins has the hashes of all files of a version. Each wheel here must be one of them.
    pinned_hashes = WHEELS.read_text(encoding="utf-8")
    for wheel in manifest["wheels"]:
        if wheel["sha256"] not in pinned_hashes:
            return False

    versions = {wheel["name"]: wheel["version"] for wheel in manifest["wheels"]}
    if versions != read_pins(WHEELS):
        return False
    return manifest == recorded_manifest and title == slug


def check_installs(folder: Path) -> None:
    """Check by a dry run of pip that the wheels install from the folder alone, and print them.

    Whether they suit the packages on Kaggle is no question here: kaggle_kernels/requirements.lock resolves
    them together.
    """
    requirements = [f"{name}=={version}" for name, version in read_pins(WHEELS).items()]
    with tempfile.TemporaryDirectory() as target:
        # --isolated ignores the settings of the user's pip, which may name another index or folder.
        run_pip(
            "install",
            "--dry-run",
            *FOR_KAGGLE,
            "--isolated",
            "--no-index",
            f"--find-links={folder}",
            f"--target={target}",
            *requirements,
        )

    for wheel in sorted(folder.glob("*.whl")):
        click.echo(f"{wheel.name}  {wheel.stat().st_size / 1e6:.1f} MB")
    click.echo(f"installs without network in Python {PYTHON} ({PLATFORMS[0]}), by a dry run of pip")


def manifest_of(folder: Path) -> dict:
    """Make the content of wheels.json from the wheels in a folder: what each is, and its SHA-256."""
    wheels = []
    for path in sorted(folder.glob("*.whl")):
        [distribution] = distributions(path=[str(path)])
        metadata = distribution.metadata
        # Some wheels have the whole text of the licence there, others name it in a newer key.
        licence = metadata["License-Expression"] or metadata["License"] or "unknown"
        first_line_of_licence = licence.splitlines()[0]
        wheels.append(
            {
                "name": canonicalize_name(metadata["Name"]),
                "version": metadata["Version"],
                "file": path.name,
                "sha256": sha256(path),
                "bytes": path.stat().st_size,
                "licence": first_line_of_licence,
            }
        )
    return {"python": PYTHON, "platforms": PLATFORMS, "wheels": wheels}


def kaggle_licence(wheels: list[dict]) -> str:
    """Kaggle's name for the licence of all wheels; `other` where they differ or Kaggle has none."""
    # A dataset on Kaggle has exactly one licence.
    licences = {LICENCES.get(wheel["licence"], "other") for wheel in wheels}
    if len(licences) > 1:
        return "other"
    return licences.pop()


def read_pins(path: Path) -> dict[str, str]:
    """Read the versions in the list, by canonical package name; pip checks the rest."""
    # Everything after a version is for pip: hashes, or nothing.
    pins = {}
    text = path.read_text(encoding="utf-8")
    for name, version in re.findall(r"^([\w.-]+)==(\S+)", text, flags=re.MULTILINE):
        pins[canonicalize_name(name)] = version
    return pins


def run_pip(*arguments: str) -> None:
    """Run pip; where it fails, its warnings and errors become the one line of a UserError."""
    command = [sys.executable, "-m", "pip", *arguments, "--disable-pip-version-check", "--no-input"]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode == 0:
        return

    # pip writes its warnings and errors to stderr, in several lines.
    problems = " ".join(finished.stderr.split())
    raise UserError(
        f"{WHEELS.name}: pip {arguments[0]} for Python {PYTHON} on Linux failed: {problems}; check the "
        "network (or set PIP_INDEX_URL), or pin another wheel"
    )
