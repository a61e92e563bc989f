"""One folder becomes one private Kaggle dataset, whose every file is there and whose manifest is the local one.

A version is made of files that Kaggle has received whole, is awaited until Kaggle has processed it, and is compared with the
folder: names, sizes and manifest. A folder that is on Kaggle already is left alone.
"""

import io
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass

import requests
from kagglesdk.datasets.types.dataset_api_service import (
    ApiCreateDatasetRequest,
    ApiCreateDatasetVersionRequest,
    ApiCreateDatasetVersionRequestBody,
    ApiDatasetNewFile,
    ApiDownloadDatasetRequest,
    ApiGetDatasetRequest,
    ApiGetDatasetStatusRequest,
    ApiListDatasetFilesRequest,
)

from kaggle_kernels.publish.client import Kaggle, Refused, Unanswered, ask, list_all
from kaggle_kernels.publish.uploads import DatasetFolder, forget_uploads, read_notes, send_files
from postprocess.package import METADATA
from preprocess.core.errors import UserError
from preprocess.core.files import read_object

# How often a new version is tried while Kaggle says 403, as it does until the last version is processed.
BUSY_TRIES = 6

# A version that lacks a file is followed by one more.
VERSIONS_PER_PUSH = 2

DIFFERENCES_SHOWN = 3


@dataclass(frozen=True)
class RemoteDataset:
    """What Kaggle says of a dataset: its status in lower case, and its current version, 0 before the first."""

    status: str
    version: int
    is_private: bool

    def has_settled(self, after_version: int) -> bool:
        """Whether a version after this one is ready, or could not be processed."""
        return self.status == "failed" or (self.status == "ready" and self.version > after_version)


def publish_dataset(kaggle: Kaggle, folder: DatasetFolder) -> dict:
    """Bring Kaggle's dataset up to the folder: created, given a new version, or left as it is.

    Returns:
        Its version and the SHA-256 of its manifest.

    Raises:
        UserError: That cannot be done now. The next call goes on from what has arrived.
    """
    # Nothing goes up into a public dataset, and none is made while a version is processed.
    remote = read_dataset(kaggle, folder)
    if remote:
        if not remote.has_settled(after_version=0):
            remote = wait_until_settled(kaggle, folder, after_version=0)
        check_private(folder, remote)

    # A push that was killed may have made the version already.
    if remote and not find_differences(kaggle, folder, remote):
        print(f"{folder.ref}: unchanged, version {remote.version}", flush=True)
    else:
        remote = publish_version(kaggle, folder, remote)
        files = len(folder.sizes())
        print(f"{folder.ref}: version {remote.version} is ready, {files} files as they are here")
    return {"version": remote.version, "manifest": folder.manifest_sha256()}


def publish_version(
    kaggle: Kaggle, folder: DatasetFolder, remote: RemoteDataset | None
) -> RemoteDataset:
    """Make a version of the folder, and one more where Kaggle lost a file of it."""
    for _ in range(VERSIONS_PER_PUSH):
        print_step(folder, remote)
        version_before = remote.version if remote else 0
        create_version(kaggle, folder, remote)
        remote = wait_until_settled(kaggle, folder, version_before)

        differences = find_differences(kaggle, folder, remote)
        if differences:
            # The list of files may lag behind the status, and another upload takes an hour.
            time.sleep(kaggle.pace.poll_seconds)
            differences = find_differences(kaggle, folder, remote)
        if not differences:
            check_private(folder, remote)
            forget_uploads(folder)
            return remote

        problem = format_differences(differences)
        print(f"{folder.ref}: version {remote.version} is not what was sent: {problem}", flush=True)

        # What came whole is not sent a second time.
        forget_uploads(folder, list(differences))

    forget_uploads(folder)
    raise UserError(f"{folder.ref}: sent twice, and still {problem}; run this again later")


def plan_dataset(kaggle: Kaggle, folder: DatasetFolder) -> tuple[int, bool]:
    """Print what publish_dataset would do: the version that there would be, and whether it is new."""
    remote = read_dataset(kaggle, folder)
    if remote and remote.has_settled(0) and not find_differences(kaggle, folder, remote):
        print(f"{folder.ref}: unchanged, version {remote.version}", flush=True)
        return remote.version, False

    print_step(folder, remote)
    version_before = remote.version if remote else 0
    return version_before + 1, True


