"""A run folder read and checked before any work: its weights, its contract, the code that made its ids, its base model.

`pipeline.py` reads a run with `read_run` before its stages. Starts fast: nothing here imports torch.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, TypeAdapter, ValidationError

from kaggle_kernels.runtime.package import (
    PackageError,
    check_hash,
    execute_model_input,
    read_tokenizer,
)
from preprocess.core.errors import UserError
from preprocess.core.files import read_object, sha256
from preprocess.model_input import Contract
from recipes.pairwise.config.earlier_runs import is_same_model
from recipes.pairwise.config.schema import HOW_TO_GET_IT, Recipe

# What a training leaves beside weights and tokenizer.
RESULT_FILES = ("contract.json", "model_input.py", "metrics.json", "predictions.parquet")

HEADS = ("score", "label_tokens", "reward")
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_SETTINGS = "adapter_config.json"
MODEL_PATTERN = "model*.safetensors*"
BASE_FILES = ["model*.safetensors*", "*.json"]  # what is fetched of a base model

# Keys of the `pairwise:` block and of its template that the contract repeats.
CONTRACT_KEYS = ("head", "verdicts", "budget_tokens", "truncation", "softcap")
TEMPLATE_KEYS = ("start", "turn", "end")

SHOWN_CHARACTERS = 40  # of a wrong value
SHOWN_OF_HUB_ERROR = 120


class LoraNumbers(BaseModel):
    """What merging needs of adapter_config.json: rank and alpha, and those of modules whose names match a pattern."""

    model_config = ConfigDict(strict=True)

    r: PositiveInt
    lora_alpha: PositiveFloat
    rank_pattern: dict[re.Pattern, PositiveInt] | None = None
    alpha_pattern: dict[re.Pattern, PositiveFloat] | None = None


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
        files = weight_files(self.weights)
        if self.has_adapter:
            files += [
                self.folder / name for name in (ADAPTER_WEIGHTS, ADAPTER_SETTINGS, "config.json")
            ]
        return [*files, self.folder / "contract.json", *self.tokenizer_files()]

    def validation_files(self) -> list[Path]:
        """The files with the rows that models are compared on: the recipe's pairs and training's predictions."""
        return [Path(self.recipe.pairwise.pairs), self.folder / "predictions.parquet"]


def read_run(recipe: Recipe) -> Run:
    """Read what the training of a recipe left in its run folder, and check that it can be packaged.

    Raises:
        UserError: The run is not complete, was changed since training, or is not the recipe's.
    """
    folder = recipe.run_folder
    is_trained = recipe.pairwise.train
    has_adapter = is_trained and find_adapter(folder, recipe.path)

    for name in ("contract.json", "model_input.py", "metrics.json"):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder}: has weights but no {name}, so it is unknown how they were trained; train again with "
                f"axolotl train {recipe.path}, with recipes.pairwise.plugin among its plugins"
            )

    contract, model_input = read_contract(folder)
    check_tokenizer_files(folder, contract)

    # A full fine-tune left the whole model in the run folder. Otherwise the weights are the base model's.
    weights = folder
    if has_adapter or not is_trained:
        weights = find_base(contract.base_model, contract.revision)
    check_recipe(recipe, contract, has_adapter)

    run = Run(recipe, folder, contract, model_input, weights, has_adapter)
    for file in run.validation_files():
        if not file.is_file():
            raise UserError(
                f"{file}: no such file, but the package is checked on the validation rows in it; put it back, or "
                "train again"
            )
    return run


def find_adapter(folder: Path, recipe: Path) -> bool:
    """Find out whether a training left an adapter (True) or a full model (False) in its run folder.

    Raises:
        UserError: The folder holds none of the two, both, or weights without their configuration.
    """
    has_adapter = (folder / ADAPTER_WEIGHTS).is_file()
    has_model = any(folder.glob(MODEL_PATTERN))
    if has_adapter and has_model:
        raise UserError(
            f"{folder}: holds both an adapter and a full model; remove the one that is not from the last training"
        )

    if not has_adapter and not has_model:
        reason = "no such folder"
        if folder.is_dir():
            reason = f"no {ADAPTER_WEIGHTS} and no model.safetensors"
        raise UserError(f"{folder}: {reason}; train it first with axolotl train {recipe}")

    configuration = ADAPTER_SETTINGS if has_adapter else "config.json"
    if not (folder / configuration).is_file():
        raise UserError(
            f"{folder}: has weights but no {configuration}; train it again with axolotl train {recipe}"
        )
    return has_adapter


def refuse_weights(recipe: Recipe) -> None:
    """Raise UserError where the run folder of a recipe with `train: false` holds the weights of a training."""
    folder = recipe.run_folder
    weights = sorted([*folder.glob(ADAPTER_WEIGHTS), *folder.glob(MODEL_PATTERN)])
    if weights:
        raise UserError(
            f"{folder}: holds {weights[0].name} of a training, but {recipe.path} says train: false; "
            "give one of the two another output_dir, or remove the weights"
        )


# The recipe and the contract


def check_recipe(recipe: Recipe, contract: Contract, has_adapter: bool) -> None:
    """Check that a recipe, and the adapter in its run folder, still say what the run was trained with.

    The contract, which training wrote beside the weights, records everything that decides a model's input.

    Raises:
        UserError: The recipe was changed since, or the adapter is one of another base model.
    """
    block = recipe.pairwise
    for key in CONTRACT_KEYS:
        current = getattr(block, key)
        trained = getattr(contract, key)
        if current != trained:
            raise UserError(
                explain_change(recipe, f"pairwise.{key}", f"{current!r}", f"{trained!r}")
            )

    template = block.resolved_template()
    for key in TEMPLATE_KEYS:
        current = getattr(template, key)
        trained = getattr(contract.template, key)
        if current != trained:
            name = f"pairwise.template.{key}"
            raise UserError(explain_change(recipe, name, f"{current!r}", f"{trained!r}"))

    # `axolotl train R.yml --base-model FOLDER` trains another base model than the recipe's. So the recipe
    # may name the model that was trained, or the one that it named at that time.
    base_model = recipe.axolotl["base_model"]
    base_in_recipe_then = contract.recorded.get("recipe_base_model", contract.base_model)
    is_base_of_training = is_same_model(base_model, contract.base_model)
    if not is_base_of_training and not is_same_model(base_model, base_in_recipe_then):
        raise UserError(explain_change(recipe, "base_model", base_model, base_in_recipe_then))

    if not has_adapter:
        return

    # The adapter names its base model too.
    settings_file = recipe.run_folder / ADAPTER_SETTINGS
    adapter_base = adapter_settings(recipe.run_folder).get("base_model_name_or_path")
    if adapter_base and not is_same_model(adapter_base, contract.base_model):
        raise UserError(
            f"{settings_file}: base_model_name_or_path is {adapter_base}, but contract.json beside it says "
            f"base_model {contract.base_model}, so this is an adapter of another base; put the run's own adapter "
            "back, or train again"
        )


def explain_change(recipe: Recipe, key: str, current: str, trained: str) -> str:
    """Say that a key of the recipe has another value now than when its run was trained."""
    contract_file = recipe.run_folder / "contract.json"
    return (
        f"{recipe.path}: {key} is {current}, but the run was trained with {trained} ({contract_file}); put that "
        "value back, or train again"
    )


def read_contract(folder: Path) -> tuple[Contract, ModuleType]:
    """Read a run's contract.json, and import the copy of model_input.py that training put beside it.

    That copy makes the same token ids as in training. It is executed only if it has the SHA-256 that the
    contract records.

    Returns:
        The contract and the module.

    Raises:
        UserError: The contract is damaged, or model_input.py is not the one of the training.
    """
    file = folder / "contract.json"
    recorded = read_object(file)

    code_file = folder / "model_input.py"
    expected_hash = recorded.get("model_input_sha256")
    code_hash = sha256(code_file)
    if code_hash != expected_hash:
        raise UserError(
            f"{code_file}: the file has changed since training: its SHA-256 is {code_hash[:12]}…, but "
            f"contract.json says {str(expected_hash)[:12]}…; restore it or train again"
        )
    model_input = execute_model_input(code_file)

    check_types(model_input.Contract, recorded, file)
    try:
        contract = model_input.contract_from_dict(recorded)
    except (model_input.ContractError, TypeError) as error:
        raise UserError(f"{file}: {error}") from None
    check_head(contract, file)
    return contract, model_input


def check_tokenizer_files(folder: Path, contract: Contract) -> None:
    """Raise UserError where a tokenizer's file is not the one of the training."""
    for name, expected_hash in contract.tokenizer_sha256.items():
        file = folder / name
        if not file.is_file() or sha256(file) != expected_hash:
            raise UserError(
                f"{file}: missing or changed since training (contract.json holds another SHA-256); put the "
                "training's file back, or train again"
            )


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
    """Check that the values in a contract.json have the types that the Contract class declares.

    Keys that are missing are left to contract_from_dict, which reports them.
    """
    # pydantic cannot read the golden rows, some of which are broken Unicode on purpose: they are checked
    # below.
    without_golden = json.dumps(recorded | {"golden": []})
    try:
        TypeAdapter(contract_class).validate_json(without_golden, strict=True)
    except ValidationError as error:
        for problem in error.errors():
            if problem["type"] != "missing":
                raise UserError(describe_problem(file, problem)) from None

    golden = recorded.get("golden")
    rows = golden if isinstance(golden, list) else [golden]
    for row in rows:
        if not isinstance(row, dict) or row.keys() != {"pair", "ids"}:
            raise UserError(
                f"{file}: golden: expected rows with pair and ids; restore it or train again"
            )


