"""A dataset as it is here and as Kaggle has it: status, files, sizes, manifest, compared."""

import json
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kaggle_kernels.publish.client import Pace, ask, demand, list_files
from postprocess.package import METADATA
from preprocess.core.errors import UserError
from preprocess.core.files import sha256


@dataclass(frozen=True)
class Dataset:
    """A folder that is to be the dataset `ref` (owner/slug); `manifest` is the file in it that tells its content."""

    folder: Path
    ref: str
    manifest: str

    def sizes(self) -> dict[str, int]:
        """The bytes of each file that goes up, by name."""
        files = [path for path in sorted(self.folder.iterdir()) if path.name != METADATA]
        return {path.name: path.stat().st_size for path in files}

    def manifest_sha256(self) -> str:
        """What one version of it is told from another by."""
        return sha256(self.folder / self.manifest)


@dataclass(frozen=True)
class Remote:
    """What Kaggle says of a dataset: its status in lower case, and the number of its current version, 0 before the first."""

    status: str
    version: int

    def is_settled(self, after: int) -> bool:
        """Whether a version after `after` is ready, or could not be processed."""
        return self.status == "failed" or (self.status == "ready" and self.version > after)


def look(ref: str, pace: Pace) -> Remote | None:
    """What Kaggle says of a dataset now; None where there is none."""
    answer = ask(pace, "datasets", "status", ref, "--format", "json")
    if answer.is_absent:
        return None
    values = answer.values()
    if answer.code or not isinstance(values, dict) or "status" not in values:
        raise UserError(f"{answer.call}: {answer.reason}")
    return Remote(str(values["status"]).lower(), int(values.get("current_version_number") or 0))


def wait_until_ready(ref: str, after: int, pace: Pace) -> Remote:
    """The dataset once a version after `after` is ready, or could not be processed; UserError when the patience is over."""
    found, told = None, None
    for _ in pace.looks():
        found = look(ref, pace)
        if found and found.is_settled(after):
            return found
        status = found.status if found else "not there yet"
        if status != told:
            print(f"  {ref}: {status.replace('_', ' ')}; waiting for ready", flush=True)
            told = status
    raise UserError(
        f"{ref}: {(told or 'not there').replace('_', ' ')} after {pace.patience_seconds:g} s; run this again, which goes on "
        "waiting: nothing goes up twice"
    )


def what_differs(dataset: Dataset, found: Remote | None, pace: Pace) -> dict[str, str]:
    """How the dataset's current version differs from the folder: a file's name, and what is wrong with it."""
    here = dataset.sizes()
    if found is None or found.status == "failed":
        return dict.fromkeys(here, "was not processed" if found else "is not there yet")
    there = list_files(pace, "datasets", dataset.ref)
    wrong = {name: "should not be there" for name in there if name not in here}
    wrong |= {name: "is missing" for name in here if name not in there}
    sizes = {name: (there[name], size) for name, size in here.items() if there.get(name, size) != size}
    wrong |= {name: f"has {found} bytes in place of {expected}" for name, (found, expected) in sizes.items()}
    if not wrong and remote_manifest(dataset, pace) != (dataset.folder / dataset.manifest).read_bytes():
        wrong = dict.fromkeys(here, "is another one, says the manifest")
    return wrong


def in_one_line(wrong: Mapping[str, str]) -> str:
    """The first of what is wrong."""
    told = [f"{name} {what}" for name, what in wrong.items()]
    return ", ".join(told[:3]) + f", and {len(told) - 3} more" * (len(told) > 3)


def remote_manifest(dataset: Dataset, pace: Pace) -> bytes:
    """The manifest of the dataset's current version, which has one."""
    with tempfile.TemporaryDirectory() as folder:
        place = ("--file", dataset.manifest, "--path", folder, "--force", "--quiet")
        answer = demand(pace, "datasets", "download", dataset.ref, *place)
        arrived = [path for path in Path(folder).iterdir() if path.name.startswith(dataset.manifest)]
        if not arrived:
            raise UserError(f"{answer.call}: {answer.reason}; expected {dataset.manifest}")
        if zipfile.is_zipfile(arrived[0]):  # Kaggle compresses some files on their way
            with zipfile.ZipFile(arrived[0]) as archive:
                return archive.read(archive.namelist()[0])
        return arrived[0].read_bytes()


def check_private(ref: str, pace: Pace) -> None:
    """Raise UserError where everybody can read the dataset: a competition's models are to be kept to oneself."""
    with tempfile.TemporaryDirectory() as folder:
        demand(pace, "datasets", "metadata", ref, "--path", folder)
        text = (Path(folder) / METADATA).read_text(encoding="utf-8")
        values = json.loads(text)
    if isinstance(values, str):  # some versions write the object as a string
        values = json.loads(values)
    if not values.get("info", values).get("isPrivate"):
        raise UserError(f"{ref}: is public on Kaggle; make it private in its settings there, or name another slug")
