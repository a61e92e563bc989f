"""How large a packaged model is, and what a GPU needs to score with it: arithmetic on its dimensions, no torch, no weights.

Sizes are in bytes. Dimensions come from dimensions.yml, or from the config.json of a base model that is a folder.
"""

import functools
import math
from dataclasses import dataclass, fields
from pathlib import Path

import yaml

from kaggle_kernels.runtime.models.placement import balance, list_parts
from preprocess.core.errors import UserError
from preprocess.core.files import read_json
from recipes.pairwise.config.schema import GPTQ_BITS, Recipe

DIMENSIONS = Path(__file__).parent / "dimensions.yml"
GIB = 2**30
GPU_BYTES = 29 * GIB // 2  # of a T4's 15 GiB, out-of-memory messages of PyTorch say that 14.56 to 14.76 can be had
CUDA_BYTES = 3 * GIB // 4  # CUDA's context, cuBLAS's workspace, and what PyTorch's allocator holds without using it
NF4_BLOCK = 64
GPTQ_GROUP = 128
SHORTEST_ROW = 64  # tokens; no row of a batch is shorter, template included
TIED = ("gemma2", "bert")  # tie_word_embeddings where config.json leaves it out


@dataclass(frozen=True)
class Dimensions:
    """The keys of config.json that decide a model's weights."""

    model_type: str
    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    max_position_embeddings: int
    type_vocab_size: int


@dataclass(frozen=True)
class Weight:
    """A tensor of the 16-bit model: its name, its shape, and linear, embedding, norm, bias or head."""

    name: str
    shape: tuple[int, ...]
    kind: str

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Served:
    """A packaged model as it is served. `lora` is rank and target modules of an adapter that stays apart, or None."""

    dimensions: Dimensions
    head: str
    verdicts: int
    quantize: str
    softcap: bool
    budget_tokens: int
    lora: tuple[int, tuple[str, ...]] | None = None


def served_of(recipe: Recipe, dimensions: Dimensions | None = None) -> Served:
    """What a recipe's package will be; of the adapter `best`, the larger of its two outcomes.

    `dimensions` are the base model's, where they are known better than from the recipe.
    """
    block = recipe.pairwise
    lora = None
    if block.package.adapter != "merged":
        lora = (recipe.axolotl.get("lora_r") or 8, tuple(recipe.axolotl.get("lora_target_modules") or ()))
    try:
        dimensions = dimensions or read_dimensions(recipe.axolotl["base_model"])
    except UserError as error:
        raise UserError(f"{recipe.path}: base_model: {error}") from None
    return Served(
        dimensions,
        block.head,
        len(block.verdicts),
        block.package.quantize,
        block.softcap,
        block.budget_tokens,
        lora,
    )


def read_dimensions(base_model: str) -> Dimensions:
    """The dimensions of a base model; a UserError where nothing says them."""
    known = known_dimensions()
    if base_model in known:
        return dimensions_of(known[base_model], f"{DIMENSIONS.name}: {base_model}")
    config = Path(base_model) / "config.json"
    if not config.is_file():
        raise UserError(
            f"postprocess/memory/{DIMENSIONS.name}: no entry {base_model}, and no such folder; copy the keys that the other "
            "entries have from its config.json"
        )
    return dimensions_of(read_json(config), str(config))


@functools.cache
def known_dimensions() -> dict[str, dict]:
    """dimensions.yml, by base model."""
    return yaml.safe_load(DIMENSIONS.read_text(encoding="utf-8"))


def dimensions_of(config: dict, where: str) -> Dimensions:
    """Dimensions from the keys of a config.json, `where` that stands; what transformers fills in is filled in."""
    kind = config.get("model_type")
    if kind not in ("gemma2", "llama", "qwen2", "bert"):
        raise UserError(f"{where}: model_type {kind!r}; sizes are known of gemma2, llama, qwen2 and bert")
    heads = config.get("num_attention_heads")
    filled = {
        "num_key_value_heads": heads,
        "head_dim": config.get("hidden_size", 0) // (heads or 1),
        "tie_word_embeddings": kind in TIED,
        "max_position_embeddings": 0,
        "type_vocab_size": 2,
    }
    values = filled | {key: value for key, value in config.items() if value is not None}
    missing = [field.name for field in fields(Dimensions) if values.get(field.name) is None]
    if missing:
        raise UserError(f"{where}: no {', '.join(missing)}; copy them from the model's config.json")
    for field in fields(Dimensions):
        if field.name != "model_type" and not isinstance(values[field.name], int):
            raise UserError(f"{where}: {field.name} is {values[field.name]!r}, expected a whole number")
    return Dimensions(**{field.name: values[field.name] for field in fields(Dimensions)})


