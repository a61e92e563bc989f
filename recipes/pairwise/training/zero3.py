"""What ZeRO-3 needs, on GPUs and on CPUs: there every process holds only a part of each weight, the head's included.

Settings are checked before anything is loaded; weights are read and written while they are gathered; PEFT's copy of the
head is fetched as one; and what was saved is checked to be whole.
"""

import contextlib
from pathlib import Path

from deepspeed.runtime.zero import GatheredParameters
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils import set_z3_leaf_modules
from peft.utils.other import ModulesToSaveWrapper
from pydantic import ValidationError
from safetensors import safe_open

from preprocess.core.errors import UserError
from recipes.pairwise.config.recipe_files import read_deepspeed

MESSAGE_LENGTH = 200  # characters shown of pydantic's


def is_zero3(deepspeed: str | dict | None) -> bool:
    """Return whether a recipe's `deepspeed:` asks for ZeRO-3.

    Raises:
        UserError: If the settings cannot be read, or would save weights in parts.
    """
    settings = read_deepspeed(deepspeed)
    zero_settings = settings.get("zero_optimization") or {}
    check_zero_settings(zero_settings, deepspeed)

    if zero_settings.get("stage") != 3:
        return False
    if zero_settings.get("stage3_gather_16bit_weights_on_model_save") is not True:
        raise UserError(
            f"deepspeed: {deepspeed} lacks stage3_gather_16bit_weights_on_model_save: true in "
            "zero_optimization; add it, or weights are saved in parts"
        )
    return True


def check_zero_settings(zero_settings: dict, deepspeed: str | dict | None) -> None:
    """Raise UserError where DeepSpeed would later refuse the keys or values below `zero_optimization`."""
    # "auto" is replaced by accelerate before DeepSpeed sees it.
    explicit_settings = {key: value for key, value in zero_settings.items() if value != "auto"}
    try:
        DeepSpeedZeroConfig(**explicit_settings)
    except (TypeError, ValidationError) as error:
        message = " ".join(str(error).split())[:MESSAGE_LENGTH]
        raise UserError(f"deepspeed: {deepspeed}: zero_optimization: {message}") from None


def checkpointing_kwargs(cfg) -> dict[str, bool]:
    """Return which of PyTorch's two ways to recompute activations suits the run.

    Reentrant, Axolotl's default, marks LoRA's parameters ready twice under DDP. The other compares
    the shapes of what it recomputes, and under ZeRO-3 weights that were let go since have shape 0:
    CheckpointError in the first backward pass.

    Returns:
        Arguments of PyTorch's checkpoint function: the recipe's own, and a default for the rest.

    Raises:
        UserError: If the recipe asks for the one that fails.
    """
    uses_zero3 = is_zero3(cfg.get("deepspeed"))
    recipe_kwargs = dict(cfg.get("gradient_checkpointing_kwargs") or {})
    if uses_zero3 and recipe_kwargs.get("use_reentrant") is False:
        raise UserError(
            "gradient_checkpointing_kwargs.use_reentrant: false fails under ZeRO-3; remove it"
        )
    return {"use_reentrant": uses_zero3} | recipe_kwargs


def gathered(parameters):
    """Return a context in which `parameters` are whole; what the first process changes in them reaches all others."""
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not sharded:
        return contextlib.nullcontext()
    return GatheredParameters(sharded, modifier_rank=0)


def fetch_heads_as_one(model) -> None:
    """Have ZeRO-3 fetch PEFT's trained copy of a head together with its wrapper.

    The wrapper answers for attributes that only the layer inside has, so DeepSpeed takes the layer's hooks for the
    wrapper's: AttributeError ds_grads_remaining in the first step (DeepSpeed's issues 7203 and 7615).
    """
    set_z3_leaf_modules(model, [ModulesToSaveWrapper], raise_if_not_found=False)


def check_whole(folder: Path) -> None:
    """Raise RuntimeError where a saved weight is empty: under ZeRO-3 so looks one that other processes hold."""
    for file in sorted(folder.glob("*model*.safetensors")):
        empty_names = list_empty_weights(file)
        if empty_names:
            raise RuntimeError(
                f"{file}: {len(empty_names)} weights were saved without their values, "
                f"{empty_names[0]} the first"
            )


def list_empty_weights(file: Path) -> list[str]:
    """List the names of a safetensors file's weights that hold no numbers."""
    empty_names = []
    with safe_open(file, "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118  it is no dict
            shape = tensors.get_slice(name).get_shape()
            if 0 in shape:
                empty_names.append(name)
    return empty_names
