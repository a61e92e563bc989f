"""One folder becomes one private Kaggle dataset, whose every file is there and whose manifest is the local one.

A version is made of files that Kaggle has received whole, is awaited until Kaggle has processed it, and is compared with the
folder: names, sizes and manifest. A folder that is on Kaggle already is left alone. Whatever goes wrong is one error, and the
next push goes on from what Kaggle has.
"""

import io
import zipfile
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

from kaggle_kernels.publish.client import Kaggle, Refused, ask, list_all
from kaggle_kernels.publish.uploads import (
    DatasetFolder,
    forget_all_uploads,
    forget_uploads,
    read_notes,
    send_files,
)
from postprocess.package import METADATA
from preprocess.core.errors import UserError
from preprocess.core.files import read_object


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
    """Make a folder the current version of its dataset on Kaggle, unless it is that already.

    Returns:
        The number of the dataset's `version`, and as `manifest` the SHA-256 of the file that lists the others.

    Raises:
        UserError: That cannot be done now. The next call goes on from what has arrived.
    """
    # Kaggle may still be processing a version that an earlier push made: any version will do here.
    remote = read_dataset(kaggle, folder)
    if remote:
        remote = wait_until_settled(kaggle, folder, after_version=0)
        check_private(folder, remote)

    is_unchanged = remote is not None and not find_differences(kaggle, folder, remote)
    if is_unchanged:
        print(f"{folder.ref}: unchanged, version {remote.version}", flush=True)
    else:
        remote = publish_version(kaggle, folder, remote)
        print(f"{folder.ref}: version {remote.version} is ready, every file as it is here")
    forget_all_uploads(folder)
    return {"version": remote.version, "manifest": folder.manifest_sha256()}


def publish_version(
    kaggle: Kaggle, folder: DatasetFolder, remote: RemoteDataset | None
) -> RemoteDataset:
    """Upload a folder, and make it the next version of the dataset `remote`, or a new dataset."""
    print(f"{folder.ref}: {folder.describe_size()} to send", flush=True)
    version_before = remote.version if remote else 0
    create_version(kaggle, folder, is_new=remote is None)
    remote = wait_until_settled(kaggle, folder, version_before)
    check_private(folder, remote)

    # The next push compares again, and sends only these files.
    differences = find_differences(kaggle, folder, remote)
    if differences:
        forget_uploads(folder, differences)
        problems = [f"{name} {problem}" for name, problem in sorted(differences.items())]
        raise UserError(
            f"{folder.ref}: version {remote.version} is not what was sent: {', '.join(problems)}; "
            "run this again, which sends that anew"
        )
    return remote


def read_dataset(kaggle: Kaggle, folder: DatasetFolder) -> RemoteDataset | None:
    """Read what Kaggle says of a dataset now; None where there is none."""
    # Kaggle tells the status and the version in two calls.
    status_request = name_dataset(ApiGetDatasetStatusRequest(), folder)
    request = name_dataset(ApiGetDatasetRequest(), folder)
    try:
        answer = ask(kaggle.pace, kaggle.datasets.get_dataset_status, status_request)
        dataset = ask(kaggle.pace, kaggle.datasets.get_dataset, request)
    except Refused as error:
        if error.is_absent:
            return None
        raise
    status = answer.status.name.lower()
    return RemoteDataset(status, dataset.current_version_number, dataset.is_private)


def name_dataset(request, folder: DatasetFolder):
    """Fill in which dataset one of kagglesdk's requests is about."""
    request.owner_slug = folder.owner
    request.dataset_slug = folder.slug
    return request


def wait_until_settled(kaggle: Kaggle, folder: DatasetFolder, after_version: int) -> RemoteDataset:
    """Wait until Kaggle has processed a version after `after_version`, well or not."""
    last_status = None
    for _ in kaggle.pace.looks():
        remote = read_dataset(kaggle, folder)
        if remote and remote.has_settled(after_version):
            return remote

        # Each status is printed once.
        status = remote.status.replace("_", " ") if remote else "not there yet"
        if status != last_status:
            print(f"  {folder.ref}: {status}; waiting for ready", flush=True)
            last_status = status
    raise UserError(
        f"{folder.ref}: {last_status} after {kaggle.pace.patience_seconds:g} s; run this again, "
        "which goes on waiting: nothing goes up twice"
    )