def describe_problem(file: Path, problem: Mapping) -> str:
    """Write what pydantic found wrong in a file of the training."""
    key = ".".join(map(str, problem["loc"]))
    value = json.dumps(problem["input"])[:SHOWN_CHARACTERS]
    return f"{file}: {key}: {problem['msg']}, found {value}; restore it or train again"


def check_head(contract: Contract, file: Path) -> None:
    """Check that the numbers in a contract suit its head, which is how verdicts come out of the model."""
    head = contract.head
    if head not in HEADS:
        raise UserError(f"{file}: head is {head!r}; only {', '.join(HEADS)} can be packaged")

    # A classifier (score) has a labelled output for each verdict. A reward model has one, for the response
    # that it reads. A causal LM (label_tokens) has none: it answers by a token for each verdict.
    verdict_count = len(contract.verdicts)
    expected_labels = {"score": verdict_count, "reward": 1, "label_tokens": 0}[head]
    expected_tokens = verdict_count if head == "label_tokens" else 0
    # The biases, a number to add to each verdict's logit, are optional.
    expected_biases = verdict_count if contract.logit_bias else 0

    for name, count, expected in (
        ("labels", contract.num_labels, expected_labels),
        ("label tokens", len(contract.label_token_ids), expected_tokens),
        ("numbers in logit_bias", len(contract.logit_bias), expected_biases),
    ):
        if count != expected:
            raise UserError(
                f"{file}: holds {count} {name}, but the head {head} needs {expected} for {verdict_count} verdicts; "
                "train again"
            )


