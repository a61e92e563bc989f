"""Skip a stage of postprocessing while it is up to date.

`postprocess.json` in the run folder records what each stage was made from: its inputs
and outputs, its settings, its code and the libraries' versions. Small files count by their content,
large ones by size and modification time. pipeline.py calls this. Nothing here imports torch.
"""

import contextlib
import errno
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import click

from preprocess.core.errors import UserError
from preprocess.core.files import read_json, sha256, write_json

ROOT = Path(__file__).parents[1]
RECORD = "postprocess.json"
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "safetensors")
# Hashing gigabytes at every start would take minutes.
LARGEST_HASHED_BYTES = 2**20
# Libraries raise a full disk as errors of their own, with the system's words in them.
FULL_DISK_MESSAGES = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))


@dataclass(frozen=True)
class Stage:
    """One step from a run to its package, with everything that decides its result.

    `outputs` are the files or folders that it makes, the one that is written last in front.
    """

    run_folder: Path  # holds the record
    name: str  # in the record and on the screen
    inputs: Sequence[Path]  # those that do not exist are left out
    settings: Mapping[str, object]  # the options that change the result
    outputs: Sequence[Path]
    # The source files, and folders of them, that decide the result; see stage_code.py.
    code: Sequence[str]


def is_current(stage: Stage) -> bool:
    """Whether the stage's outputs are unchanged, and were made from what it would read now."""
    recorded = read_record(stage.run_folder).get(stage.name)
    if recorded is None or not stage.outputs[0].exists():
        return False

    if recorded.get("outputs") != file_stamps(files_in(stage.outputs)):
        return False
    return recorded.get("key") == stage_key(stage)


def skip_if_current(stage: Stage) -> bool:
    """Print that a stage is up to date, if it is; the caller then skips it."""
    if not is_current(stage):
        return False

    click.echo(f"{stage.name:<10} up to date   {stage.outputs[0]}")
    return True


@contextlib.contextmanager
def making(stage: Stage) -> Iterator[str]:
    """Time the block that makes a stage's outputs, and record the stage once the block succeeds.

    Yields:
        The stage's key, under which an interrupted merge can continue.

    Raises:
        UserError: The disk is full.
    """
    # The key is computed before the block runs. If an input changes meanwhile, the stage is out of date.
    key = stage_key(stage)
    started = time.perf_counter()

    try:
        yield key
    except UserError:
        raise
    except Exception as error:
        # Each library has an error of its own for a full disk. The message is the same in all of them.
        if not any(message in str(error) for message in FULL_DISK_MESSAGES):
            raise
        raise UserError(
            f"{stage.outputs[0]}: cannot be written ({error}); make room on the disk, then run this again"
        ) from None

    # Recorded only now: a stage that was interrupted is made again.
    seconds = time.perf_counter() - started
    record = read_record(stage.run_folder)
    record[stage.name] = {
        "key": key,
        "outputs": file_stamps(files_in(stage.outputs)),
        "seconds": round(seconds, 1),
    }
    write_json(stage.run_folder / RECORD, record)
    click.echo(f"{stage.name:<10} {seconds:7.1f} s   {stage.outputs[0]}")


def stage_key(stage: Stage) -> str:
    """Hash everything that decides a stage's result: inputs, settings, code, library versions."""
    facts = [
        file_stamps(stage.inputs),
        dict(stage.settings),
        code_hashes(stage.code),
        {library: version(library) for library in LIBRARIES},
    ]
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def code_hashes(code: Iterable[str]) -> dict[str, str]:
    """Hash source files by content, so that a fresh checkout of the same code changes nothing.

    Raises:
        FileNotFoundError: A path does not exist; code that moved must not leave the key unnoticed.
    """
    hashes = {}
    for name in code:
        path = ROOT / name
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
        for file in files:
            hashes[str(file.relative_to(ROOT))] = hashlib.sha256(file.read_bytes()).hexdigest()
    return hashes


def read_record(run_folder: Path) -> dict[str, dict]:
    """Read what the run folder's stages were made from; nothing before the first stage is made."""
    file = run_folder / RECORD
    if not file.exists():
        return {}

    stages = read_json(file)
    is_record = isinstance(stages, dict)
    if not is_record or not all(isinstance(facts, dict) for facts in stages.values()):
        raise UserError(
            f"{file}: expected an object of stages; remove the file, and every stage is made again"
        )
    return stages


def files_in(outputs: Iterable[Path]) -> list[Path]:
    """List the files among a stage's outputs, of a folder all files in it."""
    files = []
    for output in outputs:
        paths = sorted(output.rglob("*")) if output.is_dir() else [output]
        for path in paths:
            if path.is_file():
                files.append(path)
    return files


def file_stamps(paths: Iterable[Path]) -> dict[str, str | list[int]]:
    """Collect for each file what shows whether it has changed since.

    Returns:
        By path: the SHA-256 of a small file; size and time of modification (ns) of a large one, which
        would take long to hash. Files that do not exist are left out.
    """
    stamps = {}
    for path in paths:
        if not path.exists():
            continue
        status = path.stat()
        if status.st_size <= LARGEST_HASHED_BYTES:
            stamps[str(path)] = sha256(path)
        else:
            stamps[str(path)] = [status.st_size, status.st_mtime_ns]
    return stamps
