"""`python -m postprocess.wheels`: the wheels that Kaggle's image lacks → the folder of one Kaggle dataset.

kaggle-wheels.txt lists them, kaggle-image.txt what they may rely on. Each is downloaded for Kaggle's Python, refused unless
its SHA-256 is in the list, and installed in a dry run as a kernel does it. A folder that is up to date is left as it is.
Exit code 2, after one line, for what the user can mend.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from email.parser import HeaderParser
from pathlib import Path
from zipfile import BadZipFile, ZipFile

import click
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename

from postprocess.package import METADATA, dataset_metadata
from postprocess.wheels.pip import PLATFORMS, PYTHON, download, dry_run
from preprocess.core import ledger
from preprocess.core.errors import UserError, exits_with_2
from preprocess.core.files import atomic_folder, read_object, sha256, write_json
from recipes.pairwise.config.schema import SLUG

WHEELS = Path(__file__).with_name("kaggle-wheels.txt")
IMAGE = Path(__file__).with_name("kaggle-image.txt")
MANIFEST = "wheels.json"
PIN = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9.!+_-]+)")
HASH = re.compile(r"--hash=sha256:(?P<sha256>[0-9a-f]{64})")
LICENCES = {"MIT": "MIT", "Apache-2.0": "apache-2.0"}  # SPDX's name: Kaggle's
MARKERS = {
    "python_version": PYTHON,
    "python_full_version": f"{PYTHON}.0",
    "implementation_name": "cpython",
    "platform_python_implementation": "CPython",
    "sys_platform": "linux",
    "platform_system": "Linux",
    "platform_machine": "x86_64",
    "os_name": "posix",
    "extra": "",
}


@dataclass(frozen=True)
class Pin:
    """One line of a list: a package by its canonical name, its version, and the SHA-256s that its wheel may have."""

    name: str
    version: str
    hashes: tuple[str, ...]


@dataclass(frozen=True)
class Wheel:
    """A wheel as wheels.json lists it; `licence` is SPDX's name, or what the wheel says in its place."""

    name: str
    version: str
    file: str
    sha256: str
    bytes: int
    licence: str


@click.command(help=__doc__)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("outputs/wheels"), show_default=True
)
@click.option(
    "--slug",
    default="pairwise-wheels",
    show_default=True,
    help="The dataset's slug, as specs name it.",
)
@exits_with_2
def main(out: Path, slug: str) -> None:
    if not re.fullmatch(SLUG, slug) or not 6 <= len(slug) <= 50:
        raise UserError(
            f"--slug: {slug!r}; Kaggle takes 6 to 50 of the letters a to z, digits, and single hyphens between them"
        )
    pins = read_pins(WHEELS, hashed=True)
    made = make_wheels(
        out, slug, pins, {pin.name: pin.version for pin in read_pins(IMAGE, hashed=False)}
    )
    click.echo(f"{out}: {f'{len(pins)} of {len(pins)} wheels made' if made else 'up to date'}")
    click.echo(
        "next: python -m kaggle_kernels push SPEC, which uploads it for every spec that names it"
    )


def make_wheels(out: Path, slug: str, pins: Sequence[Pin], image: Mapping[str, str]) -> bool:
    """Bring the folder `out` up to date with the list, print its wheels; whether anything had to be made.

    `image` holds versions by package, as Kaggle has them. Raises UserError, and leaves `out` as it was, where a wheel
    cannot be had, is another than was pinned, does not install, or contradicts the image.
    """
    if is_current(out, slug, pins):
        check(out, pins, image)
        return False
    refuse_foreign(out)
    with atomic_folder(out) as folder:
        for pin in pins:
            click.echo(f"downloading {pin.name} {pin.version}")
            download(pin.name, pin.version, pin.hashes, folder)
        wheels = check(folder, pins, image)
        write_json(folder / MANIFEST, manifest(wheels))
        write_json(folder / METADATA, dataset_metadata(slug, licence(wheels)))
    names = [f"{wheel.name} {wheel.version}" for wheel in wheels]
    ledger.record(
        "package",
        dataset=slug,
        package=out,
        manifest=ledger.fingerprint(out / MANIFEST),
        wheels=names,
    )
    return True


def read_pins(path: Path, hashed: bool) -> list[Pin]:
    """The packages in a list in pip's format: NAME==VERSION, with `hashed` one --hash=sha256:… or more behind it."""
    expected = "NAME==VERSION" + (" --hash=sha256:… (64 hexadecimal digits)" if hashed else "")
    pins: dict[str, Pin] = {}
    for line in path.read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
        words = re.sub(r"(^|\s)#.*", "", line).split()
        if not words:
            continue
        pin, hashes = PIN.fullmatch(words[0]), [HASH.fullmatch(word) for word in words[1:]]
        if not pin or not all(hashes) or bool(hashes) != hashed:
            raise UserError(f"{path}: {' '.join(words)!r}; expected {expected}")
        name = canonicalize_name(pin["name"])
        if name in pins:
            raise UserError(f"{path}: {name} is listed twice; remove one")
        pins[name] = Pin(name, pin["version"], tuple(found["sha256"] for found in hashes))
    if not pins:
        raise UserError(f"{path}: lists nothing; expected {expected}")
    return list(pins.values())


