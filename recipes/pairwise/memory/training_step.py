"""What each GPU holds during a training step: arithmetic on a base model's shapes, no torch. All sizes are in bytes.

For P weights, of which T are trained, on N GPUs:

- weights: 2 P, in 16 bits. The linear layers of a QLoRA base take NF4_BYTES each, and the largest of them is unpacked
  (Dettmers et al. 2023). Without DeepSpeed what is trained is float32, 4 T, of which autocast makes 16-bit copies. ZeRO-3
  divides all by N; beside that, it gathers up to `stage3_max_live_parameters` and one tensor more.
- gradients: as many bytes as the trained weights. ZeRO-2 divides them by N; DDP's buckets hold them twice
  (`gradient_as_bucket_view` in PyTorch's documentation).
- optimizer: Adam's two moments, 8 T in float32 or 2 T in 8 bits, and with DeepSpeed a float32 copy of the weights, 4 T. Every
  stage of ZeRO divides them by N (Rajbhandari et al. 2020).
- activations: with checkpointing the input of each layer, and what one layer keeps (Chen et al. 2016); without it, what all
  layers keep. `count_kept_bytes` adds up what one layer keeps, as its code in transformers and PEFT has it. Liger's and
  Axolotl's kernels keep less.

tests/recipes/memory/test_training_step.py compares the activations with PyTorch's own on fake tensors.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from recipes.pairwise.memory.base_model import GIB, LAYER_NUMBER, NF4_BYTES, BaseModel, Weight

BFLOAT16_BYTES = 2
FLOAT32_BYTES = 4


@dataclass(frozen=True)
class Zero:
    """What of DeepSpeed's ZeRO decides memory: see recipes/deepspeed."""

    stage: int
    live_parameters: int = 10**9  # of stage 3: most weights that are gathered at one time
    offloads_weights: bool = False
    offloads_optimizer: bool = False


@dataclass(frozen=True)
class TrainingStep:
    """One micro-batch, and how it is trained."""

    base: BaseModel
    head: str
    tokens: int  # of a micro-batch, padding included
    longest_row: int  # tokens of its longest sequence
    is_checkpointed: bool  # layers are computed anew in the backward pass
    moment_bytes: int  # that the optimizer holds for a trained weight
    gpus: int
    zero: Zero | None = None  # None without DeepSpeed
    lora_rank: int = 0  # 0 without an adapter, where every weight is trained
    lora_targets: tuple[str, ...] = ()  # the names of the layers that the adapter is on
    has_lora_dropout: bool = False
    is_4bit: bool = False  # the base model's linear layers

    @property
    def trained_weight_bytes(self) -> int:
        """Bytes of a trained weight: DeepSpeed trains in 16 bits, beside a copy in float32."""
        return BFLOAT16_BYTES if self.zero else FLOAT32_BYTES

    @property
    def zero_stage(self) -> int:
        """The stage of ZeRO, 0 without it."""
        return self.zero.stage if self.zero else 0


@dataclass(frozen=True)
class StepMemory:
    """Bytes that each GPU holds at the worst moment of a step."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.gradients + self.optimizer + self.activations

    def describe(self) -> str:
        """Write the sum in GiB."""
        return (
            f"weights {self.weights / GIB:.1f} + gradients {self.gradients / GIB:.1f} + "
            f"optimizer {self.optimizer / GIB:.1f} + activations {self.activations / GIB:.1f} = "
            f"{self.total / GIB:.1f} GiB"
        )


def count_step_memory(step: TrainingStep) -> StepMemory:
    """Count what each GPU holds during a step, in bytes."""
    trained = count_trained_weights(step)
    gradients = trained * step.trained_weight_bytes
    optimizer = trained * step.moment_bytes

    # Without DeepSpeed, PyTorch's DDP trains on several GPUs: it sums the gradients over them in a
    # second copy. DeepSpeed has none, but its optimizer keeps the trained weights in float32 as well.
    has_ddp = step.zero is None and step.gpus > 1
    if has_ddp:
        gradients *= 2
    if step.zero is not None:
        optimizer += trained * FLOAT32_BYTES

    # ZeRO-1 shares the optimizer's state out among the GPUs, ZeRO-2 the gradients too.
    if step.zero_stage >= 1:
        optimizer //= step.gpus
    if step.zero_stage >= 2:
        gradients //= step.gpus
    if step.zero and step.zero.offloads_optimizer:
        optimizer = 0

    weights = count_weight_bytes(step)
    activations = count_activation_bytes(step)
    return StepMemory(weights, gradients, optimizer, activations)


def list_weights(step: TrainingStep) -> list[Weight]:
    """List the tensors of the base model and its head."""
    head = "label_tokens" if step.head == "label_tokens" else "score"
    return [*step.base.weights, *step.base.heads.get(head, ())]


def is_adapted(weight: Weight, step: TrainingStep) -> bool:
    """Return whether LoRA adapts a tensor."""
    return weight.kind == "linear" and weight.name.split(".")[-2] in step.lora_targets


def count_trained_weights(step: TrainingStep) -> int:
    """Count the numbers that are trained: all, or an adapter's and those of a classification head."""
    if not step.lora_rank:
        return sum(weight.elements for weight in list_weights(step))

    # An adapter is two matrices, (rank, inputs) and (outputs, rank): rank × (inputs + outputs) numbers.
    trained = 0
    for weight in step.base.weights:
        if is_adapted(weight, step):
            outputs, inputs = weight.shape
            trained += step.lora_rank * (inputs + outputs)

    # A classification head is new, and trained as a whole. label_tokens has the base model's own head.
    if step.head != "label_tokens":
        trained += sum(weight.elements for weight in step.base.heads["score"])
    return trained


