"""The files that may go up: those that a package is defined to have, and nothing else, each checked for its kind.

Weights are safetensors with a sound header, JSON follows a schema, and our Python is the file whose hash training wrote down.
Every file has the bytes that the manifest lists. What nobody defined does not leave this machine.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from safetensors import SafetensorError, safe_open

from kaggle_kernels.runtime.visible import VALIDATION_IDS
from postprocess.package import MANIFEST, METADATA
from postprocess.wheels.build import MANIFEST as WHEELS_MANIFEST
from preprocess.core.errors import UserError
from preprocess.core.files import read_object, sha256
from preprocess.model_input import Contract
from recipes.pairwise.contract import MODEL_INPUT, TOKENIZER_FILES

CONTRACT = "contract.json"
REMAKE = "make the folder again"


class Strict(BaseModel):
    """A JSON file of ours: no key but these."""

    model_config = ConfigDict(extra="forbid")


class ListedFile(BaseModel):
    """What a manifest says of a file."""

    sha256: str
    bytes: int


class Manifest(Strict):
    """manifest.json of a package."""

    files: dict[str, ListedFile]
    golden: list[dict]
    quantize: str
    adapter: str | None = None
    dtype: str | None = None
    base_model: str | None = None
    revision: str | None = None
    validation: dict | None = None
    temperature: dict | None = None


class Wheel(ListedFile):
    """What wheels.json says of a wheel."""

    file: str = Field(pattern=r"^[\w.+-]+\.whl$")


class WheelsManifest(BaseModel):
    """wheels.json."""

    wheels: list[Wheel]


class DatasetMetadata(Strict):
    """dataset-metadata.json; Kaggle has rules for the values."""

    id: str
    title: str
    licenses: list[dict]


class ValidationIds(Strict):
    """validation_ids.json."""

    fold: int | str
    trained_on: bool
    ids: list[str]


# contract.json: the kernel reads the values, but a key of its own could carry anything.
CONTRACT_FIELDS = dict.fromkeys(Contract.__dataclass_fields__, (Any, ...))
ContractKeys = create_model("ContractKeys", __base__=Strict, **CONTRACT_FIELDS)

# What libraries write, with the keys without which it is not what its name says.
LIBRARY_KEYS = {
    "config.json": {"model_type"},
    "generation_config.json": set(),  # GPTQ's library writes it beside a causal LM
    "lora_config.json": set(),
    "model.safetensors.index.json": {"weight_map"},
    "tokenizer.json": {"model"},
    "tokenizer_config.json": set(),
    "special_tokens_map.json": set(),
    "added_tokens.json": set(),
}
SCHEMAS = {
    MANIFEST: Manifest,
    METADATA: DatasetMetadata,
    CONTRACT: ContractKeys,
    VALIDATION_IDS: ValidationIds,
}
PACKAGE_NAMES = (*LIBRARY_KEYS, *SCHEMAS, MODEL_INPUT.name, *TOKENIZER_FILES)
REQUIRED_NAMES = (CONTRACT, "config.json", METADATA, MODEL_INPUT.name, "tokenizer.json")

# Weights may be in several files.
WEIGHTS = re.compile(r"(model(-\d{5}-of-\d{5})?|lora)\.safetensors")


def check_package(folder: Path) -> list[str]:
    """List what is wrong with the files of a package, a line for each problem; every byte is read."""
    try:
        manifest = read_as(Manifest, folder / MANIFEST)
    except UserError as error:
        return [str(error)]

    # Where files differ from the manifest, the package must be made again: no need to look into them.
    problems = compare_with_manifest(folder, MANIFEST, manifest.files)
    if problems:
        return problems

    # The manifest itself may lack a file that the kernel needs.
    for name in REQUIRED_NAMES:
        if not (folder / name).is_file():
            problems.append(f"{folder / name}: missing, but every package has it; {REMAKE}")
    if not list(folder.glob("model*.safetensors")):
        problems.append(f"{folder}: no model*.safetensors; {REMAKE}")

    # Or it may list one that no package has.
    for path in sorted(folder.iterdir()):
        is_defined = path.name in PACKAGE_NAMES or WEIGHTS.fullmatch(path.name)
        if path.name in manifest.files and not is_defined:
            problems.append(f"{path}: no file that a package is defined to have; remove it")
        elif path.is_file():
            problems.extend(check_kind(path))
    return problems


def check_wheels(folder: Path) -> list[str]:
    """List what is wrong with the files of the folder of wheels."""
    try:
        manifest = read_as(WheelsManifest, folder / WHEELS_MANIFEST)
        read_as(DatasetMetadata, folder / METADATA)
    except UserError as error:
        return [str(error)]
    # No file but wheels can be listed.
    wheels = {wheel.file: wheel for wheel in manifest.wheels}
    return compare_with_manifest(folder, WHEELS_MANIFEST, wheels)


def compare_with_manifest(
    folder: Path, manifest: str, listed: Mapping[str, ListedFile]
) -> list[str]:
    """Compare a folder's files with what its manifest lists, byte by byte; a line for each problem."""
    problems = []
    for name, expected in listed.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{path}: missing; {REMAKE}")
            continue

        # The user may have filled an owner into the metadata, which no kernel sees.
        if name == METADATA:
            continue

        # The size first: the hash of gigabytes takes a minute.
        if path.stat().st_size != expected.bytes or sha256(path) != expected.sha256:
            problems.append(
                f"{path}: changed since it was made, as {manifest} lists another size or SHA-256; {REMAKE}"
            )

    for path in sorted(folder.iterdir()):
        if path.name not in listed and path.name not in (manifest, METADATA):
            problems.append(f"{path}: not in {manifest}, so that nobody checked it; remove it")
    return problems


