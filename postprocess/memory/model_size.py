"""How large a packaged model is, and what a GPU needs to score with it: arithmetic on its base model's numbers, no torch.

All sizes are in bytes. `t4_fit` and the build compare them with a T4's memory.
"""

import math
from dataclasses import dataclass

from kaggle_kernels.runtime.models.placement import balance, list_parts
from preprocess.core.errors import UserError
from recipes.pairwise.config.schema import GPTQ_BITS, Recipe
from recipes.pairwise.config.served_models import why_not_served
from recipes.pairwise.memory.base_model import GIB, BaseModel, Weight, find_base_model

# Of a T4's 15 GiB, out-of-memory messages of PyTorch say that 14.56 to 14.76 can be had.
GPU_BYTES = 29 * GIB // 2

# CUDA's context, cuBLAS's workspace, and what PyTorch's allocator holds without using it.
CUDA_BYTES = 3 * GIB // 4

FLOAT16_BYTES = 2
FLOAT32_BYTES = 4
NF4_BLOCK = 64  # weights that share a scale
NF4_VALUES = 16  # numbers that four bits can stand for
GPTQ_GROUP = 128  # weights that share a scale and a zero
SHORTEST_ROW = 64  # tokens; no row of a batch is shorter, template included
PEFT_RANK = 8  # of LoRA, where a recipe names none

CLASSES = ("linear", "embedding", "norm", "bias", "head", "quantisation state", "adapter")


@dataclass(frozen=True)
class Served:
    """A packaged model as it is served. An adapter that stays apart has a rank above 0."""

    base: BaseModel
    head: str
    quantize: str
    softcap: bool
    budget_tokens: int
    lora_rank: int = 0
    lora_targets: tuple[str, ...] = ()

    @property
    def weights(self) -> tuple[Weight, ...]:
        """Every tensor of the model with its head, under transformers' names."""
        head = "label_tokens" if self.head == "label_tokens" else "score"
        return (*self.base.weights, *self.base.heads[head])


def served_of(recipe: Recipe, base: BaseModel | None = None) -> Served:
    """Describe the model that a recipe will package in numbers: the sizes that its memory depends on.

    Without `base`, the sizes of its base model are looked up by the base model's name.

    With `adapter: best`, the adapter is merged or stays apart, whichever is nearer to the trained model. That
    is not known yet, so the larger package of the two is described: the one with the adapter apart.

    Raises:
        UserError: The base model's sizes are unknown, or Kaggle's T4s cannot run it.
    """
    block = recipe.pairwise
    base_name = recipe.axolotl["base_model"]
    try:
        base = base or find_base_model(base_name)
    except UserError as error:
        raise UserError(f"{recipe.path}: base_model: {error}") from None

    reason = why_not_served(base.model_type, block.head)
    if reason is None and block.head == "label_tokens" and "label_tokens" not in base.heads:
        reason = f"{base.model_type} is an encoder, which has no answer tokens"
    if reason is not None:
        raise UserError(f"{recipe.path}: base_model: {base_name}: {reason}")

    # Only an adapter that stays apart has bytes of its own: rank 0 stands for none.
    lora_rank = 0
    lora_targets = ()
    if block.package.adapter != "merged":
        lora_rank = recipe.axolotl.get("lora_r") or PEFT_RANK
        lora_targets = tuple(recipe.axolotl.get("lora_target_modules") or ())
    return Served(
        base=base,
        head=block.head,
        quantize=block.package.quantize,
        softcap=block.softcap,
        budget_tokens=block.budget_tokens,
        lora_rank=lora_rank,
        lora_targets=lora_targets,
    )


def packed_bytes(weight: Weight, quantize: str) -> tuple[int, int]:
    """Compute the bytes that a tensor takes in a package.

    Returns:
        The bytes of its numbers, and those of the scales and tables that decoding them needs.
    """
    # Only linear layers are quantised.
    if weight.kind != "linear" or quantize == "none":
        return FLOAT16_BYTES * weight.elements, 0

    outputs, inputs = weight.shape
    if quantize == "nf4":
        # Two weights a byte. Each block has a float32 scale; the tensor has a float32 table of the
        # values that four bits stand for.
        blocks = math.ceil(weight.elements / NF4_BLOCK)
        state_bytes = FLOAT32_BYTES * (blocks + NF4_VALUES)
        return math.ceil(weight.elements / 2), state_bytes

    if quantize in GPTQ_BITS:
        # Each group has a float16 scale, and a zero of as many bits as a weight. For each input there is
        # the number of its group, an int32.
        bits = GPTQ_BITS[quantize]
        groups = weight.elements // GPTQ_GROUP
        scale_bytes = FLOAT16_BYTES * groups
        zero_bytes = groups * bits // 8
        group_number_bytes = 4 * inputs
        state_bytes = scale_bytes + zero_bytes + group_number_bytes
        return weight.elements * bits // 8, state_bytes

    # int8: a byte a weight, and a float32 scale for each output.
    return weight.elements, FLOAT32_BYTES * outputs


def lora_bytes(weight: Weight, served: Served) -> int:
    """Return the bytes of the two matrices that an adapter adds to a tensor, or 0."""
    is_target = weight.kind == "linear" and weight.name.split(".")[-2] in served.lora_targets
    if not is_target:
        return 0
    return 2 * served.lora_rank * sum(weight.shape)


