"""A run folder read and checked before any work: its weights, its contract, the code that made its ids, its base model.

Starts fast: nothing here imports torch.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from pydantic import TypeAdapter, ValidationError

from kaggle_kernels.runtime.package import (
    PackageError,
    check_hash,
    execute_model_input,
    read_tokenizer,
)
from preprocess.core.errors import UserError
from preprocess.core.files import read_json, sha256
from preprocess.model_input import Contract
from recipes.pairwise.config.schema import HOW_TO_GET_IT, Recipe

HEADS = ("score", "label_tokens", "reward")
ADAPTER = ("adapter_model.safetensors", "adapter_config.json")
MODEL_PATTERN = "model*.safetensors*"


@dataclass(frozen=True)
class Run:
    """A trained run. `weights` is the folder of the base model, or for a full fine-tune the run folder itself.

    With `train: false` it is the base model's folder too, and there is no adapter.
    """

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
        """Every file that decides the weights that are made of the run."""
        adapter = (
            [self.folder / name for name in (*ADAPTER, "config.json")] if self.has_adapter else []
        )
        return [
            *weight_files(self.weights),
            *adapter,
            self.folder / "contract.json",
            *self.tokenizer_files(),
        ]

    def validation_files(self) -> list[Path]:
        """The files with the rows that models are compared on: the recipe's pairs and training's predictions."""
        return [Path(self.recipe.pairwise.pairs), self.folder / "predictions.parquet"]


def read_run(recipe: Recipe) -> Run:
    """The run of `recipe`, checked. Everything that the user can mend is a UserError."""
    folder, train = recipe.run_folder, recipe.pairwise.train
    has_adapter = train and _find_weights(folder, recipe.path)
    for name in ("contract.json", "model_input.py"):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder}: weights without {name}, so it is unknown how they were trained; train again with "
                f"axolotl train {recipe.path}, with recipes.pairwise.plugin among its plugins"
            )
    contract, model_input = read_contract(folder)
    for name, expected in contract.tokenizer_sha256.items():
        if not (folder / name).is_file() or sha256(folder / name) != expected:
            raise UserError(
                f"{folder / name}: missing or changed since training; contract.json holds another SHA-256"
            )
    weights = (
        find_base(contract.base_model, contract.revision) if has_adapter or not train else folder
    )
    check_recipe(recipe, contract, has_adapter)
    run = Run(recipe, folder, contract, model_input, weights, has_adapter)
    for file in run.validation_files():
        if not file.is_file():
            raise UserError(
                f"{file}: no such file; the package is checked on the validation rows of the training"
            )
    return run


def _find_weights(folder: Path, recipe: Path) -> bool:
    """Whether `folder` holds an adapter (True) or a full model (False)."""
    has_adapter = (folder / ADAPTER[0]).is_file()
    has_model = any(folder.glob(MODEL_PATTERN))
    if has_adapter and has_model:
        raise UserError(
            f"{folder}: holds an adapter and a full model; remove the one that is not from the last training"
        )
    if not has_adapter and not has_model:
        found = (
            "no adapter_model.safetensors and no model.safetensors"
            if folder.is_dir()
            else "no such folder"
        )
        raise UserError(f"{folder}: {found}; train it first with axolotl train {recipe}")
    missing = ADAPTER[1] if has_adapter else "config.json"
    if not (folder / missing).is_file():
        raise UserError(
            f"{folder}: weights without {missing}; train it again with axolotl train {recipe}"
        )
    return has_adapter


def check_recipe(recipe: Recipe, contract: Contract, has_adapter: bool) -> None:
    """Raise UserError where recipe or adapter say another thing than the contract, which is what the run was trained with.

    The recipe's base model must be the one that it named when it was trained, for which another may have stood in:
    `axolotl train R.yml --base-model FOLDER`.
    """
    block, file = recipe.pairwise, recipe.run_folder / "contract.json"
    template = block.resolved_template()
    told = {
        key: getattr(block, key)
        for key in ("head", "verdicts", "budget_tokens", "truncation", "softcap")
    }
    told |= {f"template.{key}": getattr(template, key) for key in ("start", "turn", "end")}
    for key, expected in told.items():
        part = key.removeprefix("template.")
        found = getattr(contract if part == key else contract.template, part)
        if found != expected:
            raise UserError(
                f"{recipe.path}: pairwise.{key} is {expected!r}, the run was trained with {found!r} ({file}); put that back, "
                "or train again"
            )
    base = recipe.axolotl["base_model"]
    named = contract.recorded.get("recipe_base_model", contract.base_model)
    if not is_same_model(base, named) and not is_same_model(base, contract.base_model):
        raise UserError(
            f"{recipe.path}: base_model is {base}, the run was trained with {named} ({file}); put that back, or train again"
        )
    adapted = (
        adapter_settings(recipe.run_folder).get("base_model_name_or_path") if has_adapter else None
    )
    if adapted and not is_same_model(adapted, contract.base_model):
        raise UserError(
            f"{recipe.run_folder / ADAPTER[1]}: base_model_name_or_path is {adapted}, {file} says base_model "
            f"{contract.base_model}: an adapter of another base; put the run's own adapter back, or train again"
        )


def is_same_model(one: str, other: str) -> bool:
    """Whether two names of base models mean the same repository of the hub, or the same folder here."""
    return one == other or (
        Path(one).exists() and Path(other).exists() and Path(one).samefile(other)
    )


def refuse_weights(recipe: Recipe) -> None:
    """Raise UserError where the run folder of a recipe with `train: false` holds the weights of a training."""
    found = sorted(
        path.name
        for pattern in (ADAPTER[0], MODEL_PATTERN)
        for path in recipe.run_folder.glob(pattern)
    )
    if found:
        raise UserError(
            f"{recipe.run_folder}: holds {found[0]} of a training, but {recipe.path} says train: false; give one of the two "
            "another output_dir, or remove the weights"
        )


def read_contract(folder: Path) -> tuple[Contract, ModuleType]:
    """The contract of a run, and the run's own model_input.py, executed once its hash is the contract's."""
    file = folder / "contract.json"
    recorded = read_json(file)
    if not isinstance(recorded, dict):
        raise UserError(
            f"{file}: expected an object, found {json.dumps(recorded)[:40]}; restore it or train again"
        )
    expected, found = recorded.get("model_input_sha256"), sha256(folder / "model_input.py")
    if found != expected:
        raise UserError(
            f"{folder / 'model_input.py'}: SHA-256 is {found[:12]}…, contract.json says {str(expected)[:12]}…; the file has "
            "changed since training: restore it or train again"
        )
    model_input = execute_model_input(folder / "model_input.py")
    check_types(model_input.Contract, recorded, file)
    try:
        contract = model_input.contract_from_dict(recorded)
    except (model_input.ContractError, TypeError) as error:
        raise UserError(f"{file}: {error}") from None
    check_head(contract, file)
    return contract, model_input


def checked_tokenizer(run: Run):
    """The run's tokenizer, once it gives the golden rows the ids that they had in training."""
    try:
        for file in run.tokenizer_files():
            check_hash(file, run.contract.tokenizer_sha256[file.name], "contract.json")
        tokenizer = read_tokenizer(run.folder)
        run.model_input.check_golden(tokenizer, run.contract)
    except (PackageError, run.model_input.ContractError) as error:
        raise UserError(f"{run.folder}: {error}") from None
    return tokenizer