# Weights


def find_base(name: str, revision: str | None, source: str = "contract.json") -> Path:
    """Find the folder of a base model. One that is named by its repository is fetched from the hub first.

    Args:
        name: A folder on this machine, or a repository of the Hugging Face Hub as owner/name.
        revision: The repository's commit, branch or tag; None for main.
        source: The file that names the base model, for the message.

    Raises:
        UserError: There is no such model.
    """
    folder = Path(name)
    if (folder / "config.json").is_file():
        return folder

    is_repository = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if folder.exists() or not is_repository:
        raise UserError(
            f"{name}: {source} names this as the base model, but it is no model's folder (no config.json); put "
            "the model back there"
        )
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=BASE_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:SHOWN_OF_HUB_ERROR]
        raise UserError(
            f"{name}: {source} names this as the base model, but there is no such folder here, and the hub does "
            f"not give it at revision {revision or 'main'} ({type(error).__name__}: {reason}); {HOW_TO_GET_IT}"
        ) from None


def weight_files(folder: Path) -> list[Path]:
    """The files of a model's weights and its configuration."""
    return [*sorted(folder.glob(MODEL_PATTERN)), folder / "config.json"]


def hub_commit(folder: Path) -> str | None:
    """The commit of a snapshot of the hub; None for any other folder."""
    return folder.name if folder.parent.name == "snapshots" else None


def adapter_settings(folder: Path) -> dict:
    """Read a run's adapter_config.json, and check what merging needs of it.

    Raises:
        UserError: The file is damaged.
    """
    file = folder / ADAPTER_SETTINGS
    settings = read_object(file)
    try:
        LoraNumbers.model_validate(settings)
    except ValidationError as error:
        raise UserError(describe_problem(file, error.errors()[0])) from None
    return settings
