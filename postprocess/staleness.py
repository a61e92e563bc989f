"""Stages that are skipped while they are up to date, by a record in the run folder of what each was made from.

`postprocess.json` holds for each stage a hash of its inputs (names, sizes, modification times), its settings and the code,
and the sizes and modification times of its outputs. Nothing here imports torch.
"""

import errno
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import click

from preprocess.core.errors import UserError
from preprocess.core.files import read_json, write_json

RECORD = "postprocess.json"
FULL = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))  # libraries raise it as errors of their own
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "safetensors")
SHARED_CODE = Path(__file__).parents[1] / "kaggle_kernels" / "runtime"


def run_stage(
    run_folder: Path,
    name: str,
    inputs: Iterable[Path],
    settings: Mapping[str, object],
    output: Path | Sequence[Path],
    action: Callable[[], None],
    before: Callable[[], object] = lambda: None,
) -> bool:
    """Call `action`, which makes `output`, unless it is up to date; print the stage and its seconds.

    `output` is a file, a folder, or several files, of which the first is written last. `before` is called first, outside
    the clock. Returns whether the stage was made. The record is written only once `action` has succeeded.
    """
    outputs = [output] if isinstance(output, Path) else list(output)
    inputs = list(inputs)
    if is_current(run_folder, name, inputs, settings, outputs):
        click.echo(f"{name:<10} up to date   {outputs[0]}")
        return False
    key = stage_key(inputs, settings)  # now: what changes meanwhile is not in what is made
    before()
    started = time.perf_counter()
    try:
        action()
    except Exception as error:
        if isinstance(error, UserError) or not any(full in str(error) for full in FULL):
            raise
        raise UserError(f"{outputs[0]}: cannot be written ({error}); make room on the disk, then run this again") from None
    seconds = round(time.perf_counter() - started, 1)
    made = {"key": key, "outputs": _stamps(_files(outputs)), "seconds": seconds}
    write_json(run_folder / RECORD, {**_record(run_folder), name: made})
    click.echo(f"{name:<10} {seconds:7.1f} s   {outputs[0]}")
    return True


def is_current(
    run_folder: Path, name: str, inputs: Iterable[Path], settings: Mapping[str, object], outputs: Sequence[Path]
) -> bool:
    """Whether the stage `name` was made from just this and is all there still."""
    known = _record(run_folder).get(name, {})
    made = outputs[0].exists() and known.get("outputs") == _stamps(_files(outputs))
    return made and known.get("key") == stage_key(inputs, settings)


def _record(run_folder: Path) -> dict[str, dict]:
    file = run_folder / RECORD
    record = read_json(file) if file.exists() else {}
    if not isinstance(record, dict) or not all(isinstance(made, dict) for made in record.values()):
        raise UserError(f"{file}: expected an object of stages; remove the file, and every stage is made again")
    return record


def stage_key(inputs: Iterable[Path], settings: Mapping[str, object]) -> str:
    """A hash of everything that decides what a stage makes: inputs, settings, our code and the libraries' versions."""
    code = [path for folder in (Path(__file__).parent, SHARED_CODE) for path in sorted(folder.glob("*.py"))]
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in code]
    versions = {library: version(library) for library in LIBRARIES}
    facts = [_stamps(inputs), dict(settings), hashes, versions]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _files(outputs: Iterable[Path]) -> list[Path]:
    return [path for one in outputs for path in (sorted(one.rglob("*")) if one.is_dir() else [one]) if path.is_file()]


def _stamps(paths: Iterable[Path]) -> dict[str, list[int]]:
    stamps = {str(path): path.stat() for path in paths if path.exists()}
    return {name: [stamp.st_size, stamp.st_mtime_ns] for name, stamp in stamps.items()}