def bytes_by_class(served: Served) -> dict[str, int]:
    """Add up the bytes of a packaged model's tensors by their class."""
    total = dict.fromkeys(CLASSES, 0)
    for weight in served.weights:
        packed, state = packed_bytes(weight, served.quantize)
        total[weight.kind] += packed
        total["quantisation state"] += state
        total["adapter"] += lora_bytes(weight, served)
    return total


def weight_bytes(served: Served, gpus: int = 1, byte_limit: int | None = None) -> list[int]:
    """Compute the bytes of a model's weights on each of the GPUs that share it, placed as the kernel places them.

    A GPU has `byte_limit` bytes for weights; None for no limit.
    """
    # By the tensor's name: the bytes that it takes, and its number of elements.
    sizes = {}
    for weight in served.weights:
        packed, state = packed_bytes(weight, served.quantize)
        size = packed + state + lora_bytes(weight, served)
        sizes[weight.name] = (size, weight.elements)
    if gpus == 1:
        return [sum(size for size, _ in sizes.values())]
    if served.base.is_encoder:
        raise ValueError("an encoder's layers are not split")

    # The kernel divides a model with the same two functions: `list_parts` lists the parts that may not be
    # divided, such as a layer, and `balance` chooses a GPU for each of them.
    parts = list(list_parts(sizes).values())
    gpu_of_parts = balance(parts, gpus, byte_limit)
    bytes_by_gpu = [0] * gpus
    for part, gpu in zip(parts, gpu_of_parts, strict=True):
        bytes_by_gpu[gpu] += part.size_bytes
    return bytes_by_gpu


def weight_bytes_limit(served: Served, tokens_per_batch: int, gpus: int) -> int:
    """Return how many bytes of a GPU are left for the weights of a model whose layers stand on `gpus` of them.

    As many batches are in flight as there are GPUs. A GPU computes one of them at a time, but each batch
    has a CUDA stream of its own, and PyTorch gives the memory of one stream to no other
    (kaggle_kernels/runtime/models/pipeline.py). So a GPU keeps memory for all of them.
    """
    batches_in_flight = gpus
    activations = batches_in_flight * activation_bytes(served, tokens_per_batch)
    return GPU_BYTES - activations - CUDA_BYTES


def activation_bytes(served: Served, tokens_per_batch: int) -> int:
    """Compute the most bytes that a batch takes on a GPU beside the weights."""
    tokens = largest_batch(served, tokens_per_batch)
    longest_row = min(served.budget_tokens, tokens)
    attention = "softcap" if served.softcap else "plain"
    measured = served.base.batches[attention]

    # Attention holds a score for every two tokens of a row, so for one token as many as its row has tokens.
    # Attention and MLP run one after the other: only the larger of the two counts.
    scores_per_token = measured.attention_per_score * longest_row
    attention_per_token = measured.attention_per_token + scores_per_token
    bytes_per_token = max(measured.mlp_per_token, attention_per_token)

    # The figures so far were measured on a classifier in 16 bits. A quantised model also unpacks its layers,
    # and a causal LM computes logits.
    unpacked = unpacked_bytes(served, tokens)
    logits = logit_bytes(served, tokens_per_batch)
    return tokens * bytes_per_token + unpacked + logits


def unpacked_bytes(served: Served, tokens: int) -> int:
    """Compute what the largest quantised layer needs beside its weights while a batch passes through it."""
    if served.quantize == "none":
        return 0

    # One layer is unpacked at a time; the largest decides.
    layers = [weight for weight in served.weights if weight.kind == "linear"]
    most_weights = max(layer.elements for layer in layers)
    if served.quantize == "nf4":
        return FLOAT16_BYTES * most_weights
    if served.quantize in GPTQ_BITS:
        # In float16, and the codes twice, a byte each.
        bytes_per_weight = FLOAT16_BYTES + 2
        return bytes_per_weight * most_weights

    # An int8 layer is not unpacked. Its input is held as int8, one byte, and its output as int32, four
    # bytes. The input is taken to be as wide as the output.
    most_outputs = max(layer.shape[0] for layer in layers)
    bytes_per_output = 1 + 4
    return bytes_per_output * tokens * most_outputs


def logit_bytes(served: Served, tokens_per_batch: int) -> int:
    """Return the most that a batch's logits take: of a causal LM, float16 and float32 of the vocabulary for each row."""
    if served.head != "label_tokens":
        return 0
    # Logits are computed for the last token of each row only; the shortest rows make the most rows.
    most_rows = math.ceil(largest_batch(served, tokens_per_batch) / SHORTEST_ROW)
    return most_rows * served.base.vocabulary * (FLOAT16_BYTES + FLOAT32_BYTES)


def largest_batch(served: Served, tokens_per_batch: int) -> int:
    """Return the tokens of the largest batch: a longer request is a batch of its own, of two rows for a reward model."""
    rows_of_request = 2 if served.head == "reward" else 1
    return max(tokens_per_batch, served.budget_tokens * rows_of_request)


def gpu_bytes(served: Served, tokens_per_batch: int, gpus: int = 1) -> list[int]:
    """Compute what each of the GPUs that share one copy of the model needs: weights, a batch, CUDA itself.

    Returns:
        The bytes that each GPU needs. They may be more than it has.
    """
    byte_limit = weight_bytes_limit(served, tokens_per_batch, gpus)
    weights_by_gpu = weight_bytes(served, gpus, byte_limit)

    # The limit is what batches and CUDA leave of a GPU: the rest is what they take.
    bytes_beside_weights = GPU_BYTES - byte_limit
    return [weights + bytes_beside_weights for weights in weights_by_gpu]
