"""The files that may go up: those that a package is defined to have, and nothing else, each checked for its kind.

Weights are safetensors with a sound header, JSON follows a schema, and our Python is the file whose hash training wrote down.
Every file has the bytes that the manifest lists. What nobody defined does not leave this machine.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open

from kaggle_kernels.runtime.visible import VALIDATION_IDS
from postprocess.package import MANIFEST, METADATA
from postprocess.wheels.build import MANIFEST as WHEELS_MANIFEST
from preprocess.core.errors import UserError
from preprocess.core.files import read_object, sha256
from preprocess.model_input import Contract
from recipes.pairwise.contract import MODEL_INPUT, TOKENIZER_FILES

CONTRACT = "contract.json"
CONFIG = "config.json"
REMAKE = "make the folder again"


class Strict(BaseModel):
    """A JSON file of ours: no key but these."""

    model_config = ConfigDict(extra="forbid")


class Open(BaseModel):
    """A JSON file of a library, which adds keys of its own."""

    model_config = ConfigDict(extra="allow")


class FileFacts(Strict):
    """What a manifest says of a file."""

    sha256: str
    bytes: int


class Manifest(Strict):
    """manifest.json of a package."""

    files: dict[str, FileFacts]
    golden: list[dict]
    quantize: str
    adapter: str | None = None
    dtype: str | None = None
    base_model: str | None = None
    revision: str | None = None
    validation: dict | None = None
    temperature: dict | None = None


class WheelFacts(FileFacts):
    """What wheels.json says of a wheel."""

    model_config = ConfigDict(extra="allow")

    file: str


class WheelsManifest(Open):
    """wheels.json."""

    wheels: list[WheelFacts]


class DatasetMetadata(Strict):
    """dataset-metadata.json; Kaggle's rules for the values are checked elsewhere."""

    id: str
    title: str
    licenses: list[dict]


class ValidationIds(Strict):
    """validation_ids.json."""

    fold: int | str
    trained_on: bool
    ids: list[str]


class ModelConfig(Open):
    """config.json of transformers."""

    model_type: str


class Tokenizer(Open):
    """tokenizer.json of tokenizers."""

    model: dict


class WeightIndex(Strict):
    """model.safetensors.index.json."""

    metadata: dict[str, Any]
    weight_map: dict[str, str]


SCHEMAS = {
    CONFIG: ModelConfig,
    MANIFEST: Manifest,
    METADATA: DatasetMetadata,
    VALIDATION_IDS: ValidationIds,
    WHEELS_MANIFEST: WheelsManifest,
    "generation_config.json": Open,  # GPTQ's library writes it beside a causal LM
    "lora_config.json": Open,
    "model.safetensors.index.json": WeightIndex,
    "tokenizer.json": Tokenizer,
    "tokenizer_config.json": Open,
    "special_tokens_map.json": Open,
    "added_tokens.json": Open,
}

# By regular expressions: weights may be in several files.
WEIGHTS = r"(model(-\d{5}-of-\d{5})?|lora)\.safetensors"
PACKAGE_FILES = "|".join(
    [
        WEIGHTS,
        *(re.escape(name) for name in SCHEMAS if name != WHEELS_MANIFEST),
        *(re.escape(name) for name in (CONTRACT, MODEL_INPUT.name, *TOKENIZER_FILES)),
    ]
)
WHEELS_FILES = "|".join([r"[\w.+-]+\.whl", re.escape(WHEELS_MANIFEST), re.escape(METADATA)])
REQUIRED_FILES = (CONTRACT, CONFIG, METADATA, MODEL_INPUT.name, "tokenizer.json")


def check_package(folder: Path) -> list[str]:
    """List what is wrong with the files of a package; every byte is read."""
    # The manifest may lack a file that the kernel needs.
    listed = read_object(folder / MANIFEST).get("files")
    problems = check_folder(folder, MANIFEST, listed, PACKAGE_FILES)
    for name in REQUIRED_FILES:
        if not (folder / name).is_file():
            problems.append(f"{folder / name}: missing, a package has it; {REMAKE}")
    if not list(folder.glob("model*.safetensors")):
        problems.append(f"{folder}: no model*.safetensors; {REMAKE}")
    return problems