def count_weight_bytes(step: TrainingStep) -> int:
    """Count the bytes of weights that each GPU holds at most, the adapter's included."""
    all_bytes = count_undivided_bytes(step)
    if step.zero_stage != 3:
        return all_bytes

    # ZeRO-3 divides the weights among the GPUs. Each keeps its part in its own memory, or in that of the
    # machine.
    part_bytes = all_bytes // step.gpus
    if step.zero.offloads_weights:
        part_bytes = 0

    # To compute a layer, a GPU gathers its weights from all GPUs. It holds gathered weights up to
    # DeepSpeed's limit, which the last tensor may exceed.
    weights = list_weights(step)
    elements = sum(weight.elements for weight in weights)
    largest = max(weight.elements for weight in weights)
    gathered_bytes = BFLOAT16_BYTES * min(elements, step.zero.live_parameters + largest)
    return min(all_bytes, part_bytes + gathered_bytes)


def count_undivided_bytes(step: TrainingStep) -> int:
    """Count the bytes of all weights, the adapter's included, on a GPU that holds the whole model.

    That is any GPU but with ZeRO-3, which divides the weights.
    """
    weights = list_weights(step)
    elements_of_model = sum(weight.elements for weight in weights)
    elements_by_layer = [weight.elements for weight in weights if weight.kind == "linear"]
    elements_of_layers = sum(elements_by_layer)
    trained_bytes = count_trained_weights(step) * step.trained_weight_bytes

    # A full fine-tune trains all weights.
    if not step.lora_rank:
        if step.zero is not None:
            return trained_bytes
        # Without DeepSpeed they are float32, and autocast makes 16-bit copies of the linear layers.
        return trained_bytes + BFLOAT16_BYTES * elements_of_layers

    # LoRA trains an adapter, beside which the base model stands frozen in 16 bits.
    if not step.is_4bit:
        return trained_bytes + BFLOAT16_BYTES * elements_of_model

    # QLoRA's base has its linear layers in nf4. One of them at a time is unpacked to compute with it.
    nf4_bytes = int(NF4_BYTES * elements_of_layers)
    other_bytes = BFLOAT16_BYTES * (elements_of_model - elements_of_layers)
    unpacked_bytes = BFLOAT16_BYTES * max(elements_by_layer)
    return trained_bytes + nf4_bytes + other_bytes + unpacked_bytes


def count_activation_bytes(step: TrainingStep) -> int:
    """Count the bytes that a step keeps for its backward pass, and those of that pass itself."""
    # Layers are numbered from 0 in the names of their tensors: model.layers.41.mlp…
    layer = list_last_layer(step.base)
    last_number = LAYER_NUMBER.search(layer[0].name)[1]
    layer_count = int(last_number) + 1

    # All sizes that follow are bytes for each token. The first is what a layer hands on to the next one.
    # It is in float32 only if all weights are: in a full fine-tune without DeepSpeed.
    has_16_bit_weights = step.zero is not None or step.lora_rank > 0
    number_bytes = BFLOAT16_BYTES if has_16_bit_weights else FLOAT32_BYTES
    layer_output = number_bytes * find_width(step.base)

    # With checkpointing, only the input of each layer is kept, which is the output of the one before. In
    # the backward pass a layer is computed anew, so that what it keeps is there for one layer at a time.
    kept_by_layer = count_kept_bytes(step, layer)
    if step.is_checkpointed:
        kept = layer_count * layer_output + kept_by_layer
    else:
        kept = layer_count * kept_by_layer

    # The worst moment is when the backward pass enters a layer, and with it the MLP. Beside what is
    # kept, there are the gradient of the layer's output, and three that are as wide as the MLP.
    mlp_width = find_mlp_output(layer).shape[1]
    gradients = layer_output + 3 * BFLOAT16_BYTES * mlp_width
    return step.tokens * (kept + gradients)


