"""SmoothQuant (Xiao et al. 2023): outliers of activations are moved into weights before int8.

int8 rounds the numbers of a token with one scale, that of the largest. In models above 7B some channels
are a hundred times larger than the rest, which is then rounded to nothing. Where a linear layer's input
comes out of a norm, or is a product with another layer's output, dividing a channel of the one by s and
multiplying the column of the other by s changes no result but the rounding. The scales are folded into
the weights, so that nothing changes when the package runs. quantise_run.py calls this.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

# Architectures whose layers are built as `find_groups` says.
MODEL_TYPES = ("gemma2", "llama", "mistral", "qwen2", "qwen3")
# How much of an outlier moves into the weights: the paper's alpha.
STRENGTH = 0.5


@dataclass(frozen=True)
class Group:
    """Linear layers with the same input, and the module that gives it."""

    source: str  # the norm, or the linear layer whose output is multiplied into the input
    targets: Sequence[str]


@dataclass(frozen=True)
class Smoothing:
    """What SmoothQuant changes in a model, by the names of its tensors."""

    norms: Mapping[str, torch.Tensor]  # new weights of norms, in float16
    columns: Mapping[str, torch.Tensor]  # for weights of linear layers, a factor on each input
    # For weights and biases of linear layers, a divisor of each output.
    rows: Mapping[str, torch.Tensor]

    def apply(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Fold the scales into one of the model's tensors; one that changes is returned in float32."""
        # A norm has a new weight. A linear layer may be scaled along its inputs, its outputs, or both.
        if name in self.norms:
            return self.norms[name]
        if name in self.columns:
            tensor = tensor.to(torch.float32) * self.columns[name]
        if name in self.rows:
            # A weight has its outputs along the first axis, and so has a bias.
            divisors = self.rows[name].reshape(-1, *[1] * (tensor.dim() - 1))
            tensor = tensor.to(torch.float32) / divisors
        return tensor


