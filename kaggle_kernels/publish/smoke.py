"""`smoke`: every call of publishing tried on the user's own account, with files of 10 KB, in five minutes.

It makes a private dataset, a version of it, and a kernel on a CPU that reads it; follows the kernel, fetches its output, and
deletes both. The calls and what Kaggle answered go to outputs/smoke.json, without names: the transcript that the tests'
stand-in can be compared with.
"""

import json
import secrets
import tempfile
from pathlib import Path

import click
import requests
from kagglesdk.datasets.types.dataset_api_service import ApiDeleteDatasetRequest
from kagglesdk.kernels.types.kernels_api_service import ApiDeleteKernelRequest

from kaggle_kernels.publish.client import Kaggle, Pace, connect
from kaggle_kernels.publish.datasets import publish_dataset
from kaggle_kernels.publish.kernels import (
    Kernel,
    check_pushed,
    download_output,
    read_status,
    save_kernel,
)
from kaggle_kernels.publish.submit import can_ask
from kaggle_kernels.publish.uploads import DatasetFolder, find_dataset_folder
from postprocess.package import MANIFEST, METADATA, dataset_metadata
from preprocess.core.errors import UserError
from preprocess.core.files import sha256, write_json

TRANSCRIPT = Path("outputs/smoke.json")
FILE_BYTES = 10_000
OUTPUT = "files.txt"

# Fields whose values are written down: they say how Kaggle behaves, and nothing of the account.
SHOWN_FIELDS = (
    *("status", "error", "code", "message", "versionNumber", "currentVersionNumber", "isPrivate"),
    *("datasetDataSources", "invalidDatasetSources", "versionLabel", "name", "totalBytes"),
    *("fileName", "failureMessage", "dockerImage", "dockerImagePinningType"),
)
CODE = f"""
from pathlib import Path
files = sorted(path.name for path in Path("/kaggle/input").rglob("*") if path.is_file())
Path("{OUTPUT}").write_text("\\n".join(files))
"""


def smoke(pace: Pace, yes: bool) -> None:
    """Try every call that push and status make on the user's account, and delete what was made."""
    kaggle = connect(pace)
    slug = f"pairwise-smoke-{secrets.token_hex(4)}"
    print(f"{kaggle.owner}/{slug}: a private dataset of 10 KB and a kernel, deleted afterwards")
    if not yes and not (can_ask() and click.confirm("make them on your account?")):
        raise UserError("nothing was made")

    # requests calls each hook with every answer of Kaggle's.
    exchanges: list[dict] = []

    def note_exchange(response: requests.Response, **_) -> None:
        exchanges.append(describe_exchange(response))

    kaggle.session.hooks["response"].append(note_exchange)
    try:
        with tempfile.TemporaryDirectory() as work:
            try_calls(kaggle, slug, Path(work))
    finally:
        delete_all(kaggle, slug)
        write_transcript(exchanges, kaggle.owner, slug)
    print(f"every call did what it should; {TRANSCRIPT} has them, without names")


def try_calls(kaggle: Kaggle, slug: str, work: Path) -> None:
    """Publish two versions of a dataset, and a kernel that names the second; UserError unless its run sees data.bin."""
    for content in (b"a", b"b"):
        publish_dataset(kaggle, write_folder(work / "dataset", slug, content, kaggle.owner))

    # The kernel names the dataset's second version, which shows whether Kaggle accepts that.
    kernel = make_kernel(kaggle.owner, slug)
    version = save_kernel(kaggle, kernel)
    check_pushed(kaggle, kernel)

    for _ in kaggle.pace.looks():
        run = read_status(kaggle, kernel.ref, version)
        if run.is_over:
            break
    print(f"{kernel.ref} version {version}: {run.word}", flush=True)
    if run.word != "COMPLETE":
        raise UserError(f"{kernel.ref}: {run.word}, expected COMPLETE: {run.failure}")

    output = work / "output"
    download_output(kaggle, kernel.ref, version, (OUTPUT,), output)
    files = []
    if (output / OUTPUT).is_file():
        files = (output / OUTPUT).read_text().split()
    if "data.bin" not in files:
        raise UserError(f"{kernel.ref}: the kernel saw {files}, expected data.bin among them")


def write_folder(path: Path, slug: str, content: bytes, owner: str) -> DatasetFolder:
    """Write a folder as packages are: a file, the manifest, Kaggle's metadata."""
    path.mkdir(exist_ok=True)
    (path / "data.bin").write_bytes(content * FILE_BYTES)
    write_json(path / MANIFEST, {"files": {"data.bin": sha256(path / "data.bin")}})
    write_json(path / METADATA, dataset_metadata(slug, "CC0-1.0"))
    return find_dataset_folder(path, owner)


def make_kernel(owner: str, slug: str) -> Kernel:
    """Make a private kernel on a CPU that lists the dataset's second version."""
    metadata = {
        "id": f"{owner}/{slug}",
        "title": slug,
        "language": "python",
        "kernel_type": "script",
        "is_private": True,
        "enable_gpu": False,
        "enable_tpu": False,
        "enable_internet": False,
        "dataset_sources": [f"{owner}/{slug}/2"],
        "competition_sources": [],
        "kernel_sources": [],
        "model_sources": [],
    }
    return Kernel(CODE, metadata)


def describe_exchange(response: requests.Response) -> dict:
    """Describe a call and its answer: fields with their values, or with types where a value could identify somebody."""
    # What is downloaded is no JSON, and comes from an address elsewhere.
    is_json = "application/json" in response.headers.get("Content-Type", "")
    return {
        "call": response.url.partition("/v1/")[2] or "download",
        "request": without_values(json.loads(response.request.body or b"{}")),
        "status": response.status_code,
        "answer": without_values(response.json() if is_json else {}),
    }


def without_values(value: object) -> object:
    """Keep the values of fields that identify nobody; of all others only the type."""
    if isinstance(value, list):
        return [without_values(item) for item in value]
    if not isinstance(value, dict):
        return type(value).__name__

    fields = {}
    for name, inner in value.items():
        fields[name] = inner if name in SHOWN_FIELDS else without_values(inner)
    return fields


def write_transcript(exchanges: list[dict], owner: str, slug: str) -> None:
    """Write the calls down, with each name of the user's replaced."""
    text = json.dumps(exchanges).replace(slug, "SLUG").replace(owner, "USER")
    write_json(TRANSCRIPT, json.loads(text))


def delete_all(kaggle: Kaggle, slug: str) -> None:
    """Delete the kernel and the dataset, as far as they were made."""
    kernel = ApiDeleteKernelRequest()
    kernel.user_name, kernel.kernel_slug = kaggle.owner, slug
    dataset = ApiDeleteDatasetRequest()
    dataset.owner_slug, dataset.dataset_slug = kaggle.owner, slug
    # The kernel first, which reads the dataset.
    for delete, request in (
        (kaggle.kernels.delete_kernel, kernel),
        (kaggle.datasets.delete_dataset, dataset),
    ):
        try:
            delete(request)
        except UserError as error:
            print(f"warning: {kaggle.owner}/{slug}: not deleted ({error}); delete it on Kaggle")