def weights(dimensions: Dimensions, head: str, verdicts: int) -> list[Weight]:
    """Every tensor of the model with this head, under transformers' names."""
    outputs = {"score": verdicts, "reward": 1, "label_tokens": 0}[head]
    if dimensions.model_type == "bert":
        return _bert(dimensions, outputs)
    d = dimensions
    layers = [weight for number in range(d.num_hidden_layers) for weight in _decoder_layer(d, f"model.layers.{number}")]
    found = [
        Weight("model.embed_tokens.weight", (d.vocab_size, d.hidden_size), "embedding"),
        *layers,
        Weight("model.norm.weight", (d.hidden_size,), "norm"),
    ]
    if outputs:
        return [*found, Weight("score.weight", (outputs, d.hidden_size), "head")]
    if d.tie_word_embeddings:
        return found
    return [*found, Weight("lm_head.weight", (d.vocab_size, d.hidden_size), "head")]


def _decoder_layer(d: Dimensions, prefix: str) -> list[Weight]:
    queries, keys = d.num_attention_heads * d.head_dim, d.num_key_value_heads * d.head_dim
    shapes = {
        "self_attn.q_proj": (queries, d.hidden_size),
        "self_attn.k_proj": (keys, d.hidden_size),
        "self_attn.v_proj": (keys, d.hidden_size),
        "self_attn.o_proj": (d.hidden_size, queries),
        "mlp.gate_proj": (d.intermediate_size, d.hidden_size),
        "mlp.up_proj": (d.intermediate_size, d.hidden_size),
        "mlp.down_proj": (d.hidden_size, d.intermediate_size),
    }
    norms = ["input_layernorm", "post_attention_layernorm"]
    if d.model_type == "gemma2":
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    biases = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"] if d.model_type == "qwen2" else []
    return [
        *(Weight(f"{prefix}.{name}.weight", shape, "linear") for name, shape in shapes.items()),
        *(Weight(f"{prefix}.{name}.bias", shapes[name][:1], "bias") for name in biases),
        *(Weight(f"{prefix}.{name}.weight", (d.hidden_size,), "norm") for name in norms),
    ]


def _bert(d: Dimensions, outputs: int) -> list[Weight]:
    tables = {
        "word_embeddings": d.vocab_size,
        "position_embeddings": d.max_position_embeddings,
        "token_type_embeddings": d.type_vocab_size,
    }
    found = [
        Weight(f"bert.embeddings.{name}.weight", (rows, d.hidden_size), "embedding") for name, rows in tables.items()
    ] + _bert_norm("bert.embeddings", d)
    for number in range(d.num_hidden_layers):
        layer = f"bert.encoder.layer.{number}"
        for name in ("query", "key", "value"):
            found += _bert_dense(f"{layer}.attention.self.{name}", d.hidden_size, d.hidden_size)
        found += _bert_dense(f"{layer}.attention.output.dense", d.hidden_size, d.hidden_size)
        found += _bert_norm(f"{layer}.attention.output", d)
        found += _bert_dense(f"{layer}.intermediate.dense", d.intermediate_size, d.hidden_size)
        found += _bert_dense(f"{layer}.output.dense", d.hidden_size, d.intermediate_size)
        found += _bert_norm(f"{layer}.output", d)
    found += _bert_dense("bert.pooler.dense", d.hidden_size, d.hidden_size)
    head = [Weight("classifier.weight", (outputs, d.hidden_size), "head"), Weight("classifier.bias", (outputs,), "head")]
    return found + (head if outputs else [])


def _bert_dense(name: str, rows: int, columns: int) -> list[Weight]:
    return [Weight(f"{name}.weight", (rows, columns), "linear"), Weight(f"{name}.bias", (rows,), "bias")]


def _bert_norm(prefix: str, d: Dimensions) -> list[Weight]:
    return [Weight(f"{prefix}.LayerNorm.{name}", (d.hidden_size,), "norm") for name in ("weight", "bias")]


def packed_bytes(weight: Weight, quantize: str) -> tuple[int, int]:
    """Bytes of a tensor as packaged, and of the state that its quantisation needs besides."""
    if weight.kind != "linear" or quantize == "none":
        return 2 * weight.elements, 0
    if quantize == "nf4":  # a float32 scale a block, and the 16 values that 4 bits stand for
        return math.ceil(weight.elements / 2), 4 * math.ceil(weight.elements / NF4_BLOCK) + 64
    if quantize in GPTQ_BITS:  # a float16 scale and a packed zero a group, an int32 an input (g_idx)
        bits, groups = GPTQ_BITS[quantize], weight.elements // GPTQ_GROUP
        return weight.elements * bits // 8, 2 * groups + groups * bits // 8 + 4 * weight.shape[1]
    return weight.elements, 4 * weight.shape[0]  # a float32 scale a row