def count_kept_bytes(step: TrainingStep, layer: list[Weight]) -> int:
    """Count the bytes that one layer keeps for its backward pass, for each token."""
    attention_width = find_attention_width(layer, find_width(step.base))
    mlp_width = find_mlp_output(layer).shape[1]

    # A norm keeps its input in float32.
    norm_bytes = 0
    for weight in layer:
        if weight.kind == "norm" and weight.name.endswith(".weight"):
            norm_bytes += FLOAT32_BYTES * find_norm_width(weight, layer)

    # Attention keeps queries, keys, values (both repeated for all heads), its result, and the mask.
    attention_numbers = 4 * attention_width + step.longest_row

    # An MLP keeps what goes into its activation function; with a gate, both factors too.
    mlp_numbers = 3 * mlp_width if has_gate(layer, mlp_width) else mlp_width

    # Both are in 16 bits.
    intermediate_bytes = BFLOAT16_BYTES * (attention_numbers + mlp_numbers)
    return norm_bytes + intermediate_bytes + count_kept_inputs(step, layer)


def count_kept_inputs(step: TrainingStep, layer: list[Weight]) -> int:
    """Count the bytes of inputs that a layer of the model keeps, for each token.

    The gradient of a trained weight is computed from what went into it, which is kept until then.
    """
    # In a full fine-tune, three inputs are kept: that of queries, keys and values, and that of the MLP,
    # both as wide as the stream, and what goes into the MLP's output. Attention's result, a fourth, is
    # counted by count_kept_bytes.
    if not step.lora_rank:
        numbers = 2 * find_width(step.base) + find_mlp_output(layer).shape[1]
        return BFLOAT16_BYTES * numbers

    kept_bytes = 0
    for weight in layer:
        if not is_adapted(weight, step):
            continue
        # An adapter keeps its input and the result of its first matrix, in 16 bits.
        inputs = weight.shape[1]
        kept_bytes += BFLOAT16_BYTES * (inputs + step.lora_rank)
        # For each input, dropout keeps a byte that says whether it was dropped.
        if step.has_lora_dropout:
            kept_bytes += inputs
    return kept_bytes


def list_last_layer(base: BaseModel) -> list[Weight]:
    """List the tensors of the last layer; an encoder's first may lack a norm."""
    # The number of a layer stands in the names of its tensors.
    by_number: dict[int, list[Weight]] = {}
    for weight in base.weights:
        match = LAYER_NUMBER.search(weight.name)
        if match:
            by_number.setdefault(int(match[1]), []).append(weight)
    return by_number[max(by_number)]


def find_mlp_output(layer: Iterable[Weight]) -> Weight:
    """Find the linear layer behind the activation function: the one with most inputs."""
    linear = [weight for weight in layer if weight.kind == "linear"]
    return max(linear, key=lambda weight: weight.shape[1])


def find_attention_width(layer: Iterable[Weight], width: int) -> int:
    """Find how wide attention's result is, from the linear layer that brings it back to the stream."""
    mlp_output = find_mlp_output(layer)
    widest = 0
    for weight in layer:
        returns_to_stream = weight.kind == "linear" and weight.shape[0] == width
        if returns_to_stream and weight != mlp_output:
            widest = max(widest, weight.shape[1])
    return widest


def find_width(base: BaseModel) -> int:
    """Find the width of the stream between layers."""
    return next(weight.shape[1] for weight in base.weights if weight.kind == "embedding")


def find_norm_width(norm: Weight, layer: Iterable[Weight]) -> int:
    """Find how many numbers of a token a norm sees: Qwen3's norms of queries and keys see one head at a time."""
    for name in ("q", "k"):
        if not norm.name.endswith(f"{name}_norm.weight"):
            continue
        for weight in layer:
            if weight.name.endswith(f"{name}_proj.weight"):
                return weight.shape[0]
    return norm.shape[0]


def has_gate(layer: Iterable[Weight], mlp_width: int) -> bool:
    """Return whether an MLP multiplies its activation with a gate: its first layers have twice its width."""
    first_outputs = 0
    for weight in layer:
        if weight.kind == "linear" and weight.shape[0] in (mlp_width, 2 * mlp_width):
            first_outputs += weight.shape[0]
    return first_outputs >= 2 * mlp_width