def create_version(kaggle: Kaggle, folder: DatasetFolder, is_new: bool) -> None:
    """Send the files, and have Kaggle make a dataset of them, or a version where it is not new."""
    has_earlier_uploads = bool(read_notes(folder))
    tokens = send_files(kaggle, folder)
    try:
        request_version(kaggle, folder, tokens, is_new)
    except Refused as error:
        # Kaggle deletes files that no dataset took in for a while: those of an earlier push may be gone.
        if has_earlier_uploads and error.status in (400, 404):
            forget_all_uploads(folder)
            remedy = "run this again, which sends every file anew"
        elif error.status == 403:
            remedy = "perhaps another version is still processed: run this again"
        else:
            remedy = "mend that, then run this again: what went up is not sent twice"
        raise UserError(f"{folder.ref}: {error}; {remedy}") from None


def request_version(kaggle: Kaggle, folder: DatasetFolder, tokens: list[str], is_new: bool) -> None:
    """Ask Kaggle for a private dataset, or a version of one, made of files that it has received.

    The call is never repeated. Where its answer is lost, the next push sees whether it took effect.

    Raises:
        Refused: Kaggle refuses it.
        Unanswered: Its answer is lost.
    """
    files = [ApiDatasetNewFile.from_dict({"token": token}) for token in tokens]
    if is_new:
        metadata = read_object(folder.path / METADATA)

        # kagglesdk sends a field only where it was set.
        request = ApiCreateDatasetRequest()
        request.owner_slug = folder.owner
        request.slug = folder.slug
        request.title = metadata["title"]
        request.license_name = metadata["licenses"][0]["name"]
        request.is_private = True
        request.files = files
        answer = kaggle.datasets.create_dataset(request)
    else:
        # The notes tell on Kaggle's page which package a version is.
        body = ApiCreateDatasetVersionRequestBody()
        body.version_notes = f"{folder.manifest} {folder.manifest_sha256()[:12]}"
        body.files = files
        request = name_dataset(ApiCreateDatasetVersionRequest(), folder)
        request.body = body
        answer = kaggle.datasets.create_dataset_version(request)

    # Kaggle puts some errors into an answer with HTTP 200.
    if answer.status == "error" or answer.error:
        raise Refused(answer.error, 200)


def find_differences(
    kaggle: Kaggle, folder: DatasetFolder, remote: RemoteDataset
) -> dict[str, str]:
    """Compare a dataset's current version on Kaggle with the folder here.

    Returns:
        What is wrong with a file, by its name; empty where all files are the same.
    """
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
    if differences:
        return differences

    # The manifest lists the hash of every other file: where it is the same, so are they.
    manifest_here = (folder.path / folder.manifest).read_bytes()
    manifest_there = download_file(kaggle, folder, folder.manifest, remote.version)
    if manifest_there != manifest_here:
        return dict.fromkeys(sizes_here, "may have other content, since the manifest differs")
    return {}


def list_files(kaggle: Kaggle, folder: DatasetFolder, version: int) -> dict[str, int]:
    """List a version's files with their bytes."""
    request = name_dataset(ApiListDatasetFilesRequest(), folder)
    request.dataset_version_number = version
    files = list_all(kaggle.pace, kaggle.datasets.list_dataset_files, request, "dataset_files")
    return {file.name: file.total_bytes for file in files}


def download_file(kaggle: Kaggle, folder: DatasetFolder, name: str, version: int) -> bytes:
    """Download one small file of a version."""
    request = name_dataset(ApiDownloadDatasetRequest(), folder)
    request.dataset_version_number = version
    request.file_name = name
    response: requests.Response = ask(kaggle.pace, kaggle.datasets.download_dataset, request)

    # Kaggle compresses some files on their way.
    if response.content.startswith(b"PK\x03\x04"):
        with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
            return archive.read(archive.namelist()[0])
    return response.content


def check_private(folder: DatasetFolder, remote: RemoteDataset) -> None:
    """Check that nobody else can read the dataset: a competition's models are to be kept to oneself."""
    if not remote.is_private:
        raise UserError(
            f"{folder.ref}: is public on Kaggle; make it private in its settings there, or name "
            "another slug"
        )
