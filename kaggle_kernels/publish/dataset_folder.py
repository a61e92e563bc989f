"""A folder that is to become a dataset: its owner, its files, and the manifest that tells its content."""

from dataclasses import dataclass
from pathlib import Path

from postprocess.package import MANIFEST, METADATA
from postprocess.wheels.build import MANIFEST as WHEELS_MANIFEST
from preprocess.core.errors import UserError
from preprocess.core.files import read_object, sha256

MANIFESTS = (MANIFEST, WHEELS_MANIFEST)


@dataclass(frozen=True)
class DatasetFolder:
    """A folder that is to be the dataset owner/slug.

    Attributes:
        path: The folder. It is never changed.
        owner: The account.
        slug: The dataset's name, of dataset-metadata.json.
        manifest: The file in it that lists the others with their hashes.
    """

    path: Path
    owner: str
    slug: str
    manifest: str

    @property
    def ref(self) -> str:
        """owner/slug."""
        return f"{self.owner}/{self.slug}"

    def sizes(self) -> dict[str, int]:
        """The bytes of each file that goes up, by name. Kaggle's metadata is read, and not sent."""
        files = [path for path in sorted(self.path.iterdir()) if path.name != METADATA]
        return {path.name: path.stat().st_size for path in files}

    def manifest_sha256(self) -> str:
        """What tells one content of the folder from another."""
        return sha256(self.path / self.manifest)


def find_dataset_folder(path: Path, owner: str) -> DatasetFolder:
    """Find what dataset a folder is to be.

    Raises:
        UserError: The folder is absent, not flat, or has no manifest.
    """
    if not (path / METADATA).is_file():
        raise UserError(
            f"{path}: no {METADATA}; make the folder again with python -m postprocess RECIPE, "
            "wheels with python -m postprocess.wheels"
        )
    manifests = [name for name in MANIFESTS if (path / name).is_file()]
    if not manifests:
        raise UserError(f"{path}: neither {' nor '.join(MANIFESTS)}; make the folder again")
    folders = [inner.name for inner in path.iterdir() if inner.is_dir()]
    if folders:
        raise UserError(
            f"{path}: holds the folder {folders[0]}, which would be left out; remove it"
        )

    slug = str(read_object(path / METADATA).get("id")).split("/")[-1]
    return DatasetFolder(path, owner, slug, manifests[0])
