"""A micro-batch's sequences computed in groups of like lengths; the trainer does so on a CPU.

The two responses of a pair differ in length, and so most padding stands within the pairs, where no
order of the rows removes it. A CPU multiplies matrices of a few hundred rows at full speed, so that
several small forward passes cost no more than a large one. They end in one loss and one backward
pass: the gradient is that of the whole micro-batch.
"""

import torch
from torch import nn

# A sequence joins a group that is not wider than its own length by more than an eighth of the
# group's width. Each group adds its gradients to those of all weights, so that small ones cost too.
LEAST_SHARE_OF_WIDTH = 7 / 8


def group_by_length(lengths: list[int]) -> list[list[int]]:
    """Group sequences of like lengths.

    Args:
        lengths: The tokens of each sequence.

    Returns:
        The numbers of each group's sequences, the longest first.
    """
    numbers = range(len(lengths))
    groups = []
    width = 0

    for number in sorted(numbers, key=lengths.__getitem__, reverse=True):
        if not groups or lengths[number] < LEAST_SHARE_OF_WIDTH * width:
            groups.append([])
            width = lengths[number]
        groups[-1].append(number)
    return groups


def compute_logits_by_length(
    model: nn.Module, sequences: dict[str, torch.Tensor], options: dict
) -> torch.Tensor:
    """Return a micro-batch's logits, computed in groups of like lengths.

    Args:
        model: Its forward is called once for each group.
        sequences: input_ids, attention_mask and what else has the shape (sequences, tokens).
        options: Further arguments of the model's forward.

    Returns:
        The logits in the order of the sequences.
    """
    mask_bt = sequences["attention_mask"]
    groups = group_by_length(mask_bt.sum(dim=1).tolist())

    logits_by_group = []
    for group in groups:
        # Padding may stand on either side.
        used_columns = mask_bt[group].any(dim=0)
        inputs = {name: values_bt[group][:, used_columns] for name, values_bt in sequences.items()}
        logits_by_group.append(model(**inputs, **options).logits)

    order = torch.tensor([number for group in groups for number in group])
    return torch.cat(logits_by_group)[order.argsort()]
