"""What ZeRO-3 needs, on GPUs and on CPUs: there every process holds only a part of each weight, the head's included.

Settings are checked before anything is loaded; weights are read and written while they are gathered; PEFT's copy of the
head is fetched as one; and what was saved is checked to be whole.
"""

import contextlib
import json
from pathlib import Path

from deepspeed.runtime.zero import GatheredParameters
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils import set_z3_leaf_modules
from peft.utils.other import ModulesToSaveWrapper
from pydantic import ValidationError
from safetensors import safe_open

from preprocess.core.errors import UserError


def is_zero3(deepspeed: object) -> bool:
    """Whether the recipe's `deepspeed:`, a path or the settings themselves, asks for ZeRO-3; UserError if it cannot be used."""
    settings = deepspeed or {}
    if isinstance(deepspeed, str):
        try:
            settings = json.loads(Path(deepspeed).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"deepspeed: {deepspeed} cannot be read as JSON ({error}); see recipes/deepspeed"
            ) from None
    if not isinstance(settings, dict):
        raise UserError(
            f"deepspeed: {deepspeed}: expected an object, found {type(settings).__name__}; see recipes/deepspeed"
        )
    zero = settings.get("zero_optimization") or {}
    try:
        DeepSpeedZeroConfig(**{key: value for key, value in zero.items() if value != "auto"})
    except (TypeError, ValidationError) as error:
        raise UserError(
            f"deepspeed: {deepspeed}: zero_optimization: {' '.join(str(error).split())[:200]}"
        ) from None
    if zero.get("stage") != 3:
        return False
    if zero.get("stage3_gather_16bit_weights_on_model_save") is not True:
        raise UserError(
            f"deepspeed: {deepspeed} lacks stage3_gather_16bit_weights_on_model_save: true in zero_optimization; add it, or "
            "weights are saved in parts"
        )
    return True


def checkpointing_kwargs(cfg) -> dict[str, bool]:
    """Which of PyTorch's two ways to recompute activations suits the run; a recipe's own wrong choice is a UserError.

    Reentrant, Axolotl's default, marks LoRA's parameters ready twice under DDP. The other compares the shapes of what it
    recomputes, and under ZeRO-3 weights that were let go since have shape 0: CheckpointError in the first backward pass.
    """
    zero3 = is_zero3(cfg.get("deepspeed"))
    chosen = dict(cfg.get("gradient_checkpointing_kwargs") or {})
    if zero3 and chosen.get("use_reentrant") is False:
        raise UserError(
            "gradient_checkpointing_kwargs.use_reentrant: false fails under ZeRO-3; remove it"
        )
    return {"use_reentrant": zero3} | chosen


def gathered(parameters):
    """A context in which `parameters` are whole; what the first process changes in them reaches all when it ends."""
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    return GatheredParameters(sharded, modifier_rank=0) if sharded else contextlib.nullcontext()


def fetch_heads_as_one(model) -> None:
    """Have ZeRO-3 fetch PEFT's trained copy of a head together with its wrapper.

    The wrapper answers for attributes that only the layer inside has, so DeepSpeed takes the layer's hooks for the
    wrapper's: AttributeError ds_grads_remaining in the first step (DeepSpeed's issues 7203 and 7615).
    """
    set_z3_leaf_modules(model, [ModulesToSaveWrapper], raise_if_not_found=False)


def check_whole(folder: Path) -> None:
    """Raise where a saved weight is empty, which is what a part of a weight looks like once it is saved."""
    for file in sorted(folder.glob("*model*.safetensors")):
        with safe_open(file, "pt") as tensors:
            empty = [name for name in tensors.keys() if 0 in tensors.get_slice(name).get_shape()]  # noqa: SIM118
        if empty:
            raise RuntimeError(
                f"{file}: {len(empty)} weights were saved without their values, {empty[0]} the first"
            )