def check_types(contract_class: type, recorded: dict, file: Path) -> None:
    """Raise UserError where a value of a parsed contract.json has another type than the contract's; absent keys are let by."""
    golden = recorded.get("golden")
    plain = recorded | {"golden": []}  # its rows hold lone surrogates, which pydantic does not read
    try:
        TypeAdapter(contract_class).validate_json(json.dumps(plain), strict=True)
    except ValidationError as error:
        for problem in error.errors():
            if problem["type"] != "missing":
                where, found = ".".join(map(str, problem["loc"])), json.dumps(problem["input"])[:40]
                raise UserError(
                    f"{file}: {where}: {problem['msg']}, found {found}; restore it or train again"
                ) from None
    if not isinstance(golden, list) or not all(
        isinstance(row, dict) and row.keys() == {"pair", "ids"} for row in golden
    ):
        raise UserError(
            f"{file}: golden: expected rows with pair and ids; restore it or train again"
        )


def check_head(contract: Contract, file: Path) -> None:
    """Raise UserError where head, verdicts, number of outputs and label tokens do not go together."""
    if contract.head not in HEADS:
        raise UserError(
            f"{file}: head is {contract.head!r}; only {', '.join(HEADS)} can be packaged"
        )
    verdicts = len(contract.verdicts)
    outputs = {"score": verdicts, "reward": 1, "label_tokens": 0}[contract.head]
    tokens = verdicts if contract.head == "label_tokens" else 0
    for name, found, expected in (
        ("labels", contract.num_labels, outputs),
        ("label tokens", len(contract.label_token_ids), tokens),
        ("numbers in logit_bias", len(contract.logit_bias), len(contract.logit_bias) and verdicts),
    ):
        if found != expected:
            raise UserError(
                f"{file}: {found} {name} for {verdicts} verdicts and the head {contract.head}, expected {expected}; train again"
            )


def find_base(name: str, revision: str | None, source: str = "contract.json") -> Path:
    """The folder of a base model that `source` names: that folder, or a snapshot of the hub's repository."""
    if (Path(name) / "config.json").is_file():
        return Path(name)
    if Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(
            f"{name}: the base model in {source} is not a model's folder (no config.json); put it back there"
        )
    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=["model*.safetensors*", "*.json"]
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"{name}: the base model in {source} is neither a folder here nor to be had from the hub at revision "
            f"{revision or 'main'} ({type(error).__name__}: {reason}); {HOW_TO_GET_IT}"
        ) from None


def weight_files(folder: Path) -> list[Path]:
    """The files of a model's weights and its configuration."""
    return [*sorted(folder.glob(MODEL_PATTERN)), folder / "config.json"]


def hub_commit(folder: Path) -> str | None:
    """The commit of a snapshot of the hub; None for any other folder."""
    return folder.name if folder.parent.name == "snapshots" else None


def adapter_settings(folder: Path) -> dict:
    """The parsed adapter_config.json of a run."""
    settings = read_json(folder / ADAPTER[1])
    if not isinstance(settings, dict):
        raise UserError(
            f"{folder / ADAPTER[1]}: expected an object, found {json.dumps(settings)[:40]}"
        )
    kinds = {
        "r": (int,),
        "lora_alpha": (int, float),
        "rank_pattern": (dict, type(None)),
        "alpha_pattern": (dict, type(None)),
    }
    for key, kind in kinds.items():
        if not isinstance(settings.get(key), kind):
            raise UserError(
                f"{folder / ADAPTER[1]}: {key} is {json.dumps(settings.get(key))[:40]}; restore it or train again"
            )
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern, value in (settings.get(key) or {}).items():
            if (
                not _is_regex(pattern)
                or isinstance(value, bool)
                or not isinstance(value, int | float)
                or value <= 0
            ):
                raise UserError(
                    f"{folder / ADAPTER[1]}: {key} has {json.dumps({pattern: value})[:60]}, expected a pattern with a number "
                    "above 0; restore it or train again"
                )
    return settings


def _is_regex(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True
