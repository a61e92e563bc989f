"""The run of this project that a new run goes on from, and what the new head starts as.

A run goes on from an earlier one with `base_model: outputs/STAGE1/merged`, with the folder of a full fine-tune, or with
`lora_model_dir: outputs/STAGE1`. Nothing here imports torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from preprocess.core.errors import UserError
from preprocess.core.files import read_object, sha256
from recipes.pairwise.config.schema import PairwiseBlock

# The settings of an adapter, by the recipe's key and PEFT's.
ADAPTER_SETTINGS = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_target_modules": "target_modules",
}


@dataclass(frozen=True)
class EarlierRun:
    """A run that another one goes on from."""

    folder: Path  # with its contract
    head: str
    verdicts: tuple[str, ...]  # that its outputs stand for, in their order
    base_model: str  # that it was trained from
    first_base_model: str  # that the first run of the chain was trained from
    first_revision: str | None  # the hub's commit of that model; None for a folder
    contract_sha256: str  # by which the ledger knows the run

    def describe(self) -> dict[str, str | None]:
        """Describe the run for the contract and the ledger of the run that goes on from it."""
        return {
            "run": str(self.folder),
            "contract": self.contract_sha256,
            "first_base_model": self.first_base_model,
            "first_revision": self.first_revision,
        }


@dataclass(frozen=True)
class HeadStart:
    """What a classification head starts as."""

    checkpoint_outputs: int | None  # of the base model's head; None where it has no head
    reason_for_new: str | None  # None where the run keeps the base model's head


def find_earlier_run(base_model: str, adapter_folder: str | None) -> EarlierRun | None:
    """Find the run of this project that made the recipe's base_model, or the adapter in its lora_model_dir.

    Returns:
        The run; None where no run made the base model, such as one from the hub.

    Raises:
        UserError: The adapter's folder has no contract, so that nobody knows what it was trained as.
    """
    if adapter_folder:
        folder = Path(adapter_folder)
        if not (folder / "contract.json").is_file():
            raise UserError(
                f"lora_model_dir: {folder} has no contract.json; name the run folder of an adapter that was trained here"
            )
        return read_earlier_run(folder)

    # The merged model of a LoRA run is in RUN/merged, a full fine-tune is in RUN itself. Both have their
    # contract in RUN.
    folder = Path(base_model)
    if folder.name == "merged":
        folder = folder.parent
    if not (folder / "contract.json").is_file():
        return None
    return read_earlier_run(folder)


def read_earlier_run(folder: Path) -> EarlierRun:
    """Read a run's contract: what it was trained as, and which model its chain of runs began with.

    Raises:
        UserError: Its contract.json is damaged.
    """
    file = folder / "contract.json"
    contract = read_object(file)
    try:
        # A run that went on from another one has recorded where that chain began. Any other run began
        # with its own base model, which the defaults below say.
        start = contract["recorded"].get("started_from") or {}
        return EarlierRun(
            folder=folder,
            head=contract["head"],
            verdicts=tuple(contract["verdicts"]),
            base_model=contract["base_model"],
            first_base_model=start.get("first_base_model", contract["base_model"]),
            first_revision=start.get("first_revision", contract["revision"]),
            contract_sha256=sha256(file),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file}: no contract of a run ({error}); restore it or train again"
        ) from None


def check_adapter_start(cfg: Mapping, block: PairwiseBlock, earlier: EarlierRun) -> None:
    """Check that a run can go on with the adapter in lora_model_dir.

    Raises:
        UserError: The adapter is of another base model, head or shape than the recipe says.
    """
    # Without this key Axolotl would not load the adapter, and would train every weight of the base.
    if not cfg.get("adapter"):
        raise UserError(
            "lora_model_dir: without the key adapter, this adapter is not loaded and every weight is trained; set "
            "adapter: lora or qlora"
        )
    # An adapter fits only the model that it was trained on, and the head that was trained with it.
    if not is_same_model(cfg["base_model"], earlier.base_model):
        raise UserError(
            f"lora_model_dir: the adapter in {earlier.folder} was trained on {earlier.base_model}; set base_model to that"
        )
    has_same_head = block.head == earlier.head and block.verdicts == earlier.verdicts
    if not has_same_head:
        verdicts = ", ".join(earlier.verdicts)
        raise UserError(
            f"lora_model_dir: the adapter in {earlier.folder} has the head {earlier.head} for {verdicts}; set "
            "pairwise.head and pairwise.verdicts to that, or merge it and make its merged folder the base_model"
        )

    check_adapter_settings(cfg, earlier.folder)


def check_adapter_settings(cfg: Mapping, folder: Path) -> None:
    """Check that a recipe does not ask for other settings than the adapter in a folder has.

    PEFT goes on with the settings that were saved with the adapter, and ignores those of the recipe.

    Raises:
        UserError: The recipe asks for another rank, alpha or list of layers.
    """
    adapter_settings = read_object(folder / "adapter_config.json")
    for recipe_key, peft_key in ADAPTER_SETTINGS.items():
        of_recipe = cfg.get(recipe_key)
        of_adapter = adapter_settings.get(peft_key)
        # A recipe need not repeat a setting.
        if of_recipe is None:
            continue

        # The order of layers means nothing.
        if isinstance(of_adapter, list) and isinstance(of_recipe, list):
            of_recipe, of_adapter = sorted(of_recipe), sorted(of_adapter)
        if of_recipe != of_adapter:
            raise UserError(
                f"{recipe_key}: the recipe says {of_recipe}, but the adapter in {folder} has {of_adapter}, which does not "
                "change; set that, or remove the key"
            )


def choose_head_start(
    config, block: PairwiseBlock, earlier: EarlierRun | None, has_adapter: bool
) -> HeadStart:
    """Decide whether a run keeps the classification head of its base model or begins with a new one.

    Args:
        config: The base model's configuration.
        block: The `pairwise:` block, whose head is score or reward.
        earlier: The run that made the base model or the adapter; None where no run of ours did.
        has_adapter: Whether the run goes on with an adapter, which holds a head of its own.
    """
    # transformers' num_labels is 2 by default, so it says nothing of a model without a head.
    outputs = config.num_labels if has_classifier(config) else None
    if has_adapter:
        return HeadStart(outputs, "the adapter in lora_model_dir replaces it")
    if outputs is None:
        return HeadStart(None, "the base model has none")

    # A head of one output scores a response, so that any such head can be kept as a reward.
    if block.head == "reward":
        if outputs == 1:
            return HeadStart(outputs, None)
        return HeadStart(outputs, f"the base model's has {outputs} outputs, a reward has one")

    # The head score has an output for each verdict. A model only numbers its outputs: which verdict
    # each stands for is written in the contract of the run that trained it.
    if earlier is None or earlier.head != "score":
        return HeadStart(outputs, "no contract says which verdicts the base model's head has")
    if earlier.verdicts != block.verdicts:
        verdicts = ", ".join(earlier.verdicts)
        return HeadStart(outputs, f"the base model's head has the verdicts {verdicts}")
    return HeadStart(outputs, None)


def has_classifier(config) -> bool:
    """Return whether the weights beside a configuration hold a classification head."""
    architectures = config.architectures or []
    return any(name.endswith("ForSequenceClassification") for name in architectures)


def is_same_model(name: str, other_name: str) -> bool:
    """Return whether two names of base models mean the same hub repository, or the same folder."""
    if name == other_name:
        return True

    # Two paths may lead to the same folder.
    folder, other_folder = Path(name), Path(other_name)
    return folder.exists() and other_folder.exists() and folder.samefile(other_folder)