def bytes_by_class(served: Served) -> dict[str, int]:
    """Bytes of a packaged model's tensors: linear, embedding, norm, bias, head, quantisation state, adapter."""
    total = dict.fromkeys(("linear", "embedding", "norm", "bias", "head", "quantisation state", "adapter"), 0)
    for weight in weights(served.dimensions, served.head, served.verdicts):
        packed, state = packed_bytes(weight, served.quantize)
        total[weight.kind] += packed
        total["quantisation state"] += state
        total["adapter"] += _lora_bytes(weight, served)
    return total


def _lora_bytes(weight: Weight, served: Served) -> int:
    rank, targets = served.lora or (0, ())
    is_target = weight.kind == "linear" and weight.name.split(".")[-2] in targets
    return 2 * rank * sum(weight.shape) if is_target else 0


def activation_bytes(served: Served, tokens_per_batch: int) -> int:
    """The most that a batch of `tokens_per_batch` tokens takes on a GPU beside the weights, while one layer is computed.

    Counted in float16: the residual, the normed input and what comes out (three hidden states), two of them again in
    float32 inside a norm; then the larger of the MLP's three intermediates and of attention: queries, keys and values, the
    latter two also repeated for every head, and the scores of the longest rows. Without a soft cap those are two float32
    copies beside float32 queries, keys and values: PyTorch's math kernel (where it picks another on a T4, less is needed).
    With one, transformers' eager attention holds 10 bytes a score. Quantised layers add one layer's weights in float16 (nf4;
    of GPTQ also its codes, twice, a byte each) or its int32 result (int8). Of a causal LM, logits are computed at the last
    place of each row only. Nothing is cached for generation.
    """
    d, tokens = served.dimensions, largest_batch(served, tokens_per_batch)
    longest = min(served.budget_tokens, tokens)
    hidden = tokens * d.hidden_size * (3 * 2 + 2 * 4)
    mlp = 3 * 2 * tokens * d.intermediate_size
    queries = d.num_attention_heads * d.head_dim
    scores = tokens * longest * d.num_attention_heads * (10 if served.softcap else 8)
    projected = tokens * queries * (5 * 2 + (0 if served.softcap else 3 * 4))
    attention = projected + scores + 2 * tokens * longest
    shapes = [weight.shape for weight in weights(d, served.head, served.verdicts) if weight.kind == "linear"]
    layer = max(map(math.prod, shapes))
    gptq = dict.fromkeys(GPTQ_BITS, 4 * layer)
    unpacked = {"none": 0, "nf4": 2 * layer, "int8": 5 * tokens * d.intermediate_size, **gptq}[served.quantize]
    return hidden + max(mlp, attention) + unpacked + logit_bytes(served, tokens_per_batch)


def logit_bytes(served: Served, tokens_per_batch: int) -> int:
    """The most that a batch's logits take: of a causal LM, float16 and float32 of the vocabulary for each row's last place."""
    if served.head != "label_tokens":
        return 0
    return math.ceil(largest_batch(served, tokens_per_batch) / SHORTEST_ROW) * served.dimensions.vocab_size * (2 + 4)


def largest_batch(served: Served, tokens_per_batch: int) -> int:
    """Tokens of the largest batch: a request that is longer than `tokens_per_batch` is a batch of its own."""
    return max(tokens_per_batch, served.budget_tokens * (2 if served.head == "reward" else 1))


def weight_bytes(served: Served, gpus: int = 1, byte_limit: int | None = None) -> list[int]:
    """Bytes of the weights on each GPU, with the layers in balance over `gpus` of them, as the kernel places them."""
    sizes = {}
    for weight in weights(served.dimensions, served.head, served.verdicts):
        size = sum(packed_bytes(weight, served.quantize)) + _lora_bytes(weight, served)
        sizes[weight.name] = (size, weight.elements)
    if gpus == 1:
        return [sum(size for size, _ in sizes.values())]
    if served.dimensions.model_type == "bert":
        raise ValueError("an encoder's layers are not split")
    parts = list(list_parts(sizes).values())
    totals = [0] * gpus
    for part, number in zip(parts, balance(parts, gpus, byte_limit), strict=True):
        totals[number] += part.size_bytes
    return totals


def weight_bytes_limit(served: Served, tokens_per_batch: int, gpus: int) -> int:
    """What a GPU has for the weights of a model over `gpus` of them: its memory without the batches in flight and CUDA."""
    return GPU_BYTES - gpus * activation_bytes(served, tokens_per_batch) - CUDA_BYTES


def gpu_bytes(served: Served, tokens_per_batch: int, gpus: int = 1) -> list[int]:
    """What each of the GPUs that share one copy of the model needs: weights, a batch, CUDA itself.

    A model on several GPUs has a batch in flight for each of them. A GPU computes one at a time, but PyTorch keeps the memory
    of each batch's stream apart (kaggle_kernels/runtime/models/pipeline.py).
    """
    byte_limit = weight_bytes_limit(served, tokens_per_batch, gpus)
    beside = GPU_BYTES - byte_limit
    return [held + beside for held in weight_bytes(served, gpus, byte_limit)]