def find_groups(model: PreTrainedModel) -> list[Group]:
    """Find the linear layers of a model that can be smoothed; none in an architecture that is not known.

    In each layer of a decoder these are three groups: the inputs of attention, those of the feed-forward
    network, and its last projection, whose input is a product with up_proj's output.
    """
    if model.config.model_type not in MODEL_TYPES:
        return []

    modules = dict(model.named_modules())
    groups = []
    for name in modules:
        if not name.endswith(".self_attn"):
            continue

        # Gemma-2 normalises the feed-forward's input by itself, the others after attention.
        layer = name.removesuffix(".self_attn")
        feed_forward_norm = f"{layer}.pre_feedforward_layernorm"
        if feed_forward_norm not in modules:
            feed_forward_norm = f"{layer}.post_attention_layernorm"

        attention_inputs = [f"{name}.{part}_proj" for part in "qkv"]
        feed_forward_inputs = [f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj"]
        groups.append(Group(f"{layer}.input_layernorm", attention_inputs))
        groups.append(Group(feed_forward_norm, feed_forward_inputs))
        groups.append(Group(f"{layer}.mlp.up_proj", [f"{layer}.mlp.down_proj"]))
    return groups


def smooth(model: PreTrainedModel, sequences: Iterable[Sequence[int]]) -> Smoothing:
    """Compute by how much each channel is scaled down in activations, and up in the weights that read them.

    Nothing is changed in `model`.
    """
    groups = find_groups(model)
    largest_inputs = measure_inputs(model, groups, sequences)
    # Gemma's norms multiply by 1 + weight.
    norm_offset = 1.0 if model.config.model_type.startswith("gemma") else 0.0

    # What changes, by the tensor's name: norms get new weights; linear layers are multiplied along their
    # inputs (columns) and divided along their outputs (rows).
    norms = {}
    columns = {}
    rows = {}
    for group in groups:
        scales = compute_scales(model, group, largest_inputs[group.source])
        source = model.get_submodule(group.source)
        if isinstance(source, torch.nn.Linear):
            # Its outputs are divided, bias included.
            rows[f"{group.source}.weight"] = scales
            rows[f"{group.source}.bias"] = scales
        else:
            new_weight, scales = divide_norm(source.weight, scales, norm_offset)
            norms[f"{group.source}.weight"] = new_weight

        # What was divided away from the inputs is multiplied into the weights that read them.
        for target in group.targets:
            columns[f"{target}.weight"] = scales
    return Smoothing(norms, columns, rows)


def divide_norm(
    weight: torch.Tensor, scales: torch.Tensor, norm_offset: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Divide a norm's weight by the scales, as far as float16 allows.

    float16 rounds the new weight, coarsely where Gemma adds 1 to it. The layers behind the norm have
    to be multiplied by what the weight was really divided by, or the two would not cancel.

    Args:
        weight: The norm's weight, (channels,).
        scales: The wanted divisors, (channels,).
        norm_offset: What the model adds to the weight when it computes.

    Returns:
        The new weight in float16, and the divisors that it stands for in float32, both (channels,).
    """
    weight = weight.detach().to("cpu", torch.float32)
    factor = weight + norm_offset
    new_weight = (factor / scales - norm_offset).to(torch.float16)
    new_factor = new_weight.to(torch.float32) + norm_offset

    # A factor that rounds to 0 could not be undone: such a channel keeps its weight.
    is_lost = new_factor == 0
    new_weight[is_lost] = weight[is_lost].to(torch.float16)
    divisors = torch.where(is_lost, 1.0, factor / new_factor)
    return new_weight, divisors


def compute_scales(
    model: PreTrainedModel, group: Group, largest_inputs: torch.Tensor
) -> torch.Tensor:
    """Compute the scale of each channel of a group's input.

    Returns:
        The scales in float32 on the CPU, (channels,). A channel without a usable scale keeps 1.
    """
    # All targets read the same input: the largest weight of any of them counts.
    largest_weights = torch.zeros_like(largest_inputs)
    for target in group.targets:
        weight = model.get_submodule(target).weight.detach()
        column_maxima = weight.abs().amax(dim=0).to("cpu", torch.float32)
        largest_weights = torch.maximum(largest_weights, column_maxima)

    scales = largest_inputs**STRENGTH / largest_weights ** (1 - STRENGTH)
    # A channel that overflowed in float16, or was never active, has no usable scale.
    is_usable = torch.isfinite(scales) & (scales > 0)
    return torch.where(is_usable, scales, 1.0)


def measure_inputs(
    model: PreTrainedModel, groups: Sequence[Group], sequences: Iterable[Sequence[int]]
) -> dict[str, torch.Tensor]:
    """Measure the largest absolute value of each input channel over all tokens.

    Returns:
        The maxima, (channels,), by the group's source.
    """
    # All targets of a group read the same input, so it is enough to watch one of them.
    maxima_by_source = {}
    hooks = []
    for group in groups:
        maxima = InputMaxima()
        maxima_by_source[group.source] = maxima
        first_target = model.get_submodule(group.targets[0])
        hooks.append(first_target.register_forward_pre_hook(maxima.update))

    # Sequences go through the model one at a time: padding would be measured too.
    with torch.inference_mode():
        for ids in sequences:
            model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    return {source: maxima.largest for source, maxima in maxima_by_source.items()}


class InputMaxima:
    """The largest absolute value of each input channel that a layer has seen, (channels,) on the CPU."""

    def __init__(self):
        self.largest: torch.Tensor | None = None

    def update(self, module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        """Count the layer's input, (…, channels); PyTorch calls this before the layer runs."""
        maxima = inputs[0].abs().flatten(end_dim=-2).amax(dim=0).to("cpu", torch.float32)
        if self.largest is not None:
            maxima = torch.maximum(self.largest, maxima)
        self.largest = maxima
