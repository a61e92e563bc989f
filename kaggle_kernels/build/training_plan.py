"""How a base model that is new here would be trained and served: LoRA or not, on which GPUs, in which format on two T4s.

`pairwise new` computes this from the numbers of recipes/pairwise/memory, and writes it into the recipe's header.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from postprocess.memory.model_size import GPU_BYTES, Served
from postprocess.memory.t4_fit import place
from preprocess.core.errors import UserError
from recipes.pairwise.memory.base_model import BaseModel

GB = 1e9
SMALL_PARAMETERS = 1e9  # below, every weight is trained
LARGE_PARAMETERS = 10e9  # from here on, one pair at a time
LORA_RANK = 64
BUDGETS = {"score": 2048, "label_tokens": 2048, "reward": 1536}  # tokens of a sequence
SMALL_BUDGET = 512  # of a small model, which may be trained on a laptop

# Bytes of a trained parameter: itself, its gradient, a float32 copy and two moments.
TRAINED_BYTES = 16
TRAINING_GPUS = 8
TRAINING_GPU_BYTES = 80 * GB
USED_SHARE = 0.8  # of that memory; buffers of communication take the rest
RECOMPUTING = 3  # times what a forward pass of one layer takes

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
    """How a model is trained. Sizes are bytes of one GPU."""

    lora_targets: tuple[str, ...]  # none: every weight is trained
    budget_tokens: int
    pairs_per_step: int
    deepspeed: str | None  # zero2, zero3, or None for one GPU
    weight_bytes: float
    trained_bytes: float
    activation_bytes: float

    @property
    def total_bytes(self) -> float:
        """What one GPU holds."""
        return self.weight_bytes + self.trained_bytes + self.activation_bytes


@dataclass(frozen=True)
class Serving:
    """How a package is served on two T4s."""

    quantize: str
    placement: str
    tokens_per_batch: int


def plan_training(base: BaseModel, lora_targets: Sequence[str], layers: int, head: str) -> Training:
    """Plan the training of a base model.

    Args:
        base: The measured base model.
        lora_targets: The names of its linear layers.
        layers: How many layers it has.
        head: score, label_tokens or reward.

    Raises:
        UserError: Eight GPUs of 80 GB do not hold it.
    """
    parameters = sum(weight.elements for weight in base.weights)
    positions = base.positions or BUDGETS[head]
    if parameters < SMALL_PARAMETERS:
        budget_tokens = min(SMALL_BUDGET, positions)
        pairs = 8
        activations = count_activation_bytes(base, layers, 2 * pairs * budget_tokens)
        # Every weight is trained: there is no frozen one beside.
        return Training((), budget_tokens, pairs, None, 0, TRAINED_BYTES * parameters, activations)

    budget_tokens = min(BUDGETS[head], positions)
    pairs = 1 if parameters >= LARGE_PARAMETERS else 2
    activations = count_activation_bytes(base, layers, 2 * pairs * budget_tokens)
    adapter_parameters = 0
    for weight in base.weights:
        if weight.kind == "linear":
            adapter_parameters += LORA_RANK * sum(weight.shape)

    # ZeRO-2 divides what is trained among the GPUs, ZeRO-3 the weights too.
    plan = Training(
        lora_targets=tuple(lora_targets),
        budget_tokens=budget_tokens,
        pairs_per_step=pairs,
        deepspeed="zero2",
        weight_bytes=2 * parameters,
        trained_bytes=TRAINED_BYTES * adapter_parameters / TRAINING_GPUS,
        activation_bytes=activations,
    )
    if plan.total_bytes > USED_SHARE * TRAINING_GPU_BYTES:
        plan = replace(plan, deepspeed="zero3", weight_bytes=plan.weight_bytes / TRAINING_GPUS)
    if plan.total_bytes > USED_SHARE * TRAINING_GPU_BYTES:
        raise UserError(
            f"its training needs {plan.total_bytes / GB:.0f} GB on each of {TRAINING_GPUS} GPUs; take a smaller model"
        )
    return plan


def count_activation_bytes(base: BaseModel, layers: int, tokens: int) -> float:
    """Count what a step keeps for its backward pass: a checkpoint of each layer, and one layer recomputed."""
    width = next(weight.shape[1] for weight in base.weights if weight.kind == "embedding")
    checkpoints = 2 * tokens * width * layers
    return checkpoints + RECOMPUTING * tokens * base.batches["plain"].mlp_per_token


def plan_serving(base: BaseModel, head: str, budget_tokens: int) -> Serving | None:
    """Choose the format in which two T4s serve a model; None where they cannot hold it."""
    for quantize, placement, tokens_per_batch in SERVINGS:
        served = Served(base, head, quantize, softcap=False, budget_tokens=budget_tokens)
        if placement == "split" and base.is_encoder:
            continue
        needed_bytes = place(served, tokens_per_batch, placement)[1]
        if max(needed_bytes) <= GPU_BYTES:
            return Serving(quantize, placement, tokens_per_batch)
    return None


def describe_hardware(plan: Training) -> str:
    """Write the GPUs and the arithmetic of their memory, for a recipe's header."""
    sizes = (
        f"weights {plan.weight_bytes / GB:.1f}, trained {plan.trained_bytes / GB:.1f}, "
        f"activations {plan.activation_bytes / GB:.1f} GB"
    )
    if plan.deepspeed is None:
        return f"one GPU with {plan.total_bytes / GB:.1f} GB free, or CPU cores: {sizes}"
    return f"{TRAINING_GPUS} GPUs of 80 GB ({plan.deepspeed}), on each {plan.total_bytes / GB:.0f} GB: {sizes}"
