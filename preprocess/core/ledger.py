"""The ledger, outputs/ledger.jsonl: one line for every run that made or published something.

It is the provenance of every number: preprocessing, training, packaging, rehearsing, pushing and
submitting append a line each, and `python -m kaggle_kernels trace` follows them back.

A line is an object with time (UTC), event, git_commit and git_dirty (null outside a checkout),
versions, and the event's own fields. Many processes may append at once; lines are written whole and
never changed. PAIRWISE_LEDGER names another file.
"""

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from preprocess.core.errors import UserError
from preprocess.core.files import sha256

LEDGER = "outputs/ledger.jsonl"
EVENTS = ("pairs", "train", "package", "rehearse", "push", "submit")

# Packages whose versions decide what a trained model is.
TRAINING_PACKAGES = (
    "axolotl",
    "torch",
    "transformers",
    "peft",
    "tokenizers",
    "accelerate",
    "deepspeed",
    "bitsandbytes",
)
RECORDED_PACKAGES = (*TRAINING_PACKAGES, "polars", "kaggle")

# A repository on a slow disk must not hold a run up.
GIT_TIMEOUT_SECONDS = 20


def ledger_path() -> Path:
    """Return PAIRWISE_LEDGER where it is set, else LEDGER in the working directory."""
    path_from_environment = os.environ.get("PAIRWISE_LEDGER")
    return Path(path_from_environment or LEDGER)


def record(event: str, **fields) -> dict:
    """Append an entry to the ledger and return it.

    A ledger that cannot be written is one warning on stderr: the event has already happened, and its
    result must not be lost over the record of it.

    Args:
        event: One of EVENTS.
        **fields: The event's own fields. They override those that every entry has, e.g. the
            git_state() at the time when a run began.
    """
    if event not in EVENTS:
        raise ValueError(f"{event}: no event of the ledger; expected {', '.join(EVENTS)}")

    versions = installed_versions(RECORDED_PACKAGES)
    versions = {name: number for name, number in versions.items() if number != "absent"}

    # Fields of the event come last, so that they win over the common ones.
    entry: dict = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "event": event}
    entry.update(git_state())
    entry["versions"] = versions
    entry.update(fields)
    line = json.dumps(entry, default=str)

    # The event has happened: a full disk must not end the command.
    path = ledger_path()
    try:
        _append_line(path, line)
    except OSError as error:
        warning = f"{path}: cannot be written ({error.strerror}); it lacks this {event}"
        print(f"warning: {warning}", file=sys.stderr, flush=True)

    return json.loads(line)


def read() -> list[dict]:
    """Return the entries, oldest first; none if the file does not exist.

    A line that is not an entry, e.g. because a kill cut it short, is skipped with a warning on stderr.
    """
    path = ledger_path()
    # The lock waits until no process is appending a line; it lets others read at the same time.
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            lines = file.read().split("\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); make it a readable file"
        ) from None

    # Only a line that cannot be parsed is lost, not the entries around it.
    entries = []
    for line_number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            entry = None
        is_entry = isinstance(entry, dict) and entry.get("event") in EVENTS
        if is_entry:
            entries.append(entry)
        else:
            warning = f"{path}: line {line_number} is no entry (cut short?), and is left out"
            print(f"warning: {warning}", file=sys.stderr)
    return entries


def _append_line(path: Path, line: str) -> None:
    """Add a line to a file, whole or not at all; it is on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)

    try:
        # One process at a time; closing the file releases the lock.
        fcntl.flock(file, fcntl.LOCK_EX)
        size_before = os.fstat(file).st_size

        # After a line that a kill cut short, start a new one, so that only the cut line is lost.
        is_empty = size_before == 0
        ends_in_newline = is_empty or os.pread(file, 1, size_before - 1) == b"\n"
        if not ends_in_newline:
            line = "\n" + line
        content = f"{line}\n".encode()

        # On a full disk, write takes only a part of the line, and says how much. Remove this part.
        bytes_written = os.write(file, content)
        if bytes_written < len(content):
            os.ftruncate(file, size_before)
            raise OSError(0, "no room on the disk")
        os.fsync(file)
    finally:
        os.close(file)


def fingerprint(path: Path | str) -> str | None:
    """Return a file's SHA-256 for an entry, or None if it cannot be read."""
    try:
        return sha256(path)
    except OSError:
        return None


def git_state() -> dict[str, str | bool | None]:
    """Return git_commit and git_dirty (whether tracked files differ); both None outside a checkout."""
    description = git_commit()
    if description == "unknown":
        return {"git_commit": None, "git_dirty": None}

    is_dirty = description.endswith("-dirty")
    return {"git_commit": description.removesuffix("-dirty"), "git_dirty": is_dirty}


def git_commit() -> str:
    """Return the working tree's commit, with -dirty if it has changes; "unknown" outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        process = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=GIT_TIMEOUT_SECONDS
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return process.stdout.strip()


def installed_versions(names: Iterable[str] = TRAINING_PACKAGES) -> dict[str, str]:
    """Return the versions of packages by name; "absent" for one that is not installed."""
    versions = {}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "absent"
    return versions
