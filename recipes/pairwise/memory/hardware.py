"""Does a recipe fit the GPUs that it is for? `pairwise check` prints the arithmetic and refuses what cannot fit.

Nothing here imports torch, but where the base model is a folder whose sizes are not in base_models.yml.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from preprocess.core.errors import UserError
from recipes.pairwise.config.schema import HardwareBlock, Recipe
from recipes.pairwise.memory.base_model import BaseModel, find_base_model
from recipes.pairwise.memory.training_step import (
    GIB,
    StepMemory,
    TrainingStep,
    Zero,
    count_step_memory,
)

# CUDA's context, buffers of communication, and what PyTorch's allocator cannot use, of a GPU's memory.
RESERVED_SHARE = 0.1

# Common GPUs, from which the least that fits is chosen.
GPU_COUNTS = (1, 2, 4, 8)
GPU_GIB = (12, 16, 24, 40, 48, 80)

PEFT_RANK = 8  # of LoRA, where a recipe names none
FLOAT32_MOMENTS = 8
EIGHT_BIT_MOMENTS = 2
NOT_COMPUTED = ("fsdp", "fsdp_config", "load_in_8bit", "lora_modules_to_save")


@dataclass(frozen=True)
class Fit:
    """A recipe's memory on the GPUs that it is for."""

    hardware: HardwareBlock
    memory: StepMemory

    @property
    def usable_bytes(self) -> float:
        """What a GPU has for the training."""
        return (1 - RESERVED_SHARE) * self.hardware.gib * GIB

    @property
    def is_enough(self) -> bool:
        """Whether the training fits."""
        return self.memory.total <= self.usable_bytes

    def describe(self) -> str:
        """Write the arithmetic in one line."""
        return f"{name_gpus(self.hardware)}: each holds {self.memory.describe()}, and can use {self.usable_bytes / GIB:.1f}"


def name_gpus(hardware: HardwareBlock) -> str:
    """Name some GPUs: 1 GPU of 40 GiB, 8 GPUs of 80 GiB."""
    noun = "GPU" if hardware.gpus == 1 else "GPUs"
    return f"{hardware.gpus} {noun} of {hardware.gib:g} GiB"


def compute_fit(recipe: Recipe, deepspeed: Mapping | None, hardware: HardwareBlock) -> Fit:
    """Compute what a recipe takes on some GPUs.

    Args:
        recipe: The recipe.
        deepspeed: The content of its DeepSpeed file; None without one.
        hardware: The GPUs.

    Raises:
        UserError: The base model's sizes are unknown, or the recipe has a key that is not computed here.
    """
    step = describe_step(recipe, deepspeed, hardware.gpus)
    return Fit(hardware, count_step_memory(step))


def find_least_hardware(recipe: Recipe, deepspeed: Mapping | None) -> HardwareBlock | None:
    """Find the fewest and smallest GPUs that a recipe fits; None where no common ones are enough.

    Args:
        recipe: The recipe.
        deepspeed: The content of its DeepSpeed file; None without one.
    """
    # Fewer GPUs are easier to get than larger ones.
    for gpus in GPU_COUNTS:
        for gib in GPU_GIB:
            hardware = HardwareBlock(gpus=gpus, gib=gib)
            if compute_fit(recipe, deepspeed, hardware).is_enough:
                return hardware
    return None


def describe_step(recipe: Recipe, deepspeed: Mapping | None, gpus: int) -> TrainingStep:
    """Describe a micro-batch of a recipe.

    Args:
        recipe: The recipe.
        deepspeed: The content of its DeepSpeed file; None without one.
        gpus: How many GPUs train.

    Raises:
        UserError: The base model's sizes are unknown, or the recipe has a key that is not computed here.
    """
    keys = recipe.axolotl
    block = recipe.pairwise

    # What would make the sum wrong is refused, and not left out of it.
    for key in NOT_COMPUTED:
        if keys.get(key):
            raise UserError(f"with {key} the memory is not computed")
    if block.softcap or keys.get("attn_implementation") == "eager":
        raise UserError("with eager attention the memory is not computed")

    pairs = keys.get("micro_batch_size") or 1

    # A reward model reads both responses, others a pair in both orders.
    sequences = 2 * pairs if block.head == "reward" or block.orders == "both" else pairs
    tokens = block.tokens_per_micro_batch or sequences * block.budget_tokens
    if block.r_drop:
        tokens *= 2

    # Keys of LoRA mean nothing without an adapter.
    has_adapter = bool(keys.get("adapter"))
    return TrainingStep(
        base=find_base(recipe),
        head=block.head,
        tokens=tokens,
        longest_row=block.budget_tokens,
        is_checkpointed=bool(keys.get("gradient_checkpointing")),
        moment_bytes=count_moment_bytes(recipe),
        gpus=gpus,
        zero=read_zero(deepspeed) if deepspeed else None,
        lora_rank=(keys.get("lora_r") or PEFT_RANK) if has_adapter else 0,
        lora_targets=tuple(keys.get("lora_target_modules") or ()),
        has_lora_dropout=bool(keys.get("lora_dropout")),
        is_4bit=bool(keys.get("load_in_4bit")),
    )


def find_base(recipe: Recipe) -> BaseModel:
    """Find the sizes of a recipe's base model, which must have the head that the recipe asks for."""
    base = find_base_model(recipe.axolotl["base_model"])
    if recipe.pairwise.head == "label_tokens" and "label_tokens" not in base.heads:
        raise UserError(f"{base.model_type} has no answer tokens")
    return base


def count_moment_bytes(recipe: Recipe) -> int:
    """Count what the optimizer holds for a trained weight; others than Adam are taken for it."""
    optimizer = recipe.axolotl.get("optimizer") or "adamw_torch"
    moment_bytes = EIGHT_BIT_MOMENTS if "8bit" in optimizer else FLOAT32_MOMENTS
    if recipe.pairwise.ema_decay:
        moment_bytes += 4  # the average, in float32
    return moment_bytes


def read_zero(deepspeed: Mapping) -> Zero:
    """Read from a DeepSpeed file what decides memory."""
    settings = deepspeed.get("zero_optimization", {})
    return Zero(
        stage=settings.get("stage", 0),
        live_parameters=int(settings.get("stage3_max_live_parameters", Zero.live_parameters)),
        offloads_weights="offload_param" in settings,
        offloads_optimizer="offload_optimizer" in settings,
    )
