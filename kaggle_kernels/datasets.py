"""One folder → one private Kaggle dataset, whose every file is there and whose manifest is the local one.

The folder itself is never changed. What goes up is a staging folder of hard links, with the owner filled in where a package
says INSERT_OWNER: in dataset-metadata.json, which the kaggle command reads and leaves out of the dataset, and which a kernel
therefore does not look for among the files that manifest.json lists. Beside it the command keeps what it knows of an upload
that was broken off, so that the next one goes on there.
"""

import json
import os
import re
import shutil
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from kaggle_kernels.kaggle_cli import TRIES, UNKNOWN_TRIES, Answer, Pace, ask, call_in_words, demand, run
from preprocess.errors import UserError
from preprocess.files import read_object, sha256, write_json

METADATA = "dataset-metadata.json"
MANIFESTS = ("manifest.json", "wheels.json")
WORK = Path("outputs/.push")  # staging folders, by dataset; removed once a dataset is whole
CREATED = re.compile(r"Dataset (version )?is being created")
REFUSED = re.compile(r"Dataset (?:version )?creation error: (.*)")
LEFT_OUT = re.compile(r"Upload unsuccessful: (.*)")


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


def find_dataset(folder: Path, owner: str) -> Dataset:
    """The dataset that the folder is to be; UserError where the folder is absent, not flat or without a manifest."""
    if not (folder / METADATA).is_file():
        raise UserError(f"{folder}: no {METADATA}; make the folder again, with the command that the README names")
    slug = str(read_object(folder / METADATA).get("id")).split("/")[-1]
    manifest = next((name for name in MANIFESTS if (folder / name).is_file()), None)
    if manifest is None:
        raise UserError(f"{folder}: neither {' nor '.join(MANIFESTS)}; make the folder again")
    if folders := [path.name for path in folder.iterdir() if path.is_dir()]:
        raise UserError(f"{folder}: holds the folder {folders[0]}, which would be left out; remove it")
    return Dataset(folder, f"{owner}/{slug}", manifest)


def publish_dataset(dataset: Dataset, pace: Pace) -> dict:
    """Bring Kaggle's dataset up to the folder: created, given a new version, or left as it is; its version and manifest.

    UserError where that does not succeed. What went up until then stays there, and the next call goes on from it.
    """
    found = wait_until_ready(dataset.ref, 0, pace) if look(dataset.ref, pace) else None
    missing = what_differs(dataset, found, pace)
    if found and not missing:
        print(f"{dataset.ref}: unchanged, version {found.version}", flush=True)
        return as_record(dataset, found)
    if found:
        check_private(dataset.ref, pace)
    for _ in range(2):
        print(f"{dataset.ref}: {in_words(dataset)}, {next_step(found)}", flush=True)
        upload(dataset, found, pace)
        found = wait_until_ready(dataset.ref, found.version if found else 0, pace)
        missing = what_differs(dataset, found, pace)
        if not missing:
            shutil.rmtree(WORK / dataset.ref.split("/")[1], ignore_errors=True)
            print(f"{dataset.ref}: version {found.version} is ready, {len(dataset.sizes())} files as they are here", flush=True)
            return as_record(dataset, found)
        print(f"{dataset.ref}: version {found.version} is not what was sent: {'; '.join(missing)}", flush=True)
    raise UserError(f"{dataset.ref}: sent twice, and still {'; '.join(missing)}; run this again later")


def plan_dataset(dataset: Dataset, pace: Pace) -> list[str]:
    """The calls that publish_dataset would make now, of which those that change nothing are made."""
    found = look(dataset.ref, pace)
    if found and found.status == "ready" and not what_differs(dataset, found, pace):
        print(f"{dataset.ref}: unchanged, version {found.version}", flush=True)
        return []
    print(f"{dataset.ref}: {in_words(dataset)}, {next_step(found)}", flush=True)
    checks = (("datasets", "status", dataset.ref), ("datasets", "files", dataset.ref))
    return [call_in_words(arguments) for arguments in (upload_call(dataset, found), *checks)]


def in_words(dataset: Dataset) -> str:
    """How much goes up."""
    sizes = dataset.sizes()
    return f"{len(sizes)} files, {sum(sizes.values()) / 1e9:.2f} GB"


def next_step(found: Remote | None) -> str:
    """What is made of a dataset of which this was found."""
    return f"a new version after version {found.version}" if found else "a new private dataset"


def as_record(dataset: Dataset, found: Remote) -> dict:
    """What is written down of a dataset that is as it should be."""
    return {"version": found.version, "manifest": dataset.manifest_sha256()}


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
        if found and (found.status == "failed" or (found.status == "ready" and found.version > after)):
            return found
        status = found.status if found else "not there yet"
        if status != told:
            print(f"  {ref}: {status.replace('_', ' ')}; waiting for ready", flush=True)
            told = status
    raise UserError(
        f"{ref}: {told or 'not there'} after {pace.patience_seconds:g} s; run this again, which goes on waiting: nothing goes up twice"
    )


def what_differs(dataset: Dataset, found: Remote | None, pace: Pace) -> list[str]:
    """How the dataset's current version differs from the folder, in words: its files, their sizes, its manifest."""
    if found is None:
        return ["absent"]
    if found.status == "failed":
        return ["Kaggle could not process it"]
    here, there = dataset.sizes(), list_files(dataset.ref, pace)
    told = [f"{name} is missing" for name in here if name not in there]
    told += [f"{name} should not be there" for name in there if name not in here]
    told += [
        f"{name} has {there[name]} bytes in place of {size}" for name, size in here.items() if there.get(name, size) != size
    ]
    if not told and remote_manifest(dataset, pace) != (dataset.folder / dataset.manifest).read_bytes():
        told = [f"{dataset.manifest} is another one"]
    return told


