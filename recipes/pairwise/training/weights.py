"""A loaded model before its first step: no unwanted soft cap, and float32 where it learns."""

import torch
from torch import nn


def remove_softcap(model: nn.Module) -> None:
    """Switch off Gemma-2's soft cap of attention logits, in the configuration and in the layers."""
    if getattr(model.config, "attn_logit_softcapping", None) is None:
        return

    model.config.attn_logit_softcapping = None
    for module in model.modules():
        # Each attention layer keeps a copy of its own.
        if hasattr(module, "attn_logit_softcapping"):
            module.attn_logit_softcapping = None


def train_in_float32(model: nn.Module) -> None:
    """Hold what is trained in float32, as DeepSpeed does by itself.

    Axolotl loads in bf16, where small steps round to nothing. LoRA's matrices are float32 already;
    the head beside them and a full fine-tune are not. Autocast still computes in bf16.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
