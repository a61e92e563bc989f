"""A loaded model's head: the weights that it starts with, named outputs, logits in float32.

The plugin calls these after Axolotl has loaded the model and put the adapter on it.
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from preprocess.core.errors import UserError
from recipes.pairwise.config.earlier_runs import HeadStart
from recipes.pairwise.processes import LOG
from recipes.pairwise.training import zero3
from recipes.pairwise.training.output_layer import (
    CLASSIFIER_HEADS,
    HEAD_SPREAD,
    find_head_name,
    replace_output_layer,
)

LABEL_TOKEN_HEAD = "lm_head"

# A fresh head's standard deviation is below this; memory that was never initialised holds zeros,
# NaN or huge numbers.
MOST_SPREAD = 0.1


def start_head(model: nn.Module, start: HeadStart, outputs: int) -> None:
    """Give a classifier the head that the run starts with, and log which one it is.

    The classifier was loaded with the base model's head, if that has one. `outputs` is how many the run's head has.

    Raises:
        UserError: The head that is to be kept holds no finite numbers, or only zeros.
    """
    name = find_head_name(model)
    keeps_head = start.reason_for_new is None
    if keeps_head:
        check_kept_head(model.get_submodule(name), name)
        LOG.info("head %s: goes on from the base model's", name)
        return

    LOG.info("head %s: new, because %s", name, start.reason_for_new)
    base_model_has_head = start.checkpoint_outputs is not None
    if base_model_has_head:
        replace_output_layer(model, outputs)
    ensure_head(model)


def check_kept_head(head: nn.Module, name: str) -> None:
    """Raise UserError where a head to go on from was not trained: its weights are not finite, or all the same."""
    # Under ZeRO-3 a process holds only a part of each weight until they are gathered.
    with zero3.gathered(head.parameters()):
        for parameter_name, weight in list_matrices(head):
            spread = measure_spread(weight)
            is_trained = np.isfinite(spread) and spread > 0
            if not is_trained:
                raise UserError(
                    f"base_model: the head {name}.{parameter_name} has the standard deviation {spread}, so it holds "
                    "nothing to go on from; fetch the model again, or start from a model without a head"
                )


def ensure_head(model: nn.Module) -> None:
    """Give the head fresh weights where loading left it uninitialised, as under ZeRO-3 and in bf16."""
    name = find_head_name(model)
    head = getattr(model, name)
    # Under ZeRO-3 a process holds only a part of each weight until they are gathered.
    with zero3.gathered(head.parameters()):
        for parameter_name, weight in list_matrices(head):
            spread = measure_spread(weight)
            is_initialised = np.isfinite(spread) and 0 < spread < MOST_SPREAD
            if not is_initialised:
                full_name = f"{name}.{parameter_name}"
                LOG.warning(
                    "head %s has standard deviation %s: initialised anew", full_name, spread
                )
                nn.init.normal_(weight.data, std=HEAD_SPREAD)


def list_matrices(head: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """List a head's weight matrices by name, without its biases and norms."""
    return [(name, weight) for name, weight in head.named_parameters() if weight.dim() == 2]


def measure_spread(weight: nn.Parameter) -> float:
    """Return the standard deviation of a weight, computed in float32."""
    return weight.detach().float().std().item()


def name_labels(config, names: Sequence[str]) -> None:
    """Write the head's outputs into the model's configuration, by name."""
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}
    config.problem_type = None


def replace_head_forward(model: nn.Module, label_token_ids: Sequence[int] = ()) -> None:
    """Replace the head's forward by one that computes float32 logits, whatever its weights' dtype and autocast's.

    In bf16 two neighbouring numbers between 16 and 32 are 0.125 apart: too coarse for a loss.

    Args:
        model: The model with its adapter, if it has one. Its head's forward is replaced.
        label_token_ids: For the head label_tokens, the tokens that stand for the verdicts. lm_head
            then computes their logits only, of shape (..., verdicts). Empty for the other heads.

    Raises:
        RuntimeError: If the model has no head that is a plain linear layer.
    """
    head_names = (LABEL_TOKEN_HEAD,) if label_token_ids else CLASSIFIER_HEADS
    layers = find_linear_layers(model, head_names)
    if not layers:
        raise RuntimeError(
            f"{type(model).__name__}: no linear layer named {' or '.join(head_names)}"
        )

    for name, layer in layers.items():
        # lm_head has an output for each token, of which those of the label tokens are enough. So has
        # the lora_B of an adapter on it. The outputs of its lora_A are no tokens: all are needed.
        output_rows = None
        is_lora_a = "lora_A" in name.split(".")
        if label_token_ids and not is_lora_a:
            output_rows = list(label_token_ids)
        layer.forward = functools.partial(linear_in_float32, layer, output_rows)


def find_linear_layers(model: nn.Module, head_names: Sequence[str]) -> dict[str, nn.Linear]:
    """Find the plain linear layers of a head and of its adapter, by their names in the model."""
    layers = {}
    for name, layer in model.named_modules():
        is_in_head = not set(head_names).isdisjoint(name.split("."))
        # Quantised layers are subclasses with a forward of their own, and stay as they are.
        if is_in_head and type(layer) is nn.Linear:
            layers[name] = layer
    return layers


def linear_in_float32(
    layer: nn.Linear, output_rows: list[int] | None, inputs: torch.Tensor
) -> torch.Tensor:
    """Apply a linear layer, or some of its output rows, in float32 and outside of autocast.

    Args:
        layer: The layer whose weights are read.
        output_rows: The outputs to compute; None for all.
        inputs: Of shape (..., inputs of the layer).

    Returns:
        float32 of shape (..., outputs computed).
    """
    weight = layer.weight
    bias = layer.bias
    if output_rows is not None:
        weight = weight[output_rows]
        bias = bias[output_rows] if bias is not None else None

    with torch.autocast(inputs.device.type, enabled=False):
        bias = bias.float() if bias is not None else None
        # Of a model whose layers are over several GPUs, the head need not be where they end.
        inputs = inputs.to(weight.device, torch.float32)
        return nn.functional.linear(inputs, weight.float(), bias)