def check_wheels(folder: Path) -> list[str]:
    """List what is wrong with the files of the folder of wheels."""
    wheels = read_object(folder / WHEELS_MANIFEST).get("wheels")
    try:
        listed = {wheel["file"]: wheel for wheel in wheels}
    except (TypeError, KeyError):
        listed = None
    return check_folder(folder, WHEELS_MANIFEST, listed, WHEELS_FILES)


def check_folder(folder: Path, manifest: str, listed: object, allowed: str) -> list[str]:
    """Compare a folder with its manifest's files, and with the names that it is defined to hold; a line for each problem."""
    # The manifest is read before its own schema is checked.
    if not isinstance(listed, Mapping) or not all(isinstance(f, Mapping) for f in listed.values()):
        return [f"{folder / manifest}: expected files with sha256 and bytes; {REMAKE}"]

    # In the manifest, and not in the folder; then the other way round.
    problems = []
    for name in listed:
        if not (folder / name).is_file():
            problems.append(f"{folder / name}: missing; {REMAKE}")

    for path in sorted(folder.iterdir()):
        # The metadata's owner may have been filled in, and no kernel sees it.
        is_unlisted = path.name in (manifest, METADATA)
        facts = listed.get(path.name)
        if not path.is_file():
            problems.append(f"{path}: no file; a dataset of ours is flat; remove it")
        elif not re.fullmatch(allowed, path.name):
            problems.append(f"{path}: no file that such a folder is defined to have; remove it")
        elif facts is None and not is_unlisted:
            problems.append(f"{path}: not in {manifest}, so that nobody checked it; {REMAKE}")
        elif not is_unlisted and not is_unchanged(path, facts):
            problems.append(
                f"{path}: changed since it was made, {manifest} has another size or SHA-256; {REMAKE}"
            )
        else:
            problems.extend(check_kind(path))
    return problems


def is_unchanged(path: Path, facts: Mapping) -> bool:
    """Whether a file has the bytes that the manifest lists."""
    # The size first: the hash of gigabytes takes a minute.
    return path.stat().st_size == facts.get("bytes") and sha256(path) == facts.get("sha256")


def check_kind(path: Path) -> list[str]:
    """Check that a file is what its name says; a line for each problem."""
    try:
        if path.suffix == ".safetensors":
            check_safetensors(path)
        elif path.name == CONTRACT:
            check_contract(path)
        elif path.name == MODEL_INPUT.name:
            check_model_input(path)
        elif path.name in SCHEMAS:
            SCHEMAS[path.name].model_validate(read_object(path))
    # The first problem of a file will do: it is made again as a whole.
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        return [f"{path}: {key}: {first['msg'].lower()}; {REMAKE}"]
    except UserError as error:
        return [str(error)]
    return []


def check_safetensors(path: Path) -> None:
    """Raise UserError unless the header describes exactly the bytes of the file, of which only the header is read."""
    try:
        with safe_open(path, framework="np") as file:
            file.keys()
    except SafetensorError as error:
        raise UserError(f"{path}: no sound safetensors file ({error}); {REMAKE}") from None


def check_contract(path: Path) -> None:
    """Raise UserError unless contract.json has exactly the keys of a contract."""
    # The kernel reads the values; a key of its own could carry anything.
    keys = set(read_object(path))
    expected = set(Contract.__dataclass_fields__)
    if keys != expected:
        names = ", ".join(sorted(keys ^ expected))
        raise UserError(f"{path}: unknown or missing keys: {names}; {REMAKE}")


def check_model_input(path: Path) -> None:
    """Raise UserError unless model_input.py is the one whose hash training wrote into the contract."""
    contract = path.with_name(CONTRACT)
    expected = read_object(contract).get("model_input_sha256") if contract.is_file() else None
    if sha256(path) != expected:
        raise UserError(
            f"{path}: not the file that the model was trained with, says {CONTRACT}; {REMAKE}"
        )