def read_dataset(kaggle: Kaggle, folder: DatasetFolder) -> RemoteDataset | None:
    """Read what Kaggle says of a dataset now; None where there is none."""
    # Kaggle tells the status and the version in two calls.
    status_request = ApiGetDatasetStatusRequest()
    status_request.owner_slug = folder.owner
    status_request.dataset_slug = folder.slug
    request = ApiGetDatasetRequest()
    request.owner_slug = folder.owner
    request.dataset_slug = folder.slug

    try:
        answer = ask(kaggle.pace, kaggle.datasets.get_dataset_status, status_request)
        status = answer.status.name.lower()
        dataset = ask(kaggle.pace, kaggle.datasets.get_dataset, request)
    except Refused as error:
        if error.is_absent:
            return None
        raise
    return RemoteDataset(status, dataset.current_version_number, dataset.is_private)


def wait_until_settled(kaggle: Kaggle, folder: DatasetFolder, after_version: int) -> RemoteDataset:
    """Wait until a version after `after_version` is ready or has failed; UserError when the patience is over."""
    # Each status is printed once.
    last_status = None
    for _ in kaggle.pace.looks():
        remote = read_dataset(kaggle, folder)
        if remote and remote.has_settled(after_version):
            return remote

        status = remote.status.replace("_", " ") if remote else "not there yet"
        if status != last_status:
            print(f"  {folder.ref}: {status}; waiting for ready", flush=True)
            last_status = status
    raise UserError(
        f"{folder.ref}: {last_status} after {kaggle.pace.patience_seconds:g} s; run this again, "
        "which goes on waiting: nothing goes up twice"
    )


def create_version(kaggle: Kaggle, folder: DatasetFolder, remote: RemoteDataset | None) -> None:
    """Send the files, and have Kaggle make a dataset or a version of them; UserError where it refuses."""
    is_resumed = bool(read_notes(folder))
    while True:
        tokens = send_files(kaggle, folder)
        try:
            request_version(kaggle, folder, remote, tokens)
            return
        except Refused as error:
            # Kaggle keeps files that no dataset took in for a while only.
            has_expired = is_resumed and error.status in (400, 404)
            if not has_expired:
                raise UserError(
                    f"{folder.ref}: {error}; mend that, then run this again: what went up is not "
                    "sent twice"
                ) from None

            # Files that were sent a moment ago cannot have expired: the second refusal is the last.
            print(f"  {folder.ref}: {error}; every file is sent anew", flush=True)
        forget_uploads(folder)
        is_resumed = False


def request_version(
    kaggle: Kaggle, folder: DatasetFolder, remote: RemoteDataset | None, tokens: list[str]
) -> None:
    """Make one version of files that Kaggle has received."""
    files = []
    for token in tokens:
        file = ApiDatasetNewFile()
        file.token = token
        files.append(file)

    if remote is None:
        method = kaggle.datasets.create_dataset
        request = make_dataset_request(folder, files)
    else:
        method = kaggle.datasets.create_dataset_version
        request = make_version_request(folder, files)

    for attempt in range(1, BUSY_TRIES + 1):
        try:
            answer = ask(kaggle.pace, method, request, changes_something=True)
            break
        except Refused as error:
            is_busy = remote is not None and error.status == 403
            if not is_busy or attempt == BUSY_TRIES:
                raise
            print(f"  {folder.ref}: {error}; perhaps still processed, repeated", flush=True)
            time.sleep(kaggle.pace.pause(attempt))
        except Unanswered:
            # Asking again could make a second version.
            if is_version_there(kaggle, folder, remote):
                return
            raise

    # Kaggle puts some errors into an answer with HTTP 200.
    if answer.status == "error" or answer.error:
        raise Refused(answer.error, 200)


def make_dataset_request(
    folder: DatasetFolder, files: list[ApiDatasetNewFile]
) -> ApiCreateDatasetRequest:
    """Ask for a private dataset of files that Kaggle has received, as dataset-metadata.json describes it."""
    metadata = read_object(folder.path / METADATA)
    request = ApiCreateDatasetRequest()

    # kagglesdk sends a field only where it was set.
    request.owner_slug = folder.owner
    request.slug = folder.slug
    request.title = metadata["title"]
    request.license_name = metadata["licenses"][0]["name"]
    request.is_private = True
    request.files = files
    return request


