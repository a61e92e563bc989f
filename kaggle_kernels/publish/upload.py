"""A dataset's files sent by the kaggle command, which goes on where an earlier upload was broken off.

What goes up is a staging folder of hard links, in which the owner is filled in. Beside it are the command's notes: where it is
with a file, and by which token a dataset takes a whole one in. It removes them once it was answered, even where Kaggle refused
the dataset. So what it removes is a symbolic link, and the note stays: nothing goes up twice.
"""

import re
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from kaggle_kernels.publish.client import TRIES, UNKNOWN_TRIES, Answer, Pace, check_credentials, run
from kaggle_kernels.publish.dataset_state import Dataset, Remote, look, wait_until_ready, what_differs
from postprocess.package import METADATA
from preprocess.core.errors import UserError
from preprocess.core.files import link_or_copy, read_object, write_json

WORK = Path("outputs/.push")  # work folders, by dataset; removed once a dataset is whole
FILES, STATE, NOTES = "files", "state", "notes"  # in a work folder: what is sent, where the command writes, and what it wrote
CREATED = re.compile(r"Dataset (version )?is being created")
REFUSED = re.compile(r"Dataset (?:version )?creation error: (.*)")
TAKEN = "already in use"  # says the command of a dataset that its own first attempt has made
LEFT_OUT = re.compile(r"Upload unsuccessful: (.*)")
SENT = re.compile(r"Upload successful: ")
PROGRESS = re.compile(r"\s*(\d+%)\|.*\| (.*)")
TOLD_EVERY_SECONDS = 30


def upload(dataset: Dataset, found: Remote | None, pace: Pace) -> None:
    """Send the folder, and again where something broke off; UserError where Kaggle will not have it.

    The command would make a dataset without a file that it could not send: it is stopped before it does.
    """
    work, failed = stage(dataset), set()
    for attempt in range(TRIES):
        offer_notes(work, dataset.sizes())
        answer = run(upload_call(dataset, found), work / FILES, (work / STATE).resolve(), watch_upload())
        check_credentials(answer)
        if CREATED.search(answer.text) or has_arrived(dataset, found, answer, pace):
            return
        if not may_pass(answer, attempt):
            break
        left_out = set(LEFT_OUT.findall(answer.text))
        is_odd = not (left_out or answer.is_transient or answer.is_absent)
        for name in stale_notes(dataset.sizes(), left_out, failed, is_odd and attempt > 0):
            forget_upload(work, name)
        failed |= left_out
        if attempt + 1 < TRIES:
            seconds = pace.wait_before(attempt + 1)
            print(f"  {why_not(answer)}; sent again after {seconds:g} s", flush=True)
    raise UserError(f"{dataset.ref}: {why_not(answer)}; mend that, then run this again: what went up is not sent twice")


def stale_notes(names: Iterable[str], left_out: set[str], failed: set[str], is_odd_again: bool) -> set[str]:
    """The files whose notes are of no use: those that were left out.

    Where others had `failed` before, or the command says twice what nobody knows, Kaggle takes none of the notes any more.
    """
    return set(names) if is_odd_again or (failed and left_out and not left_out & failed) else left_out


def upload_call(dataset: Dataset, found: Remote | None, folder: str = ".") -> tuple[str, ...]:
    """The call that sends a folder: the staging folder, in which it is made."""
    if found is None:
        return ("datasets", "create", "-p", folder)
    return ("datasets", "version", "-p", folder, "-m", f"{dataset.manifest} {dataset.manifest_sha256()[:12]}")


def has_arrived(dataset: Dataset, found: Remote | None, answer: Answer, pace: Pace) -> bool:
    """Whether Kaggle has made a version all the same: the answer that said so was lost, or we stopped the command too late.

    That version is compared with the folder later, and followed by another where it lacks something.
    """
    if REFUSED.search(answer.text) and TAKEN not in answer.text:
        return False
    now = look(dataset.ref, pace)
    if now is None or now == found:
        return False
    if LEFT_OUT.search(answer.text) or TAKEN in answer.text:
        return True
    after = found.version if found else 0
    now = now if now.is_settled(after) else wait_until_ready(dataset.ref, after, pace)
    return not what_differs(dataset, now, pace)


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


def watch_upload() -> Callable[[str], bool]:
    """What looks at each line of an upload: whether to stop, since a file was left out.

    Tells of each whole file, and now and then how far a large one is.
    """
    told = time.monotonic()

    def watch(line: str) -> bool:
        nonlocal told
        progress = PROGRESS.match(line)
        if SENT.match(line) or (progress and time.monotonic() > told + TOLD_EVERY_SECONDS):
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
    for name in (FILES, STATE, NOTES):
        (work / name).mkdir(parents=True, exist_ok=True)
    key.write_text(dataset.manifest_sha256())
    for name in dataset.sizes():
        link_or_copy(dataset.folder / name, work / FILES / name)
    write_json(work / FILES / METADATA, {**read_object(dataset.folder / METADATA), "id": dataset.ref})
    return work


def work_folder(dataset: Dataset) -> Path:
    """What is there while a dataset is on its way."""
    return WORK / dataset.ref.split("/")[1]


def offer_notes(work: Path, names: Iterable[str]) -> None:
    """Lay a link to each file's note where the command looks for it; ./NAME is ._NAME.json there."""
    offered = work / STATE / ".kaggle" / "uploads"
    shutil.rmtree(offered, ignore_errors=True)
    offered.mkdir(parents=True)
    for name in names:
        (offered / f"._{name}.json").symlink_to(upload_note(work, name).resolve())


def upload_note(work: Path, name: str) -> Path:
    """What the command knows of a file's upload."""
    return work / NOTES / f"{name}.json"


def forget_upload(work: Path, name: str) -> None:
    """Have a file sent anew."""
    upload_note(work, name).unlink(missing_ok=True)


def forget(dataset: Dataset) -> None:
    """Have everything sent anew."""
    shutil.rmtree(work_folder(dataset), ignore_errors=True)
