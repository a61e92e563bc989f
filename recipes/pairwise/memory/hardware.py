"""Does a recipe fit the GPUs that it is for? `pairwise check` prints the arithmetic and refuses what cannot fit.

Nothing here imports torch, but where the base model is a folder whose sizes are not in base_models.yml.
"""

from collections.abc import Mapping
from dataclasses import replace

from preprocess.core.errors import UserError
from recipes.pairwise.config.axolotl_keys import count_accumulation_steps
from recipes.pairwise.config.schema import HardwareBlock, Recipe
from recipes.pairwise.memory.base_model import GIB, find_base_model
from recipes.pairwise.memory.training_step import (
    FLOAT32_BYTES,
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

# Bytes of Adam's two moments for a trained weight.
FLOAT32_MOMENTS = 8
EIGHT_BIT_MOMENTS = 2

# Keys that change the sums in ways that are not written down here.
NOT_COMPUTED = ("fsdp", "fsdp_config", "load_in_8bit", "lora_modules_to_save")


def check_hardware(recipe: Recipe, deepspeed: Mapping | None) -> str:
    """Check that a training fits into the memory of the GPUs that its recipe names, in `pairwise.hardware`.

    Returns:
        The arithmetic in words: what each GPU holds and can use, and the smallest GPUs that would do.

    Raises:
        UserError: It does not fit, the GPUs cannot share out the pairs of a step evenly, or the memory
            cannot be computed.
    """
    hardware = recipe.pairwise.hardware
    if recipe.pairwise.pairs_per_step:
        # The number is not needed here, only the error where there is none.
        micro_batch_size = recipe.axolotl.get("micro_batch_size") or 1
        count_accumulation_steps(recipe.pairwise.pairs_per_step, micro_batch_size, hardware.gpus)

    step = describe_step(recipe, deepspeed, hardware.gpus)
    memory = count_step_memory(step)
    most_bytes = usable_bytes(hardware)
    least = find_least_hardware(recipe, deepspeed)
    least_hardware = name_gpus(least) if least else "more than common GPUs have"
    arithmetic = (
        f"{name_gpus(hardware)}: each holds {memory.describe()}, and can use {most_bytes / GIB:.1f}; "
        f"the least is {least_hardware}"
    )
    if memory.total > most_bytes:
        raise UserError(
            f"pairwise.hardware: {arithmetic}; lower micro_batch_size, or set gradient_checkpointing: true"
        )

    # Checkpointing computes every layer twice. If the training fits without it, the user may turn it off.
    memory_without = count_step_memory(replace(step, is_checkpointed=False))
    if step.is_checkpointed and memory_without.total <= most_bytes:
        arithmetic += (
            f"; gradient_checkpointing: false fits too ({memory_without.total / GIB:.1f} GiB), and saves the second "
            "forward pass"
        )
    return arithmetic


def usable_bytes(hardware: HardwareBlock) -> float:
    """Return what each GPU has for a training."""
    return (1 - RESERVED_SHARE) * hardware.gib * GIB


def name_gpus(hardware: HardwareBlock) -> str:
    """Name some GPUs: 1 GPU of 40 GiB, 8 GPUs of 80 GiB."""
    noun = "GPU" if hardware.gpus == 1 else "GPUs"
    return f"{hardware.gpus} {noun} of {hardware.gib:g} GiB"


def find_least_hardware(recipe: Recipe, deepspeed: Mapping | None) -> HardwareBlock | None:
    """Find the fewest and smallest GPUs that a recipe fits; None where no common ones are enough."""
    # Fewer GPUs are easier to get than larger ones.
    for gpus in GPU_COUNTS:
        memory = count_step_memory(describe_step(recipe, deepspeed, gpus))
        for gib in GPU_GIB:
            hardware = HardwareBlock(gpus=gpus, gib=gib)
            if memory.total <= usable_bytes(hardware):
                return hardware
    return None


def describe_step(recipe: Recipe, deepspeed: Mapping | None, gpus: int) -> TrainingStep:
    """Describe a micro-batch of a recipe.

    Raises:
        UserError: The base model's sizes are unknown, or the recipe has a key that is not computed here.
    """
    keys = recipe.axolotl
    block = recipe.pairwise

    # What would make the sum wrong is refused, and not left out of it.
    for key in NOT_COMPUTED:
        if keys.get(key):
            raise UserError(
                f"pairwise.hardware: with {key} the memory is not computed; remove one of the two"
            )
    if block.softcap or keys.get("attn_implementation") == "eager":
        raise UserError(
            "pairwise.hardware: with eager attention the memory is not computed; remove one of the two"
        )

    # A pair is two sequences where a reward model reads each response by itself, and where a pair is
    # read in both orders.
    sequences = keys.get("micro_batch_size") or 1
    if block.head == "reward" or block.orders == "both":
        sequences *= 2
    tokens = block.tokens_per_micro_batch or sequences * block.budget_tokens
    # R-Drop computes each batch twice, with other dropout.
    if block.r_drop:
        tokens *= 2

    # Keys of LoRA mean nothing without an adapter.
    has_adapter = bool(keys.get("adapter"))
    return TrainingStep(
        base=find_base_model(keys["base_model"]),
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


def count_moment_bytes(recipe: Recipe) -> int:
    """Count what the optimizer holds for a trained weight; others than Adam are taken for it."""
    optimizer = recipe.axolotl.get("optimizer") or "adamw_torch"
    moment_bytes = FLOAT32_MOMENTS
    if "8bit" in optimizer:
        moment_bytes = EIGHT_BIT_MOMENTS
    if recipe.pairwise.ema_decay:
        # The moving average is held in float32.
        moment_bytes += FLOAT32_BYTES
    return moment_bytes


def read_zero(deepspeed: Mapping) -> Zero:
    """Read from a DeepSpeed file what decides memory."""
    # Without this part DeepSpeed divides nothing.
    settings = deepspeed.get("zero_optimization", {})
    return Zero(
        stage=settings.get("stage", 0),
        live_parameters=int(settings.get("stage3_max_live_parameters", Zero.live_parameters)),
        offloads_weights="offload_param" in settings,
        offloads_optimizer="offload_optimizer" in settings,
    )
