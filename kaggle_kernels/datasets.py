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
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from kaggle_kernels.kaggle_cli import TRIES, UNKNOWN_TRIES, Answer, Pace, ask, call_in_words, check_credentials, demand, run
from preprocess.errors import UserError
from preprocess.files import read_object, sha256, write_json

METADATA = "dataset-metadata.json"
MANIFESTS = ("manifest.json", "wheels.json")
WORK = Path("outputs/.push")  # staging folders, by dataset; removed once a dataset is whole
CREATED = re.compile(r"Dataset (version )?is being created")
REFUSED = re.compile(r"Dataset (?:version )?creation error: (.*)")
LEFT_OUT = re.compile(r"Upload unsuccessful: (.*)")
SENT = re.compile(r"Upload successful: (.*) \(")
PROGRESS = re.compile(r"\s*(\d+%)\|.*\| (.*)")
TOLD_EVERY_SECONDS = 30
FILES, STATE, KEPT = "files", "state", "kept"  # in a dataset's work folder


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

    A version that lacks a file, or has a part of one, is followed by one more. UserError where that does not help either, or
    nothing could be made at all; the next call then goes on from what went up.
    """
    found = look(dataset.ref, pace)
    if found and not found.is_settled(0):
        found = wait_until_ready(dataset.ref, 0, pace)
    wrong = what_differs(dataset, found, pace)
    if found and not wrong:
        print(f"{dataset.ref}: unchanged, version {found.version}", flush=True)
        return as_record(dataset, found)
    if found:
        check_private(dataset.ref, pace)
    for _ in range(2):
        print(f"{dataset.ref}: {in_words(dataset)}, {next_step(found)}", flush=True)
        upload(dataset, found, pace)
        found = wait_until_ready(dataset.ref, found.version if found else 0, pace)
        wrong = what_differs(dataset, found, pace)
        if not wrong:
            forget(dataset)
            print(f"{dataset.ref}: version {found.version} is ready, {len(dataset.sizes())} files as they are here", flush=True)
            return as_record(dataset, found)
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
    there = list_files(dataset.ref, pace)
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


def upload_call(dataset: Dataset, found: Remote | None, folder: str = ".") -> tuple[str, ...]:
    """The call that sends a folder: the staging folder, in which it is made."""
    if found is None:
        return ("datasets", "create", "-p", folder)
    return ("datasets", "version", "-p", folder, "-m", f"{dataset.manifest} {dataset.manifest_sha256()[:12]}")


def upload(dataset: Dataset, found: Remote | None, pace: Pace) -> None:
    """Send the folder, and again where something broke off; UserError where Kaggle will not have it.

    The command would make a dataset without a file that it could not send: it is stopped before it does.
    """
    work, failed = stage(dataset), set()
    for attempt in range(TRIES):
        restore_notes(work)
        answer = run(upload_call(dataset, found), work / FILES, (work / STATE).resolve(), watch_upload(work))
        check_credentials(answer)
        if CREATED.search(answer.text) or has_arrived(dataset, found, answer, pace):
            return
        if not may_pass(answer, attempt):
            break
        left_out = set(LEFT_OUT.findall(answer.text))
        is_odd = not (left_out or answer.is_transient or answer.is_absent)
        notes_are_stale = bool(failed and left_out and not left_out & failed) or (is_odd and attempt > 0)
        for name in dataset.sizes() if notes_are_stale else left_out:
            forget_upload(work, name)
        failed |= left_out
        if attempt + 1 < TRIES:
            seconds = pace.wait_before(attempt + 1)
            print(f"  {why_not(answer)}; sent again after {seconds:g} s", flush=True)
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


def watch_upload(work: Path) -> Callable[[str], bool]:
    """What looks at each line of an upload: whether to stop, since a file was left out.

    Tells of each whole file, whose upload's note it keeps, and now and then how far a large one is.
    """
    told = time.monotonic()

    def watch(line: str) -> bool:
        nonlocal told
        progress, sent = PROGRESS.match(line), SENT.match(line)
        if sent:
            kept = work / KEPT / f"{sent[1]}.json"
            kept.unlink(missing_ok=True)
            link_or_copy(upload_note(work, sent[1]), kept)
        if sent or (progress and time.monotonic() > told + TOLD_EVERY_SECONDS):
            print(f"  {progress[1] + ': ' + progress[2] if progress else line}", flush=True)
            told = time.monotonic()
        return bool(LEFT_OUT.match(line))

    return watch


def stage(dataset: Dataset) -> Path:
    """The dataset's work folder: the files to send, and what the command noted of their uploads.

    The notes are those of the last call as long as the manifest is the same: an upload goes on where path, size and time of a
    file are what they were.
    """
    work = work_folder(dataset)
    key = work / "manifest.sha256"
    if not key.is_file() or key.read_text() != dataset.manifest_sha256():
        forget(dataset)
    shutil.rmtree(work / FILES, ignore_errors=True)
    for name in (FILES, STATE, KEPT):
        (work / name).mkdir(parents=True, exist_ok=True)
    key.write_text(dataset.manifest_sha256())
    for name in dataset.sizes():
        link_or_copy(dataset.folder / name, work / FILES / name)
    write_json(work / FILES / METADATA, {**read_object(dataset.folder / METADATA), "id": dataset.ref})
    return work


def work_folder(dataset: Dataset) -> Path:
    """What is there while a dataset is on its way."""
    return WORK / dataset.ref.split("/")[1]


def link_or_copy(source: Path, target: Path) -> None:
    """A second name for the same bytes; a copy of the same age where the file system has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def upload_note(work: Path, name: str) -> Path:
    """Where the command notes how to go on with the upload of ./NAME, and by which token a dataset takes it in."""
    return work / STATE / ".kaggle" / "uploads" / f"._{name}.json"


def restore_notes(work: Path) -> None:
    """Give the command back its notes on whole files, which it throws away where Kaggle refuses the dataset itself."""
    for kept in (work / KEPT).iterdir():
        note = upload_note(work, kept.stem)
        if not note.is_file():
            note.parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(kept, note)


def forget_upload(work: Path, name: str) -> None:
    """Have a file sent anew."""
    for note in (upload_note(work, name), work / KEPT / f"{name}.json"):
        note.unlink(missing_ok=True)


def forget(dataset: Dataset) -> None:
    """Have everything sent anew."""
    shutil.rmtree(work_folder(dataset), ignore_errors=True)
