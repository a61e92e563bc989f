"""The ledger, outputs/ledger.jsonl: one line for whatever made or published something, so that every number leads back.

Each line is an object: time (UTC), event, git_commit and git_dirty (null outside a checkout), versions, and the event's own
fields. Lines are appended whole, by as many processes as there are, and never changed. PAIRWISE_LEDGER names another file.
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
MADE_BY = ("axolotl", "torch", "transformers", "peft", "tokenizers", "accelerate", "deepspeed", "bitsandbytes")
GIT_SECONDS = 20  # a repository on a slow disk must not hold a run up


def ledger_path() -> Path:
    """The ledger's file: of the working directory, unless PAIRWISE_LEDGER names it."""
    return Path(os.environ.get("PAIRWISE_LEDGER") or LEDGER)


def record(event: str, **fields) -> dict:
    """Append an entry and return it. `fields` win over what every entry has, e.g. the git_state() of when a run began.

    A ledger that cannot be written is one warning on stderr: what is recorded has happened, and must not be lost over it.
    """
    if event not in EVENTS:
        raise ValueError(f"{event}: no event of the ledger; expected {', '.join(EVENTS)}")
    time = datetime.now(UTC).isoformat(timespec="seconds")
    versions = {name: found for name, found in installed_versions((*MADE_BY, "polars", "kaggle")).items() if found != "absent"}
    entry = {"time": time, "event": event, **git_state(), "versions": versions, **fields}
    path = ledger_path()
    try:
        _append(path, json.dumps(entry, default=str) + "\n")
    except OSError as error:
        print(f"warning: {path}: cannot be written ({error.strerror}); it lacks this {event}", file=sys.stderr, flush=True)
    return json.loads(json.dumps(entry, default=str))


def read(path: Path | None = None) -> list[dict]:
    """The entries, oldest first; none where there is no ledger. A line that is no entry (cut short) is left out and told."""
    path = path or ledger_path()
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            lines = file.read().split("\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); make it a readable file") from None
    entries = []
    for number, line in enumerate(lines, 1):
        entry = _entry(line)
        if entry:
            entries.append(entry)
        elif line:
            print(f"warning: {path}: line {number} is no entry (cut short?), and is left out", file=sys.stderr)
    return entries


def fingerprint(path: Path | str) -> str | None:
    """A file's SHA-256, for an entry; None where it cannot be read, which must not end what is recorded."""
    try:
        return sha256(path)
    except OSError:
        return None


def git_state() -> dict[str, str | bool | None]:
    """The working directory's commit, and whether its tracked files differ from it; both None outside a checkout."""
    found = git_commit()
    if found == "unknown":
        return {"git_commit": None, "git_dirty": None}
    return {"git_commit": found.removesuffix("-dirty"), "git_dirty": found.endswith("-dirty")}


def git_commit() -> str:
    """The commit of the working tree, with -dirty where it has changes, or "unknown" outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=GIT_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.strip()


def installed_versions(names: Iterable[str] = MADE_BY) -> dict[str, str]:
    """Versions of installed packages, by name; "absent" for one that is not."""
    versions = {}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "absent"
    return versions


def _append(path: Path, line: str) -> None:
    """Add a line, whole or not at all, on the disk when this returns. A line that a kill has cut stays a line of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        size = os.fstat(file).st_size
        is_cut = size > 0 and os.pread(file, 1, size - 1) != b"\n"
        content = ("\n" * is_cut + line).encode("utf-8")
        if os.write(file, content) < len(content):
            os.ftruncate(file, size)
            raise OSError(0, "no room on the disk")
        os.fsync(file)
    finally:
        os.close(file)


def _entry(line: str) -> dict | None:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError:
        return None
    return entry if isinstance(entry, dict) and entry.get("event") in EVENTS else None
