"""A loaded model before its first step: a head with sane weights and names, no unwanted soft cap, float32 where it learns."""

import logging

import numpy as np
import torch

from preprocess.core.errors import UserError
from recipes.pairwise.training import zero3

LOG = logging.getLogger(__name__)
HEADS = ("score", "classifier")
HEAD_SPREAD = 0.02  # the standard deviation of fresh weights, as usual
MOST_SPREAD = 0.1  # of a head that was initialised; memory that was not holds zeros, NaN or huge numbers


def ensure_head(model) -> None:
    """Give the head fresh weights where loading left it uninitialised, which happens under ZeRO-3 and in bf16."""
    names = [name for name in HEADS if hasattr(model, name)]
    if not names:
        raise UserError(f"{type(model).__name__}: no head named {' or '.join(HEADS)}")

    head = getattr(model, names[0])
    with zero3.gathered(head.parameters()):
        for parameter_name, weight in head.named_parameters():
            if weight.dim() != 2:
                continue
            spread = weight.detach().float().std().item()
            is_sane = np.isfinite(spread) and 0 < spread < MOST_SPREAD
            if not is_sane:
                LOG.warning("head %s.%s has standard deviation %s: initialised anew", names[0], parameter_name, spread)
                torch.nn.init.normal_(weight.data, std=HEAD_SPREAD)


def name_labels(config, names) -> None:
    """Write the head's outputs into the model's configuration, by name."""
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}
    config.problem_type = None


def remove_softcap(model) -> None:
    """Switch off Gemma-2's soft cap of attention logits, in the configuration and in the layers that copied it."""
    if getattr(model.config, "attn_logit_softcapping", None) is None:
        return
    model.config.attn_logit_softcapping = None
    for module in model.modules():
        if hasattr(module, "attn_logit_softcapping"):
            module.attn_logit_softcapping = None


def train_in_float32(model) -> None:
    """Hold what is trained in float32, as DeepSpeed does by itself: Axolotl loads in bf16, where small steps round to nothing.

    LoRA's matrices are float32 already; the head beside them and a full fine-tune are not. Autocast computes in bf16 still.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
