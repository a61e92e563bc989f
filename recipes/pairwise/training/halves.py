"""One forward pass in two halves: the longer sequences of a micro-batch, and the shorter ones.

The two responses of a pair differ in length. A reward model reads them in one micro-batch, in which
the shorter one would be padded to the longest of all. The plugin calls split_forward.
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from recipes.pairwise.data.collators import PADDED_TO_MULTIPLE_OF


def split_forward(model: nn.Module) -> None:
    """Have a classifier compute each batch in two halves, see forward_in_halves.

    The model does so within its own forward pass: DDP and ZeRO-2 expect one before a backward pass.
    """
    model.forward = functools.partial(forward_in_halves, model.forward)


def forward_in_halves(
    forward: Callable, input_ids: torch.Tensor, attention_mask: torch.Tensor, **options
) -> SequenceClassifierOutput:
    """Compute the logits of the longer and of the shorter sequences, each half without needless padding.

    Args:
        forward: The classifier's forward.
        input_ids: Of shape (sequences, tokens), padded on the right.
        attention_mask: Of the same shape.
        options: Further arguments of the forward.

    Returns:
        An output with logits of shape (sequences, outputs), in the order of the batch.
    """
    lengths_b = attention_mask.sum(dim=1)
    longest_first = lengths_b.argsort(descending=True)

    logits_by_half = []
    for rows in longest_first.chunk(2):
        longest = int(lengths_b[rows].max())
        width = math.ceil(longest / PADDED_TO_MULTIPLE_OF) * PADDED_TO_MULTIPLE_OF
        half_ids = input_ids[rows, :width]
        half_mask = attention_mask[rows, :width]
        output = forward(input_ids=half_ids, attention_mask=half_mask, **options)
        logits_by_half.append(output.logits)

    # Back from the order of lengths to that of the batch.
    place_in_batch = longest_first.argsort()
    logits = torch.cat(logits_by_half)[place_in_batch]
    return SequenceClassifierOutput(logits=logits)
