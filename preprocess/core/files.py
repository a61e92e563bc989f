"""Reading and writing files: writes are atomic, and a file that cannot be used is a UserError.

Every stage writes through this module, so that a killed process never leaves a half-written file or
folder under its final name.
"""

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


@contextlib.contextmanager
def atomic_file(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to.

    It is renamed to `path` when the block succeeds, and removed when the block fails.
    """
    path = Path(path)
    _create_folder(path.parent)

    # The process id keeps two processes that write the same file apart.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")

    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error})") from None
    finally:
        # A name that is too long for the file system cannot be removed either.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yield a new temporary folder beside `path` to fill.

    It replaces `path` when the block succeeds, and is removed when the block fails.
    """
    path = Path(path)
    _create_folder(path.parent)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    # mkdtemp gives the owner alone access, which is not what a finished folder should have.
    temporary.chmod(0o755)

    try:
        yield temporary
        _replace_folder(path, temporary)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def resumable_folder(path: Path | str, key: str, size: int) -> Iterator[Path]:
    """Yield a folder beside `path` to fill, which survives an interruption of the process.

    It replaces `path` when the block succeeds, and is removed when the block raises an Exception. When
    the process is killed or interrupted, the folder stays, and the next call with the same key
    continues in it.

    Args:
        path: The final name of the folder.
        key: Identifies the work, e.g. a hash of its inputs. An empty key never matches.
        size: Bytes that the finished folder will have.

    Raises:
        UserError: The disk has no room for `size` bytes, or fills up during the block.
    """
    path = Path(path)
    _create_folder(path.parent)
    working = path.with_name(f".{path.name}.partial")
    key_file = working / ".key"

    try:
        # Start anew unless an interrupted call with the same key left its folder.
        is_interrupted = key_file.is_file() and key_file.read_text() == key
        if key == "" or not is_interrupted:
            _remove(working)
            working.mkdir()
            key_file.write_text(key)

        # The interrupted call may have died within an atomic_file.
        remove_leftovers(working)
        _require_room(path, working, size)
        yield working

        # The key is no part of the finished folder.
        key_file.unlink()
        _replace_folder(path, working)
    except Exception as error:
        shutil.rmtree(working, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        raise UserError(
            f"{path}: cannot be written ({error}); make room on the disk, then run this again"
        ) from None


def _replace_folder(path: Path, new: Path) -> None:
    """Give the folder `new` the name `path`; a kill leaves a whole folder there, or none.

    A folder cannot be renamed onto one that is not empty, so that the old one has to go first.
    Removing it takes a while, and a kill meanwhile would leave a part of it under the name `path`.
    So the old one is renamed, which takes no time, and is removed in the end.
    """
    # A call that was killed may have left one there.
    old = path.with_name(f".{path.name}.old.tmp")
    _remove(old)

    # lexists, since `path` may be a link to what does not exist any more.
    if os.path.lexists(path):
        os.replace(path, old)
    os.replace(new, path)
    _remove(old)


def _require_room(path: Path, working: Path, size: int) -> None:
    """Raise UserError unless the disk holds what is still missing of `size` bytes in `working`."""
    bytes_written = sum(file.stat().st_size for file in working.iterdir())
    bytes_needed = size - bytes_written
    bytes_free = shutil.disk_usage(path.parent).free

    if bytes_needed > bytes_free:
        raise UserError(
            f"{path}: needs {bytes_needed / 1e9:.1f} GB, {bytes_free / 1e9:.1f} GB are free; "
            "make room, then run this again"
        )


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files and folders of killed processes; nobody else may be writing there."""
    for path in folder.glob(".*.tmp"):
        _remove(path)


def _remove(path: Path) -> None:
    """Remove a file, or a folder with its contents, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _create_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{path}: this folder cannot be made ({error.strerror}); choose another place"
        ) from None


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file, which may have gigabytes, or copy it with its age if links are impossible."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def write_json(path: Path | str, value: object) -> None:
    """Write a value as indented JSON, atomically; escaped, so that lone surrogates survive."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="ascii")


def read_json(path: Path | str):
    """Read a JSON file; raise UserError if it is missing or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: not valid JSON ({error}); write it again with the command that made it"
        ) from None


def read_object(path: Path | str) -> dict:
    """Read a JSON file that holds one object; raise UserError for anything else."""
    values = read_json(path)
    if not isinstance(values, dict):
        raise UserError(
            f"{path}: expected an object, found {type(values).__name__}; "
            "restore it, or write it again with the command that made it"
        )
    return values


def read_yaml(path: Path | str) -> dict:
    """Read a YAML file of keys and values; raise UserError for anything else and for a repeated key."""
    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.load(file, Loader=_UniqueKeyLoader)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        # PyYAML's messages have several lines; a UserError has one.
        message = " ".join(str(error).split())
        raise UserError(f"{path}: not valid YAML: {message}") from None

    if not isinstance(values, dict):
        raise UserError(f"{path}: expected keys and values, found {type(values).__name__}")
    return values


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which alone would silently take the last of two equal keys."""

    def construct_mapping(self, node, deep=False):
        # PyYAML calls this for each mapping, whose node.value is a list of (key, value) nodes.
        line_of_key: dict[str, int] = {}

        for key, _ in node.value:
            # A list or a mapping as a key is an error that the base class reports.
            if not isinstance(key, yaml.ScalarNode):
                continue

            # PyYAML counts lines from 0.
            line = key.start_mark.line + 1
            if key.value in line_of_key:
                raise ValueError(
                    f"the key {key.value} stands in line {line_of_key[key.value]} "
                    f"and again in line {line}; remove one"
                )
            line_of_key[key.value] = line

        return super().construct_mapping(node, deep)


def sha256(path: Path | str) -> str:
    """Return the SHA-256 of a file's bytes as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
