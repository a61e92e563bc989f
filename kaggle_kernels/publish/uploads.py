"""A folder that is to become a dataset, and its files sent to Kaggle, each resumed where the server says that it stands.

An upload is Google's resumable one: kagglesdk gives an address, `PUT` sends bytes, and a `PUT` with
`Content-Range: bytes */SIZE` asks how many have arrived. Where a file was going, and the token by which a dataset takes it in,
are noted in outputs/.push, so that an interrupted push sends no byte twice. Anybody could use these addresses and tokens: only
the user can read the notes.
"""

import json
import re
import shutil
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import requests
from kagglesdk.blobs.types.blob_api_service import ApiBlobType, ApiStartBlobUploadRequest
from tqdm import tqdm
from tqdm.utils import CallbackIOWrapper

from kaggle_kernels.publish.client import (
    REPEAT_SECONDS,
    TIMEOUT,
    Kaggle,
    Pace,
    Refused,
    Unanswered,
    as_unanswered,
    ask,
    check_status,
)
from postprocess.package import MANIFEST, METADATA
from postprocess.wheels.build import MANIFEST as WHEELS_MANIFEST
from preprocess.core.errors import UserError
from preprocess.core.files import atomic_file, read_object, sha256

WORK = Path("outputs/.push")


@dataclass(frozen=True)
class DatasetFolder:
    """A folder that is to be the dataset owner/slug. It is never changed."""

    path: Path
    owner: str
    slug: str
    manifest: str  # the file in it that lists the others with their hashes

    @property
    def ref(self) -> str:
        """owner/slug."""
        return f"{self.owner}/{self.slug}"

    def sizes(self) -> dict[str, int]:
        """The bytes of each file that goes up, by name. Kaggle's metadata is read, and not sent."""
        files = [path for path in sorted(self.path.iterdir()) if path.name != METADATA]
        return {path.name: path.stat().st_size for path in files}

    def describe_size(self) -> str:
        """Say how much goes up."""
        sizes = self.sizes()
        return f"{len(sizes)} files, {sum(sizes.values()) / 1e6:,.2f} MB"

    def manifest_sha256(self) -> str:
        """What tells one content of the folder from another."""
        return sha256(self.path / self.manifest)


def find_dataset_folder(path: Path, owner: str) -> DatasetFolder:
    """Read from a folder's files which dataset it is to be: that of a package, or of wheels."""
    # The file has a placeholder for the owner.
    slug = read_object(path / METADATA)["id"].split("/")[-1]
    is_package = (path / MANIFEST).is_file()
    return DatasetFolder(path, owner, slug, MANIFEST if is_package else WHEELS_MANIFEST)


@dataclass(frozen=True)
class Upload:
    """A file's upload as Kaggle has begun it; `is_complete` once the server has every byte."""

    token: str
    url: str
    is_complete: bool = False


def send_files(kaggle: Kaggle, folder: DatasetFolder) -> list[str]:
    """Send every file of a folder that has not arrived yet.

    Returns:
        Kaggle's tokens of all files, by which a dataset takes them in.

    Raises:
        UserError: A file cannot be sent. What has arrived is not sent again by the next call.
    """
    uploads = read_notes(folder)
    for name in folder.sizes():
        path = folder.path / name

        # Noted before the first byte goes up, so that a killed push finds it.
        if name not in uploads:
            uploads[name] = start_upload(kaggle, path)
            write_notes(folder, uploads)
        if uploads[name].is_complete:
            continue

        try:
            send_rest(path, uploads[name].url, kaggle.pace)
        except Refused as error:
            forget_uploads(folder, [name])
            raise UserError(
                f"{path}: the upload was refused ({error.status}); run this again, which begins "
                "this file anew"
            ) from None

        uploads[name] = replace(uploads[name], is_complete=True)
        write_notes(folder, uploads)
        print(f"  {name}: sent", flush=True)
    return [uploads[name].token for name in folder.sizes()]


def start_upload(kaggle: Kaggle, path: Path) -> Upload:
    """Ask Kaggle where to send a file, and for the token by which a dataset will take it in."""
    status = path.stat()
    request = ApiStartBlobUploadRequest()
    request.type = ApiBlobType.DATASET
    request.name = path.name
    request.content_length = status.st_size
    request.last_modified_epoch_seconds = int(status.st_mtime)
    answer = ask(kaggle.pace, kaggle.blobs.start_blob_upload, request)
    return Upload(answer.token, answer.create_url)


