"""Additions to the loss that winners tried, each off by default: focal loss and R-Drop.

The trainer calls these; the plugin calls require_dropout.
"""

import torch
from torch import nn

from preprocess.core.errors import UserError

# A power below 1 has an infinite gradient at 0, which float32 reaches where the model is sure.
LEAST_DOUBT = 1e-6


def focal_factors(log_probabilities: torch.Tensor, gamma: float) -> torch.Tensor:
    """Return the factors of focal loss: (1 - p) ** gamma, from Lin et al. 2017.

    They shrink the cross-entropy of verdicts that the model is sure of, so that training attends to
    the others.
    """
    probabilities = log_probabilities.exp()
    doubt = 1 - probabilities
    return doubt.clamp(min=LEAST_DOUBT) ** gamma


def repeat_batch(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a batch that holds every pair twice, first all of them, then all of them again.

    Dropout differs between the two. One forward pass of both, and not two, is what DDP and ZeRO
    expect before a backward pass.
    """
    return {name: torch.cat([values, values]) for name, values in batch.items()}


def r_drop_penalty(logits: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return how much the two copies of repeat_batch's pairs disagree, from Liang et al. 2021.

    It is the mean of the Kullback-Leibler divergences in both directions.

    Args:
        logits: Of shape (2 * pairs, orders, verdicts).
        weight: Of shape (2 * pairs,), see soft_cross_entropy.
    """
    # Each half of the batch holds one copy of every pair.
    first_pov, second_pov = torch.log_softmax(logits.float(), dim=-1).chunk(2)
    first_to_second_po = (first_pov.exp() * (first_pov - second_pov)).sum(dim=-1)
    second_to_first_po = (second_pov.exp() * (second_pov - first_pov)).sum(dim=-1)
    divergences_po = (first_to_second_po + second_to_first_po) / 2

    weight_p = weight.chunk(2)[0]
    return (divergences_po.mean(dim=1) * weight_p).mean()


def require_dropout(model: nn.Module) -> None:
    """Raise UserError where a model has no dropout: R-Drop's two copies of a pair would be the same."""
    if not any(has_dropout(module) for module in model.modules()):
        raise UserError(
            "pairwise.r_drop: the model has no dropout, and R-Drop compares passes that differ by it; "
            "set lora_dropout, or attention_dropout in model_config, or remove r_drop"
        )


def has_dropout(module: nn.Module) -> bool:
    """Return whether a module itself drops activations at random."""
    if isinstance(module, nn.Dropout):
        return module.p > 0
    # A decoder's attention layer holds its rate of dropout as a number.
    rate = getattr(module, "attention_dropout", None)
    return isinstance(rate, float) and rate > 0