def list_files(ref: str, pace: Pace) -> dict[str, int]:
    """The bytes of each file of a dataset's current version, by name."""
    files, token = {}, None
    while True:
        page = ("--page-token", token) if token else ()
        answer = demand(pace, "datasets", "files", ref, "--format", "json", "--page-size", "100", *page)
        values = answer.values()
        if not isinstance(values, list):
            raise UserError(f"{answer.call}: {answer.reason}; expected a list of files")
        files |= {file["name"]: int(file["size"]) for file in values}
        following = re.search(r"^Next Page Token = (\S+)$", answer.text, re.MULTILINE)
        if not following or following[1] == token:
            return files
        token = following[1]


def remote_manifest(dataset: Dataset, pace: Pace) -> bytes | None:
    """The manifest of the dataset's current version; None where Kaggle gives none."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ("datasets", "download", dataset.ref, "--file", dataset.manifest, "--path", folder, "--force", "--quiet")
        if ask(pace, *arguments).code:
            return None
        for path in Path(folder).iterdir():
            if zipfile.is_zipfile(path):  # Kaggle compresses some files on their way
                with zipfile.ZipFile(path) as archive:
                    return archive.read(archive.namelist()[0])
            return path.read_bytes()
    return None


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


def upload_call(dataset: Dataset, found: Remote | None) -> tuple[str, ...]:
    """The call that sends the staging folder, in which it is made."""
    if found is None:
        return ("datasets", "create", "-p", ".")
    return ("datasets", "version", "-p", ".", "-m", f"{dataset.manifest} {dataset.manifest_sha256()[:12]}")


def upload(dataset: Dataset, found: Remote | None, pace: Pace) -> None:
    """Send the folder, and again where something broke off; UserError where Kaggle will not have it.

    The command would make a dataset without a file that it could not send: it is stopped before it does.
    """
    folder, state = stage(dataset)
    for attempt in range(TRIES):
        answer = run(upload_call(dataset, found), folder, state, stop_at=tell_progress)
        if CREATED.search(answer.text) or has_arrived(dataset, found, answer, pace):
            return
        for name in LEFT_OUT.findall(answer.text):
            upload_note(state, name).unlink(missing_ok=True)  # what it knew of this file's upload is of no use
        if not may_pass(answer, attempt):
            break
        if attempt < TRIES - 1:
            seconds = pace.wait_before(attempt + 1)
            print(f"  {why_not(answer)}; sent again after {seconds:g} s, what is there already is not", flush=True)
    raise UserError(f"{dataset.ref}: {why_not(answer)}; mend that, then run this again: what went up is not sent twice")


def has_arrived(dataset: Dataset, found: Remote | None, answer: Answer, pace: Pace) -> bool:
    """Whether Kaggle has a new version after all, though the answer that said so was lost."""
    in_use = "already in use" in answer.text
    if not (in_use or answer.is_transient) or LEFT_OUT.search(answer.text):
        return False
    now = look(dataset.ref, pace)
    return now is not None and (found is None or now.version > found.version or now.status not in ("ready", "failed"))


def may_pass(answer: Answer, attempt: int) -> bool:
    """Whether sending again may help: a broken connection, a file that was left out, a 403 while a version is processed."""
    if LEFT_OUT.search(answer.text) or answer.is_transient or answer.is_absent:
        return True
    return not REFUSED.search(answer.text) and attempt + 1 < UNKNOWN_TRIES


def why_not(answer: Answer) -> str:
    """Why nothing was made, in the command's words."""
    if left_out := LEFT_OUT.findall(answer.text):
        return f"{', '.join(left_out)} could not be sent"
    refused = REFUSED.search(answer.text)
    return refused[1] if refused else answer.reason


def tell_progress(line: str) -> bool:
    """Print a line of the upload that says something of a file; whether a file was left out, so that it is to be stopped."""
    if re.match(r"Upload successful|Already uploaded", line):
        print(f"  {line}", flush=True)
    return bool(LEFT_OUT.match(line))


def stage(dataset: Dataset) -> tuple[Path, Path]:
    """The folder to send, and where the command keeps its notes on the upload.

    Both are those of the last call as long as the manifest is the same: an upload is continued where path, size and time of a
    file are what they were.
    """
    work = WORK / dataset.ref.split("/")[1]
    key, folder, state = work / "manifest.sha256", work / "files", work / "state"
    if not key.is_file() or key.read_text() != dataset.manifest_sha256():
        shutil.rmtree(work, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    for made in (folder, state):
        made.mkdir(parents=True, exist_ok=True)
    key.write_text(dataset.manifest_sha256())
    for name in dataset.sizes():
        link_or_copy(dataset.folder / name, folder / name)
    write_json(folder / METADATA, {**read_object(dataset.folder / METADATA), "id": dataset.ref})
    return folder, state.resolve()


def link_or_copy(source: Path, target: Path) -> None:
    """A second name for the same bytes; a copy of the same age where the file system has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def upload_note(state: Path, name: str) -> Path:
    """Where the command keeps what it knows of the upload of ./NAME."""
    return state / ".kaggle" / "uploads" / f"._{name}.json"