def make_version_request(
    folder: DatasetFolder, files: list[ApiDatasetNewFile]
) -> ApiCreateDatasetVersionRequest:
    """Ask for a new version of a dataset, of files that Kaggle has received."""
    # The notes tell on Kaggle's page which package a version is.
    body = ApiCreateDatasetVersionRequestBody()
    body.version_notes = f"{folder.manifest} {folder.manifest_sha256()[:12]}"
    body.files = files
    request = ApiCreateDatasetVersionRequest()
    request.owner_slug = folder.owner
    request.dataset_slug = folder.slug
    request.body = body
    return request


def is_version_there(kaggle: Kaggle, folder: DatasetFolder, before: RemoteDataset | None) -> bool:
    """Whether a call whose answer was lost made a version all the same."""
    for _ in kaggle.pace.few_looks():
        if read_dataset(kaggle, folder) != before:
            return True
    return False


def find_differences(
    kaggle: Kaggle, folder: DatasetFolder, remote: RemoteDataset
) -> dict[str, str]:
    """Compare the dataset's current version with the folder: what is wrong with a file, by its name."""
    sizes_here = folder.sizes()
    if remote.status == "failed":
        return dict.fromkeys(sizes_here, "was not processed")

    # Names and sizes first: they cost one call, and tell which files to send again.
    sizes_there = list_files(kaggle, folder, remote.version)

    differences = {}
    for name in sizes_there.keys() - sizes_here.keys():
        differences[name] = "should not be there"
    for name, size in sizes_here.items():
        if name not in sizes_there:
            differences[name] = "is missing"
        elif sizes_there[name] != size:
            differences[name] = f"has {sizes_there[name]} bytes in place of {size}"

    # The manifest has the hash of every other file.
    if not differences:
        manifest_here = (folder.path / folder.manifest).read_bytes()
        if download_file(kaggle, folder, folder.manifest, remote.version) != manifest_here:
            return dict.fromkeys(sizes_here, "is another one, says the manifest")
    return differences


def list_files(kaggle: Kaggle, folder: DatasetFolder, version: int) -> dict[str, int]:
    """List a version's files with their bytes."""
    request = ApiListDatasetFilesRequest()
    request.owner_slug = folder.owner
    request.dataset_slug = folder.slug
    request.dataset_version_number = version
    files = list_all(kaggle.pace, kaggle.datasets.list_dataset_files, request, "dataset_files")
    return {file.name: file.total_bytes for file in files}


def download_file(kaggle: Kaggle, folder: DatasetFolder, name: str, version: int) -> bytes:
    """Download one small file of a version."""
    request = ApiDownloadDatasetRequest()
    request.owner_slug = folder.owner
    request.dataset_slug = folder.slug
    request.dataset_version_number = version
    request.file_name = name
    response: requests.Response = ask(kaggle.pace, kaggle.datasets.download_dataset, request)

    # Kaggle compresses some files on their way.
    if response.content.startswith(b"PK\x03\x04"):
        with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
            return archive.read(archive.namelist()[0])
    return response.content


def format_differences(differences: Mapping[str, str]) -> str:
    """Write the first differences in one line."""
    lines = [f"{name} {problem}" for name, problem in differences.items()]
    text = ", ".join(lines[:DIFFERENCES_SHOWN])
    if len(lines) > DIFFERENCES_SHOWN:
        text += f", and {len(lines) - DIFFERENCES_SHOWN} more"
    return text


def check_private(folder: DatasetFolder, remote: RemoteDataset) -> None:
    """Raise UserError where everybody can read the dataset: a competition's models are to be kept to oneself."""
    if not remote.is_private:
        raise UserError(
            f"{folder.ref}: is public on Kaggle; make it private in its settings there, or name "
            "another slug"
        )


def print_step(folder: DatasetFolder, remote: RemoteDataset | None) -> None:
    """Say how much goes up, and what is made of it."""
    sizes = folder.sizes()
    total = sum(sizes.values())
    size = f"{total / 1e6:.2f} MB"
    if total > 1e9:
        size = f"{total / 1e9:.2f} GB"

    step = f"a new version after version {remote.version}" if remote else "a new private dataset"
    print(f"{folder.ref}: {len(sizes)} files, {size}, {step}", flush=True)
