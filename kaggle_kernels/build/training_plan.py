"""How a base model that is new here would be trained and served: LoRA or not, on which GPUs, in which format on two T4s.

`pairwise new` computes this from the numbers of recipes/pairwise/memory, and writes it into the recipe's header.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from postprocess.memory.model_size import GPU_BYTES, Served
from postprocess.memory.t4_fit import place
from preprocess.core.errors import UserError
from recipes.pairwise.memory.base_model import BaseModel
from recipes.pairwise.memory.hardware import FLOAT32_MOMENTS, RESERVED_SHARE
from recipes.pairwise.memory.training_step import GIB, TrainingStep, Zero, count_step_memory

SMALL_PARAMETERS = 1e9  # below, every weight is trained
LARGE_PARAMETERS = 10e9  # from here on, one pair at a time
LORA_RANK = 64
BUDGETS = {"score": 2048, "label_tokens": 2048, "reward": 1536}  # tokens of a sequence
SMALL_BUDGET = 512  # of a small model, which may be trained on a laptop
SMALL_PAIRS = 8  # of its micro-batch

TRAINING_GPUS = 8
TRAINING_GPU_GIB = 80

# In the order in which they are tried, the first that fits two T4s: nf4 is faster than int8, and
# layers that are split over both GPUs leave room for int8.
SERVINGS = (
    ("none", "each", 8192),
    ("nf4", "each", 8192),
    ("int8", "split", 3072),
    ("nf4", "split", 3072),
)


@dataclass(frozen=True)
class Training:
    """How a model is trained."""

    lora_targets: tuple[str, ...]  # none: every weight is trained
    budget_tokens: int
    micro_batch_size: int  # pairs
    deepspeed: str | None  # zero2, zero3, or None for one GPU


@dataclass(frozen=True)
class Serving:
    """How a package is served on two T4s."""

    quantize: str
    placement: str
    tokens_per_batch: int


def plan_training(base: BaseModel, lora_targets: Sequence[str], head: str) -> Training:
    """Plan the training of a base model.

    Raises:
        UserError: Eight GPUs of 80 GB do not hold it.
    """
    parameters = sum(weight.elements for weight in base.weights)
    is_small = parameters < SMALL_PARAMETERS
    budget_tokens = SMALL_BUDGET if is_small else BUDGETS[head]
    if base.positions:
        budget_tokens = min(budget_tokens, base.positions)

    pairs = 1 if parameters >= LARGE_PARAMETERS else 2
    if is_small:
        pairs = SMALL_PAIRS
    step = TrainingStep(
        base=base,
        head=head,
        tokens=2 * pairs * budget_tokens,
        longest_row=budget_tokens,
        is_checkpointed=not is_small,
        moment_bytes=FLOAT32_MOMENTS,
        gpus=1,
    )
    if is_small:
        # Every weight is trained.
        return Training((), budget_tokens, pairs, None)

    # ZeRO-2 divides what is trained among the GPUs, ZeRO-3 the weights too.
    step = replace(
        step,
        gpus=TRAINING_GPUS,
        lora_rank=LORA_RANK,
        lora_targets=tuple(lora_targets),
        has_lora_dropout=True,
    )
    for stage in (2, 3):
        memory = count_step_memory(replace(step, zero=Zero(stage)))
        if memory.total <= (1 - RESERVED_SHARE) * TRAINING_GPU_GIB * GIB:
            return Training(step.lora_targets, budget_tokens, pairs, f"zero{stage}")
    raise UserError(
        f"its training needs {memory.total / GIB:.0f} GiB on each of {TRAINING_GPUS} GPUs; take a smaller model"
    )


def plan_serving(base: BaseModel, head: str, budget_tokens: int) -> Serving | None:
    """Choose the format in which two T4s serve a model; None where they cannot hold it."""
    # The first format that fits is taken: the fastest stands first.
    for quantize, placement, tokens_per_batch in SERVINGS:
        if placement == "split" and base.is_encoder:
            continue  # the kernel cannot split an encoder
        served = Served(base, head, quantize, softcap=False, budget_tokens=budget_tokens)
        _, bytes_by_gpu = place(served, tokens_per_batch, placement)
        if max(bytes_by_gpu) <= GPU_BYTES:
            return Serving(quantize, placement, tokens_per_batch)
    return None


def describe_hardware(plan: Training) -> str:
    """Write the GPUs, for a recipe's header."""
    if plan.deepspeed is None:
        return "one GPU, or CPU cores"
    return f"{TRAINING_GPUS} GPUs of {TRAINING_GPU_GIB} GB ({plan.deepspeed}); see pairwise check"
