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

# How often one file is begun anew in one push where the server will not have the rest of it.
STARTS = 3

MANIFESTS = (MANIFEST, WHEELS_MANIFEST)


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

    def manifest_sha256(self) -> str:
        """What tells one content of the folder from another."""
        return sha256(self.path / self.manifest)


def find_dataset_folder(path: Path, owner: str) -> DatasetFolder:
    """Find what dataset a folder is to be; UserError where it is absent, not flat, or has no manifest."""
    if not (path / METADATA).is_file():
        raise UserError(
            f"{path}: no {METADATA}; make the folder again with python -m postprocess RECIPE, "
            "wheels with python -m postprocess.wheels"
        )
    manifests = [name for name in MANIFESTS if (path / name).is_file()]
    if not manifests:
        raise UserError(f"{path}: neither {' nor '.join(MANIFESTS)}; make the folder again")
    # A dataset of ours is flat: nothing here sends folders.
    folders = [inner.name for inner in path.iterdir() if inner.is_dir()]
    if folders:
        raise UserError(
            f"{path}: holds the folder {folders[0]}, which would be left out; remove it"
        )

    # The owner in the file may be a placeholder.
    slug = str(read_object(path / METADATA).get("id")).split("/")[-1]
    return DatasetFolder(path, owner, slug, manifests[0])


@dataclass(frozen=True)
class Upload:
    """A file's upload as Kaggle has begun it; `is_complete` once the server has every byte."""

    token: str
    url: str
    is_complete: bool = False


class UploadLost(Exception):
    """The server does not know an upload, or will not take the rest of it."""


def send_files(kaggle: Kaggle, folder: DatasetFolder) -> list[str]:
    """Send every file of a folder that has not arrived yet; the tokens of all files.

    There is no other source of tokens: no dataset can be made before every file is there.

    Raises:
        UserError: A file cannot be sent. What has arrived is not sent again by the next call.
    """
    uploads = read_notes(folder)
    for name in folder.sizes():
        if name in uploads and uploads[name].is_complete:
            continue

        # Written down after each file: the next may be interrupted.
        uploads[name] = send_file(kaggle, folder, name, uploads)
        write_notes(folder, uploads)
        print(f"  {name}: sent", flush=True)
    return [uploads[name].token for name in folder.sizes()]


def send_file(
    kaggle: Kaggle, folder: DatasetFolder, name: str, uploads: dict[str, Upload]
) -> Upload:
    """Send one file: the rest of it where an earlier upload is noted; the completed upload."""
    path = folder.path / name
    for _ in range(STARTS):
        is_new = name not in uploads
        if is_new:
            # Noted before the first byte goes up, so that a killed push finds it.
            uploads[name] = start_upload(kaggle, path)
            write_notes(folder, uploads)

        try:
            send_rest(path, uploads[name].url, kaggle.pace, is_new)
        except UploadLost as error:
            print(f"  {name}: {error}; begun anew", flush=True)
            del uploads[name]
        else:
            return replace(uploads[name], is_complete=True)
    raise UserError(
        f"{path}: the upload was refused {STARTS} times; run this again later: what was sent stays"
    )


def start_upload(kaggle: Kaggle, path: Path) -> Upload:
    """Have Kaggle prepare for a file."""
    facts = path.stat()
    request = ApiStartBlobUploadRequest()
    request.type = ApiBlobType.DATASET
    request.name = path.name
    request.content_length = facts.st_size
    request.last_modified_epoch_seconds = int(facts.st_mtime)
    answer = ask(kaggle.pace, kaggle.blobs.start_blob_upload, request)
    return Upload(answer.token, answer.create_url)


def send_rest(path: Path, url: str, pace: Pace, is_new: bool) -> None:
    """Send what the server lacks of a file, and go on after each interruption; one that `is_new` has sent nothing.

    Raises:
        UploadLost: The server refuses the rest.
        Unanswered: Nothing more arrived for a minute.
    """
    # What the server has; unknown after every interruption.
    size = path.stat().st_size
    bytes_there = 0
    is_known = is_new
    attempt = 0
    last_progress = time.monotonic()

    # A session of its own: the address is not Kaggle's, and gets no credentials.
    with requests.Session() as session:
        while True:
            try:
                if not is_known:
                    bytes_before = bytes_there
                    bytes_there = count_received(session, url, size)
                    is_known = True

                    # An upload of hours may break off often, as long as it gets on.
                    if bytes_there > bytes_before:
                        attempt = 0
                        last_progress = time.monotonic()
                if bytes_there < size or (size == 0 and is_new):
                    is_known = False
                    put_from(session, path, url, bytes_there)
                return
            except Unanswered as error:
                attempt += 1
                seconds = pace.pause(attempt)
                if time.monotonic() - last_progress + seconds > REPEAT_SECONDS:
                    raise
                print(f"  {path.name}: {error}; goes on after {seconds:g} s", flush=True)
                time.sleep(seconds)


def count_received(session: requests.Session, url: str, size: int) -> int:
    """Ask the server how many bytes of a file it has."""
    headers = {"Content-Range": f"bytes */{size}", "Content-Length": "0"}
    # 308 says that a part is missing; any other status, that the file is complete.
    response = put(session, url, headers, b"")
    if response.status_code != 308:
        return size

    # "bytes=0-4999"; without it the server has nothing.
    received = re.fullmatch(r"(?:bytes=)?0-(\d+)", response.headers.get("Range", ""))
    return int(received[1]) + 1 if received else 0


def put_from(session: requests.Session, path: Path, url: str, start: int) -> None:
    """Send a file's bytes from `start` to its end; Unanswered where the server has not got them all."""
    size = path.stat().st_size
    headers = {}
    if start:
        headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"

    # A bar where somebody looks on (disable=None).
    progress = {"total": size, "initial": start, "desc": f"  {path.name}", "disable": None}
    progress.update(unit="B", unit_scale=True)
    with path.open("rb") as file, tqdm(**progress) as bar:
        file.seek(start)
        # A file object streams; requests takes its length from where it stands.
        content = CallbackIOWrapper(bar.update, file) if start < size else b""
        response = put(session, url, headers, content)
    if response.status_code == 308:
        raise Unanswered("the server has a part of it only", may_have_arrived=True)


def put(session: requests.Session, url: str, headers: dict, content) -> requests.Response:
    """Make one PUT to the server that stores uploads; UploadLost where it refuses, Unanswered where it fails."""
    # A redirect is a 308, which has a meaning of its own here.
    try:
        response = session.put(
            url, data=content, headers=headers, timeout=TIMEOUT, allow_redirects=False
        )
    except requests.RequestException as error:
        raise as_unanswered("upload", error) from None

    # 408 and 429 pass.
    status = response.status_code
    if 400 <= status < 500 and status not in (408, 429):
        raise UploadLost(f"the server refused it ({status})")
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
    if notes.get("manifest") != folder.manifest_sha256():
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


def forget_uploads(folder: DatasetFolder, names: list[str] | None = None) -> None:
    """Have files sent anew by the next push: those named, or all of them."""
    if names is None:
        shutil.rmtree(WORK / folder.slug, ignore_errors=True)
        return
    uploads = read_notes(folder)
    for name in names:
        uploads.pop(name, None)
    write_notes(folder, uploads)