def is_current(out: Path, slug: str, pins: Sequence[Pin]) -> bool:
    """Whether `out` holds the listed wheels, byte for byte, and nothing else; its owner may be filled in."""
    try:
        metadata, listed = read_object(out / METADATA), read_object(out / MANIFEST)
        wheels = find_wheels(out, pins)
    except UserError:
        return False
    files = {MANIFEST, METADATA, *(wheel.file for wheel in wheels)}
    return (
        listed == manifest(wheels)
        and metadata.get("title") == slug
        and {path.name for path in out.iterdir()} == files
    )


def refuse_foreign(out: Path) -> None:
    """Raise UserError where `out` is a folder of something else, which making it anew would remove."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: a file; name a folder")
    names = sorted(path.name for path in out.iterdir()) if out.exists() else []
    if foreign := [
        name for name in names if name not in (MANIFEST, METADATA) and not name.endswith(".whl")
    ]:
        raise UserError(
            f"--out {out}: holds {', '.join(foreign[:3])}, which is no wheel; name a folder of its own"
        )


def find_wheels(folder: Path, pins: Sequence[Pin]) -> list[Wheel]:
    """The wheel of each pin in `folder`; a UserError where one is absent, twice there, or another than was pinned."""
    found: dict[tuple[str, str], list[Path]] = {}
    for path in sorted(folder.glob("*.whl")):
        try:
            name, version, _, _ = parse_wheel_filename(path.name)
        except InvalidWheelFilename as error:
            raise UserError(f"{folder}: {error}; remove it") from None
        found.setdefault((name, str(version)), []).append(path)
    wheels = []
    for pin in pins:
        paths = found.get((pin.name, pin.version), [])
        if len(paths) != 1:
            raise UserError(
                f"{pin.name} {pin.version}: {len(paths)} wheels in {folder}, expected one; remove the folder"
            )
        digest = sha256(paths[0])
        if digest not in pin.hashes:
            raise UserError(
                f"{paths[0]}: its SHA-256 is {digest[:12]}…, which {WHEELS.name} does not list; remove the file"
            )
        size, facts = paths[0].stat().st_size, metadata_of(paths[0])
        licence = facts["License-Expression"] or facts["License"] or "unknown"
        wheels.append(
            Wheel(pin.name, pin.version, paths[0].name, digest, size, licence.splitlines()[0])
        )
    return wheels


def metadata_of(path: Path):
    """The headers of a wheel's METADATA, as an email.message.Message."""
    try:
        with ZipFile(path) as archive:
            [name] = [
                name
                for name in archive.namelist()
                if re.fullmatch(r"[^/]+\.dist-info/METADATA", name)
            ]
            return HeaderParser().parsestr(archive.read(name).decode("utf-8"))
    except (BadZipFile, ValueError) as error:
        raise UserError(
            f"{path.name}: no wheel ({error}); pin another file in {WHEELS.name}"
        ) from None


def check(folder: Path, pins: Sequence[Pin], image: Mapping[str, str]) -> list[Wheel]:
    """The wheels in `folder`, printed; a UserError where one does not install or contradicts the image."""
    wheels = find_wheels(folder, pins)
    pinned = {pin.name: pin.version for pin in pins}
    for wheel in wheels:
        click.echo(f"{wheel.file}  {wheel.bytes / 1e6:.1f} MB  sha256 {wheel.sha256[:12]}")
        for requirement in requirements(folder / wheel.file):
            click.echo(
                f"  needs {requirement.name}{requirement.specifier}: {answer(wheel, requirement, image, pinned)}"
            )
    dry_run(folder, [f"{wheel.name}=={wheel.version}" for wheel in wheels])
    click.echo(f"installs without network in Python {PYTHON} ({PLATFORMS[0]}), by a dry run of pip")
    return wheels


def requirements(wheel: Path) -> list[Requirement]:
    """What a wheel requires on Kaggle's machine, without extras."""
    try:
        found = [Requirement(text) for text in metadata_of(wheel).get_all("Requires-Dist", [])]
    except InvalidRequirement as error:
        raise UserError(
            f"{wheel.name}: {' '.join(str(error).split())}; pin another version in {WHEELS.name}"
        ) from None
    return [one for one in found if one.marker is None or one.marker.evaluate(MARKERS)]


def answer(
    wheel: Wheel, requirement: Requirement, image: Mapping[str, str], pinned: Mapping[str, str]
) -> str:
    """Where a requirement is met, in words; a UserError where the version there contradicts it."""
    name = canonicalize_name(requirement.name)
    version, where = (
        (pinned[name], WHEELS.name) if name in pinned else (image.get(name), "Kaggle's image")
    )
    if version is None:
        return f"expected in {where}"
    if not requirement.specifier.contains(version, prereleases=True):
        raise UserError(
            f"{wheel.file}: needs {requirement.name}{requirement.specifier}, but {where} has {version}; pin another version of "
            f"{wheel.name} in {WHEELS.name}"
        )
    return f"{version} in {where}"


def manifest(wheels: Sequence[Wheel]) -> dict:
    """The content of wheels.json, by which a kernel knows the wheels that it is about to install."""
    return {
        "python": PYTHON,
        "platforms": list(PLATFORMS),
        "wheels": [asdict(wheel) for wheel in wheels],
    }


def licence(wheels: Sequence[Wheel]) -> str:
    """Kaggle's name of the licence that all wheels have, `other` where they differ or Kaggle has no name for it."""
    [first, *others] = {LICENCES.get(wheel.licence, "other") for wheel in wheels}
    return "other" if others else first


if __name__ == "__main__":
    main()
