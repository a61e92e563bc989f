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

MOST_SPREAD = (
    0.1  # of a head that was initialised; memory that was not holds zeros, NaN or huge numbers
)


def start_head(model: nn.Module, start: HeadStart, outputs: int) -> None:
    """Give a classifier the head that the run starts with, and log which one it is.

    Args:
        model: The classifier as it was loaded, with as many outputs as the base model's head has.
        start: Whether the base model's head is kept.
        outputs: How many outputs the run's head has.

    Raises:
        UserError: The head that is to be kept holds no finite numbers, or only zeros.
    """
    name = find_head_name(model)
    if start.reason_for_new is None:
        check_kept_head(model.get_submodule(name), name)
        LOG.info("head %s: goes on from the base model's", name)
        return

    LOG.info("head %s: new, for %s", name, start.reason_for_new)
    if start.checkpoint_outputs is not None:
        replace_output_layer(model, outputs)
    ensure_head(model)


def check_kept_head(head: nn.Module, name: str) -> None:
    """Raise UserError where a trained head is not one: its numbers are not finite, or all the same."""
    with zero3.gathered(head.parameters()):
        for parameter_name, weight in head.named_parameters():
            if weight.dim() != 2:
                continue
            spread = weight.detach().float().std().item()
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
    with zero3.gathered(head.parameters()):
        for parameter_name, weight in head.named_parameters():
            if weight.dim() != 2:
                continue
            spread = weight.detach().float().std().item()
            is_sane = np.isfinite(spread) and 0 < spread < MOST_SPREAD
            if not is_sane:
                LOG.warning(
                    "head %s.%s has standard deviation %s: initialised anew",
                    name,
                    parameter_name,
                    spread,
                )
                nn.init.normal_(weight.data, std=HEAD_SPREAD)


def name_labels(config, names: Sequence[str]) -> None:
    """Write the head's outputs into the model's configuration, by name."""
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}
    config.problem_type = None


def compute_logits_in_float32(model: nn.Module, label_token_ids: Sequence[int] = ()) -> None:
    """Have the head compute float32 logits, whatever its weights' dtype and autocast's.

    In bf16 two neighbouring numbers between 16 and 32 are 0.125 apart: too coarse for a loss.

    Args:
        model: The model with its adapter, if it has one. Its head's forward is replaced.
        label_token_ids: For the head label_tokens: the tokens whose logits lm_head computes. It
            computes no others, so that its output has the shape (..., verdicts).

    Raises:
        RuntimeError: If the model has no head that is a plain linear layer.
    """
    head_names = (LABEL_TOKEN_HEAD,) if label_token_ids else CLASSIFIER_HEADS
    is_replaced = False

    for name, layer in model.named_modules():
        parts = name.split(".")
        is_in_head = any(head_name in parts for head_name in head_names)
        if not is_in_head or type(layer) is not nn.Linear:
            continue

        # LoRA adds B(A(x)) to the head's output: of the two only B has a row for each output, and
        # of B and the head itself the same rows are computed.
        output_rows = None
        if label_token_ids and "lora_A" not in parts:
            output_rows = list(label_token_ids)
        layer.forward = functools.partial(linear_in_float32, layer, output_rows)
        is_replaced = True

    if not is_replaced:
        raise RuntimeError(
            f"{type(model).__name__}: no linear layer named {' or '.join(head_names)}"
        )


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