def check_kind(path: Path) -> list[str]:
    """Check that a file's content is of the kind that its name says.

    Returns:
        The first problem, as a list of one line; empty where there is none.
    """
    try:
        if path.suffix == ".safetensors":
            check_safetensors(path)
        elif path.name == MODEL_INPUT.name:
            check_model_input(path)
        elif path.name in SCHEMAS:
            read_as(SCHEMAS[path.name], path)
        elif path.name in LIBRARY_KEYS:
            check_keys(path, LIBRARY_KEYS[path.name])
    except UserError as error:
        return [str(error)]
    return []


def read_as(schema: type[BaseModel], path: Path):
    """Read a JSON file as `schema` describes it; UserError names the first key that does not follow that."""
    try:
        return schema.model_validate(read_object(path))
    except ValidationError as error:
        first_problem = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(str(part) for part in first_problem["loc"])
        raise UserError(f"{path}: {key}: {first_problem['msg'].lower()}; {REMAKE}") from None


def check_safetensors(path: Path) -> None:
    """Raise UserError unless the header describes exactly the bytes of the file, of which only the header is read."""
    try:
        with safe_open(path, framework="np") as file:
            file.keys()
    except SafetensorError as error:
        raise UserError(f"{path}: no sound safetensors file ({error}); {REMAKE}") from None


def check_keys(path: Path, required: set[str]) -> None:
    """Raise UserError where a library's JSON file lacks a key."""
    missing = required - read_object(path).keys()
    if missing:
        raise UserError(f"{path}: lacks {', '.join(missing)}; {REMAKE}")


def check_model_input(path: Path) -> None:
    """Raise UserError unless model_input.py is the one whose hash training wrote into the contract."""
    contract = path.with_name(CONTRACT)
    expected = read_object(contract).get("model_input_sha256") if contract.is_file() else None
    if sha256(path) != expected:
        raise UserError(
            f"{path}: not the file that the model was trained with: {CONTRACT} has another SHA-256; {REMAKE}"
        )
