"""The last layer of a classification head, which has an output for each verdict, or one for a reward.

Training calls this for a head that begins anew, packaging for a base model whose own head has other outputs.
"""

import torch
from torch import nn

from preprocess.core.errors import UserError

CLASSIFIER_HEADS = ("score", "classifier")
HEAD_SPREAD = 0.02  # the standard deviation of fresh weights, as usual


def find_head_name(model: nn.Module) -> str:
    """Find the name of a model's classification head."""
    for name in CLASSIFIER_HEADS:
        if hasattr(model, name):
            return name
    raise UserError(f"{type(model).__name__}: no head named {' or '.join(CLASSIFIER_HEADS)}")


def replace_output_layer(model: nn.Module, outputs: int) -> None:
    """Give a classifier a fresh last layer, before any adapter is put on it."""
    head_name = find_head_name(model)

    # A head may be several layers, as RoBERTa's is; the verdicts come out of its last one.
    layer_name = head_name
    for name, module in model.get_submodule(head_name).named_modules(prefix=head_name):
        if isinstance(module, nn.Linear):
            layer_name = name

    old_layer = model.get_submodule(layer_name)
    new_layer = nn.Linear(
        old_layer.in_features,
        outputs,
        bias=old_layer.bias is not None,
        device=old_layer.weight.device,
        dtype=old_layer.weight.dtype,
    )
    # As transformers initialises the layers of a new model.
    with torch.no_grad():
        new_layer.weight.normal_(std=HEAD_SPREAD)
        if new_layer.bias is not None:
            new_layer.bias.zero_()

    model.set_submodule(layer_name, new_layer)
    model.num_labels = outputs
    model.config.num_labels = outputs
