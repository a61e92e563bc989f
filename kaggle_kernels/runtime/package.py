"""A package is read and checked before any device is touched: every byte, every golden token id.

Raises PackageError where a package is not the one that was made; ContractError comes from the package's own model_input.py.
"""

import hashlib
import importlib.abc
import importlib.util
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from tokenizers import Tokenizer

from kaggle_kernels.runtime.settings import Clock, log

HASHING_THREADS = 4  # hashlib lets the others go on; a core does about 1 GB a second
NOT_MOUNTED = ("dataset-metadata.json",)  # Kaggle's client reads this file and leaves it out of the dataset


class PackageError(ValueError):
    """A package is incomplete, damaged, or not what its manifest and contract say."""


@dataclass(frozen=True)
class Package:
    """A checked package: its folder, the parsed contract.json and manifest.json, its own model_input.py, its tokenizer."""

    folder: Path
    contract: object  # model_input.Contract
    manifest: dict
    model_input: ModuleType
    tokenizer: Tokenizer

    def manifest_sha256(self) -> str:
        """What tells this package from others, every file of it being as listed."""
        return hashlib.sha256((self.folder / "manifest.json").read_bytes()).hexdigest()


def read_package(folder: Path | str, clock: Clock | None = None) -> Package:
    """Read the package in `folder`: file hashes, contract, tokenizer and golden token ids are checked, in this order.

    With a `clock`, a line is logged of how long it took to read every byte.
    """
    folder = Path(folder)
    began = time.monotonic()
    manifest = check_manifest(folder)
    if clock:
        size = sum(expected["bytes"] for expected in manifest["files"].values())
        log(clock, f"{folder}: {size / 1e9:.2f} GB as listed, hashed in {time.monotonic() - began:.1f} s")
    model_input = execute_model_input(folder / "model_input.py")
    contract = model_input.read_contract(folder)
    check_hash(folder / "model_input.py", contract.model_input_sha256, "contract.json")
    for name, sha256 in contract.tokenizer_sha256.items():
        check_hash(folder / name, sha256, "contract.json")
    tokenizer = read_tokenizer(folder)
    model_input.check_golden(tokenizer, contract)
    return Package(folder, contract, manifest, model_input, tokenizer)


def check_manifest(folder: Path) -> dict:
    """The parsed manifest.json, once every file that it lists has the bytes that it lists, and none is there besides."""
    if not (folder / "manifest.json").is_file():
        raise PackageError(f"{folder}: manifest.json is missing; package the run again")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    listed = {name: expected for name, expected in manifest["files"].items() if name not in NOT_MOUNTED}
    for name, expected in listed.items():
        path = folder / name
        if not path.is_file():
            raise PackageError(f"{path}: missing, but manifest.json lists it; upload the package again")
        if path.stat().st_size != expected["bytes"]:
            raise PackageError(f"{path}: {path.stat().st_size} bytes, manifest.json says {expected['bytes']}; upload it again")
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        for _ in pool.map(lambda name: check_hash(folder / name, listed[name]["sha256"], "manifest.json"), listed):
            pass
    present = {path.name for path in folder.iterdir() if path.is_file()}
    unlisted = sorted(present - set(manifest["files"]) - {"manifest.json", *NOT_MOUNTED})
    if unlisted:
        raise PackageError(f"{folder}: {', '.join(unlisted)} not listed in manifest.json; package the run again")
    return manifest


def check_hash(path: Path, expected: str, source: str) -> None:
    """Raise PackageError unless the SHA-256 of the file at `path` is `expected`, as `source` says."""
    if not path.is_file():
        raise PackageError(f"{path}: missing, but {source} lists it; package the run again")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise PackageError(f"{path}: its SHA-256 is {found[:12]}…, {source} says {expected[:12]}…; the file has changed")


class _SourceOnly(importlib.abc.SourceLoader):
    """Loads a module from its source, never from a cached compilation, and writes none beside it."""

    def __init__(self, path: Path):
        self.path = path

    def get_filename(self, fullname: str) -> str:
        return str(self.path)

    def get_data(self, path: str) -> bytes:
        return Path(path).read_bytes()


def execute_model_input(path: Path) -> ModuleType:
    """The module in `path`, under a name of its own, so that packages with different copies can live side by side."""
    name = f"model_input_{hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"
    loader = _SourceOnly(path)
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location(name, path, loader=loader))
    sys.modules[name] = module
    loader.exec_module(module)
    return module


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in tokenizer.json, as training saved it: no class of transformers can rebuild it differently."""
    if not (folder / "tokenizer.json").is_file():
        raise PackageError(f"{folder}: tokenizer.json is missing; package the run again")
    return Tokenizer.from_file(str(folder / "tokenizer.json"))