def send_rest(path: Path, url: str, pace: Pace) -> None:
    """Send what the server lacks of a file, and go on after each interruption.

    Raises:
        Refused: The server does not know the upload, or will not take the rest of it.
        Unanswered: Nothing more arrived for a minute.
    """
    size = path.stat().st_size
    received_bytes = 0
    failed_attempts = 0
    last_progress = time.monotonic()
    while True:
        try:
            received_before = received_bytes
            received_bytes = count_received(url, size)
            if received_bytes == size:
                return

            # An upload of hours may break off often, as long as it gets on.
            if received_bytes > received_before:
                failed_attempts = 0
                last_progress = time.monotonic()
            put_from(path, url, received_bytes)
            return
        except Unanswered as error:
            failed_attempts += 1
            pause = pace.pause(failed_attempts)
            if time.monotonic() - last_progress + pause > REPEAT_SECONDS:
                raise
            print(f"  {path.name}: {error}; goes on after {pause:g} s", flush=True)
            time.sleep(pause)


def count_received(url: str, size: int) -> int:
    """Ask the server how many bytes of a file it has."""
    # 308 says that a part is missing; any other status, that the file is complete.
    response = put(url, b"", f"bytes */{size}")
    if response.status_code != 308:
        return size

    # "bytes=0-4999"; without it the server has nothing.
    received = re.fullmatch(r"(?:bytes=)?0-(\d+)", response.headers.get("Range", ""))
    return int(received[1]) + 1 if received else 0


def put_from(path: Path, url: str, start: int) -> None:
    """Send the bytes of a file from the place `start` to its end.

    Raises:
        Refused: The server will not take them.
        Unanswered: The connection failed before the server had them all.
    """
    size = path.stat().st_size

    # disable=None: no bar where the output is no terminal.
    bar = tqdm(
        total=size, initial=start, desc=f"  {path.name}", unit="B", unit_scale=True, disable=None
    )
    with path.open("rb") as file, bar:
        # requests streams a file object from where it stands. The wrapper moves the bar on.
        file.seek(start)
        content = CallbackIOWrapper(bar.update, file)
        response = put(url, content, f"bytes {start}-{size - 1}/{size}")
    if response.status_code == 308:
        raise Unanswered("the server has a part of it only")


def put(url: str, content: object, content_range: str) -> requests.Response:
    """Make one PUT request to the server that stores uploads.

    Raises:
        Refused: The server says no.
        Unanswered: The connection or the server failed.
    """
    # Not by the session, which would send Kaggle's credentials to another server. requests would
    # take the status 308 for a redirect, but here it means that a part of the file is missing.
    try:
        response = requests.put(
            url,
            data=content,
            headers={"Content-Range": content_range},
            timeout=TIMEOUT,
            allow_redirects=False,
        )
    except requests.RequestException as error:
        raise as_unanswered("upload", error) from None
    check_status("upload", response)
    return response


def notes_path(folder: DatasetFolder) -> Path:
    """Where the uploads of a dataset are noted while it is on its way."""
    return WORK / folder.slug / "uploads.json"


def read_notes(folder: DatasetFolder) -> dict[str, Upload]:
    """Read the noted uploads by file name; none where the folder's content is another one now."""
    path = notes_path(folder)
    if not path.is_file():
        return {}

    # Files of another content must not come into the dataset under these names.
    notes = read_object(path)
    if notes["manifest"] != folder.manifest_sha256():
        return {}
    return {name: Upload(**values) for name, values in notes["uploads"].items()}


def write_notes(folder: DatasetFolder, uploads: dict[str, Upload]) -> None:
    """Write the uploads down, for the user's eyes only."""
    values = {name: asdict(upload) for name, upload in uploads.items()}
    text = json.dumps({"manifest": folder.manifest_sha256(), "uploads": values}, indent=1)
    # The mode is set before there is anything to read.
    with atomic_file(notes_path(folder)) as temporary:
        temporary.touch(mode=0o600)
        temporary.write_text(text, encoding="ascii")


def forget_uploads(folder: DatasetFolder, names: Iterable[str]) -> None:
    """Have these files sent anew by the next push."""
    kept = read_notes(folder)
    for name in names:
        kept.pop(name, None)
    write_notes(folder, kept)


def forget_all_uploads(folder: DatasetFolder) -> None:
    """Remove the notes of a dataset that was made, or whose files Kaggle does not have any more."""
    shutil.rmtree(WORK / folder.slug, ignore_errors=True)
