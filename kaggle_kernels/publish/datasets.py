"""One folder → one private Kaggle dataset, whose every file is there and whose manifest is the local one.

The folder itself is never changed. A package says INSERT_OWNER in dataset-metadata.json, and its manifest.json has the hash of
that: the copy that is sent has the owner in its place. The kaggle command reads that file and leaves it out of the dataset, and
a kernel therefore does not look for it among the files that manifest.json lists.
"""

from pathlib import Path

from kaggle_kernels.publish.client import Pace, call_in_words
from kaggle_kernels.publish.dataset_state import (
    Dataset,
    Remote,
    check_private,
    in_one_line,
    look,
    wait_until_ready,
    what_differs,
)
from kaggle_kernels.publish.upload import forget, forget_upload, upload, upload_call, work_folder
from postprocess.package import METADATA
from preprocess.core.errors import UserError
from preprocess.core.files import read_object

MANIFESTS = ("manifest.json", "wheels.json")


def find_dataset(folder: Path, owner: str) -> Dataset:
    """The dataset that the folder is to be; UserError where the folder is absent, not flat or without a manifest."""
    if not (folder / METADATA).is_file():
        raise UserError(
            f"{folder}: no {METADATA}; make the folder again with python -m postprocess RECIPE, wheels with "
            "python -m postprocess.wheels"
        )
    slug = str(read_object(folder / METADATA).get("id")).split("/")[-1]
    manifest = next((name for name in MANIFESTS if (folder / name).is_file()), None)
    if manifest is None:
        raise UserError(f"{folder}: neither {' nor '.join(MANIFESTS)}; make the folder again")
    if folders := [path.name for path in folder.iterdir() if path.is_dir()]:
        raise UserError(f"{folder}: holds the folder {folders[0]}, which would be left out; remove it")
    return Dataset(folder, f"{owner}/{slug}", manifest)


def publish_dataset(dataset: Dataset, pace: Pace) -> dict:
    """Bring Kaggle's dataset up to the folder: created, given a new version, or left as it is; its version and manifest.

    UserError where that cannot be; the next call then goes on from what went up.
    """
    found = look(dataset.ref, pace)
    if found:
        found = found if found.is_settled(0) else wait_until_ready(dataset.ref, 0, pace)
        check_private(dataset.ref, pace)
    if not found or what_differs(dataset, found, pace):
        found = send(dataset, found, pace)
        print(f"{dataset.ref}: version {found.version} is ready, {len(dataset.sizes())} files as they are here", flush=True)
    else:
        print(f"{dataset.ref}: unchanged, version {found.version}", flush=True)
    return {"version": found.version, "manifest": dataset.manifest_sha256()}


def send(dataset: Dataset, found: Remote | None, pace: Pace) -> Remote:
    """Make a version of the folder, and one more where that lacks a file or has a part of one; UserError if this does too."""
    for _ in range(2):
        print(f"{dataset.ref}: {in_words(dataset)}, {next_step(found)}", flush=True)
        upload(dataset, found, pace)
        found = wait_until_ready(dataset.ref, found.version if found else 0, pace)
        wrong = what_differs(dataset, found, pace)
        if wrong:
            pace.wait_before(1)  # the list may lag behind the status, and another upload takes an hour
            wrong = what_differs(dataset, found, pace)
        if not wrong:
            check_private(dataset.ref, pace)
            forget(dataset)
            return found
        print(f"{dataset.ref}: version {found.version} is not what was sent: {in_one_line(wrong)}", flush=True)
        for name in wrong:
            forget_upload(work_folder(dataset), name)
    forget(dataset)
    raise UserError(f"{dataset.ref}: sent twice, and still {in_one_line(wrong)}; run this again later")


def plan_dataset(dataset: Dataset, pace: Pace) -> tuple[list[str], int]:
    """The calls that publish_dataset would make now to change something and to check it, and the version there will be."""
    found = look(dataset.ref, pace)
    if found and found.is_settled(0) and not what_differs(dataset, found, pace):
        print(f"{dataset.ref}: unchanged, version {found.version}", flush=True)
        return [], found.version
    print(f"{dataset.ref}: {in_words(dataset)}, {next_step(found)}", flush=True)
    checks = (("status", dataset.ref), ("files", dataset.ref), ("download", dataset.ref, "--file", dataset.manifest))
    calls = [upload_call(dataset, found, str(dataset.folder)), *(("datasets", *check) for check in checks)]
    return [call_in_words(arguments) for arguments in calls], (found.version if found else 0) + 1


def in_words(dataset: Dataset) -> str:
    """How much goes up."""
    sizes = dataset.sizes()
    size = sum(sizes.values())
    return f"{len(sizes)} files, {size / 1e9:.2f} GB" if size > 1e9 else f"{len(sizes)} files, {size / 1e6:.2f} MB"


def next_step(found: Remote | None) -> str:
    """What is made of a dataset of which this was found."""
    return f"a new version after version {found.version}" if found else "a new private dataset"
