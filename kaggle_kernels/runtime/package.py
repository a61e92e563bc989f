"""A package is read and checked before any device is touched: every byte, every golden token id.

Raises PackageError where a package is not the one that was made; ContractError comes from the package's own model_input.py.
"""

import hashlib
import importlib.abc
import importlib.util
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from tokenizers import Tokenizer

# hashlib lets other threads go on. A core does about 1 GB a second.
HASHING_THREADS = 4

# Kaggle's client reads these files and leaves them out of the dataset.
NOT_MOUNTED = ("dataset-metadata.json",)


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


def read_package(folder: Path | str) -> Package:
    """Read a package and check it: file hashes, contract, tokenizer, and token ids of twenty awkward pairs, the golden rows.

    Raises:
        PackageError: A file is missing, has changed, or is not listed.
        ContractError: The package's own model_input.py finds that a golden row has other token ids.
    """
    folder = Path(folder)
    check_manifest(folder)
    package = open_package(folder)

    # What decides a model's input is in the contract too: a new manifest cannot hide a change of it.
    contract = package.contract
    check_hash(folder / "model_input.py", contract.model_input_sha256, "contract.json")
    for name, sha256 in contract.tokenizer_sha256.items():
        check_hash(folder / name, sha256, "contract.json")

    # Another version of the tokenizers library may encode otherwise.
    package.model_input.check_golden(package.tokenizer, contract)
    return package


def open_package(folder: Path) -> Package:
    """Open a package whose files were checked before."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    model_input = execute_model_input(folder / "model_input.py")
    contract = model_input.read_contract(folder)
    return Package(folder, contract, manifest, model_input, read_tokenizer(folder))


def check_manifest(folder: Path) -> None:
    """Check that the folder has just the files that manifest.json lists, unchanged."""
    manifest_path = folder / "manifest.json"
    if not manifest_path.is_file():
        raise PackageError(f"{folder}: manifest.json is missing; package the run again")
    manifest = json.loads(manifest_path.read_text(encoding="utf-8"))

    # Reading every byte takes a minute or two: several files at a time.
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        checks = []
        for name, listed in manifest["files"].items():
            if name not in NOT_MOUNTED:
                path = folder / name
                checks.append(pool.submit(check_hash, path, listed["sha256"], "manifest.json"))

        # The error of a check is raised when its result is asked for.
        for check in checks:
            check.result()

    # A file that nobody packaged may be one that transformers would read.
    expected_names = {"manifest.json", *manifest["files"], *NOT_MOUNTED}
    present_names = {path.name for path in folder.iterdir() if path.is_file()}
    unlisted = sorted(present_names - expected_names)
    if unlisted:
        raise PackageError(
            f"{folder}: {', '.join(unlisted)} not listed in manifest.json; package the run again"
        )


def hash_file(path: Path) -> str:
    """Compute a file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_hash(path: Path, expected: str, source: str) -> None:
    """Raise PackageError unless the SHA-256 of the file at `path` is `expected`, as `source` says."""
    if not path.is_file():
        raise PackageError(f"{path}: missing, but {source} lists it; package the run again")
    sha256 = hash_file(path)
    if sha256 != expected:
        raise PackageError(
            f"{path}: its SHA-256 is {sha256[:12]}…, but {source} says {expected[:12]}…: the file has "
            "changed; package the run again"
        )


class _SourceOnly(importlib.abc.SourceLoader):
    """Loads a module from its source, never from a cached compilation, and writes none beside it."""

    def __init__(self, path: Path):
        self.path = path

    def get_filename(self, fullname: str) -> str:
        return str(self.path)

    def get_data(self, path: str) -> bytes:
        return Path(path).read_bytes()


def execute_model_input(path: Path) -> ModuleType:
    """Import the module at `path` under a name of its own, so that packages with different copies can live side by side."""
    name = f"model_input_{hash_file(path)[:12]}"
    loader = _SourceOnly(path)
    module_spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    module = importlib.util.module_from_spec(module_spec)

    # Its dataclasses look their module up by name.
    sys.modules[name] = module
    loader.exec_module(module)
    return module


def read_tokenizer(folder: Path) -> Tokenizer:
    """Read tokenizer.json, as training saved it: no class of transformers can rebuild it differently."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise PackageError(f"{folder}: tokenizer.json is missing; package the run again")
    return Tokenizer.from_file(str(path))
