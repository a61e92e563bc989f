"""A run folder read and checked before any work: its weights, its contract, the code that made its ids, its base model.

Starts fast: nothing here imports torch.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from kaggle_kernels.runtime.package import execute_model_input
from preprocess.errors import UserError
from preprocess.files import read_json, sha256
from preprocess.model_input import Contract
from recipes.pairwise.schema import Recipe

ADAPTER = ("adapter_model.safetensors", "adapter_config.json")
MODEL_PATTERN = "model*.safetensors*"


@dataclass(frozen=True)
class Run:
    """A trained run. `weights` is the folder of the base model, or for a full fine-tune the run folder itself."""

    recipe: Recipe
    folder: Path
    contract: Contract
    model_input: ModuleType
    weights: Path
    has_adapter: bool

    def tokenizer_files(self) -> list[Path]:
        """The tokenizer's files, as the contract lists them."""
        return [self.folder / name for name in self.contract.tokenizer_sha256]

    def source_files(self) -> list[Path]:
        """Every file that decides the merged weights."""
        adapter = [self.folder / name for name in ADAPTER] if self.has_adapter else []
        weights = [*sorted(self.weights.glob(MODEL_PATTERN)), self.weights / "config.json"]
        return [*weights, *adapter, self.folder / "contract.json", *self.tokenizer_files()]

    def validation_files(self) -> list[Path]:
        """The files with the rows that models are compared on: the recipe's pairs and training's predictions."""
        return [Path(self.recipe.pairwise.pairs), self.folder / "predictions.parquet"]


def read_run(recipe: Recipe) -> Run:
    """The run of `recipe`, checked. Everything that the user can mend is a UserError."""
    folder = recipe.run_folder
    has_adapter = _find_weights(folder, recipe.path)
    for name in ("contract.json", "model_input.py"):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder}: weights without {name}, so it is unknown how they were trained; train again with "
                f"axolotl train {recipe.path}, with recipes.pairwise.plugin among its plugins"
            )
    contract, model_input = read_contract(folder)
    for name, expected in contract.tokenizer_sha256.items():
        if not (folder / name).is_file() or sha256(folder / name) != expected:
            raise UserError(f"{folder / name}: missing or changed since training; contract.json holds another SHA-256")
    weights = find_base(contract) if has_adapter else folder
    run = Run(recipe, folder, contract, model_input, weights, has_adapter)
    for file in run.validation_files():
        if not file.is_file():
            raise UserError(f"{file}: no such file; the package is checked on the validation rows of the training")
    return run


def _find_weights(folder: Path, recipe: Path) -> bool:
    """Whether `folder` holds an adapter (True) or a full model (False)."""
    has_adapter = (folder / ADAPTER[0]).is_file()
    has_model = any(folder.glob(MODEL_PATTERN))
    if has_adapter and has_model:
        raise UserError(f"{folder}: holds an adapter and a full model; remove the one that is not from the last training")
    if not has_adapter and not has_model:
        found = "no adapter_model.safetensors and no model.safetensors" if folder.is_dir() else "no such folder"
        raise UserError(f"{folder}: {found}; train it first with axolotl train {recipe}")
    missing = ADAPTER[1] if has_adapter else "config.json"
    if not (folder / missing).is_file():
        raise UserError(f"{folder}: weights without {missing}; train it again with axolotl train {recipe}")
    return has_adapter


def read_contract(folder: Path) -> tuple[Contract, ModuleType]:
    """The contract of a run, and the run's own model_input.py, executed once its hash is the contract's."""
    expected = read_json(folder / "contract.json").get("model_input_sha256")
    found = sha256(folder / "model_input.py")
    if found != expected:
        raise UserError(
            f"{folder / 'model_input.py'}: SHA-256 is {found[:12]}…, contract.json says {str(expected)[:12]}…; the file has "
            "changed since training: restore it or train again"
        )
    model_input = execute_model_input(folder / "model_input.py")
    try:
        contract = model_input.read_contract(folder)
    except (model_input.ContractError, TypeError) as error:
        raise UserError(f"{folder / 'contract.json'}: {error}") from None
    if contract.head != "score":
        raise UserError(f"{folder / 'contract.json'}: head is {contract.head!r}; only 'score' can be packaged")
    if contract.num_labels != len(contract.verdicts):
        raise UserError(
            f"{folder / 'contract.json'}: {contract.num_labels} labels for {len(contract.verdicts)} verdicts; train again"
        )
    return contract, model_input


def find_base(contract: Contract) -> Path:
    """The folder of the contract's base model: the folder that it names, or a snapshot of the hub's repository."""
    name, revision = contract.base_model, contract.revision
    if (Path(name) / "config.json").is_file():
        return Path(name)
    if Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(f"{name}: the base model in contract.json is not a model's folder (no config.json); put it back there")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=["model*.safetensors*", "*.json"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{name}: the base model in contract.json is neither a folder here nor to be had from the hub at revision "
            f"{revision or 'main'} ({type(error).__name__}: {reason})"
        ) from None


def adapter_settings(folder: Path) -> dict:
    """The parsed adapter_config.json of a run."""
    settings = read_json(folder / ADAPTER[1])
    if not isinstance(settings, dict):
        raise UserError(f"{folder / ADAPTER[1]}: expected an object, found {json.dumps(settings)[:40]}")
    return settings
