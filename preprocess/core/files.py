"""Reading and writing files so that nothing half-written is ever left under its final name."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import yaml

from preprocess.core.errors import UserError


class _EachKeyOnce(yaml.SafeLoader):
    """PyYAML's safe loader, which would take the last of two equal keys without a word."""

    def construct_mapping(self, node, deep=False):
        first: dict[str, yaml.ScalarNode] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if first.setdefault(key.value, key) is not key:
                lines = first[key.value].start_mark.line + 1, key.start_mark.line + 1
                raise ValueError(f"the key {key.value} stands in line {lines[0]} and again in line {lines[1]}; remove one")
        return super().construct_mapping(node, deep)


@contextlib.contextmanager
def atomic_file(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes that name when the block succeeds and is removed when it fails."""
    path = Path(path)
    _make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error})") from None
    finally:
        with contextlib.suppress(OSError):  # a name too long for the file system is not there to be removed
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yield a new temporary folder beside `path`; it replaces `path` when the block succeeds and is removed when it fails."""
    path = Path(path)
    _make_folder(path.parent)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    temporary.chmod(0o755)
    try:
        yield temporary
        _remove(path)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files and folders that a killed process left in `folder`; no other may be writing there."""
    for path in folder.glob(".*.tmp"):
        _remove(path)


def _remove(path: Path) -> None:
    """Remove a file, or a folder and what is in it, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def resumable_folder(path: Path | str, key: str, size: int) -> Iterator[Path]:
    """Yield a folder beside `path` that takes its name when the block succeeds and is removed when it fails.

    Where the process is killed or interrupted, the folder stays, and the next call with the same `key`, which is not empty,
    gets it as it is, to go on from. Raises UserError where the disk has no room for `size` bytes, or fills up meanwhile.
    """
    path = Path(path)
    _make_folder(path.parent)
    working = path.with_name(f".{path.name}.partial")
    note = working / ".key"
    try:
        if not key or not note.is_file() or note.read_text() != key:
            _remove(working)
            working.mkdir()
            note.write_text(key)
        remove_leftovers(working)
        needed, free = size - sum(file.stat().st_size for file in working.iterdir()), shutil.disk_usage(path.parent).free
        if needed > free:
            raise UserError(
                f"{path}: needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; make room, then run this again"
            )
        yield working
        note.unlink()
        _remove(path)
        os.replace(working, path)
    except Exception as error:
        shutil.rmtree(working, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"{path}: cannot be written ({error}); make room on the disk, then run this again") from None
        raise


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: this folder cannot be made ({error.strerror}); choose another place") from None


def link_or_copy(source: Path, target: Path) -> None:
    """A second name for the same bytes, which may be gigabytes; a copy of the same age where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def write_json(path: Path | str, value: object) -> None:
    """Write `value` as indented JSON, atomically. Non-ASCII stays escaped, so that lone surrogates survive."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="ascii")


def read_json(path: Path | str):
    """Read a JSON file; a missing or broken one is a UserError."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); write it again with the command that made it") from None


def read_object(path: Path | str) -> dict:
    """Read a JSON file that holds one object; anything else is a UserError."""
    values = read_json(path)
    if not isinstance(values, dict):
        raise UserError(
            f"{path}: expected an object, found {type(values).__name__}; write it again with the command that made it"
        )
    return values


def read_yaml(path: Path | str) -> dict:
    """Read a YAML file of keys and values, each key once; anything else is a UserError."""
    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.load(file, Loader=_EachKeyOnce)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected keys and values, found {type(values).__name__}")
    return values


def sha256(path: Path | str) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
