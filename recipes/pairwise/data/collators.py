"""Rows of the dataset → one padded batch, the two sequences of a pair side by side."""

import math
import random
from dataclasses import dataclass

import torch

from preprocess.model_input import swap_probabilities

PADDED_TO_MULTIPLE_OF = 8  # tokens, which suits tensor cores


@dataclass
class PairCollator:
    """Makes the batches for all three heads.

    A batch holds labels (pairs, orders, verdicts), weight (pairs,), and input_ids and
    attention_mask of shape (pairs * orders, tokens), the orders of a pair adjacent. For the reward
    head it has one order, and two rows of ids a pair, in the order of the verdicts. Where rows have
    teachers, it also holds teacher, the teachers' probabilities in the shape of labels.

    Padding stands on the right. For label_tokens, whose answer is read at the last place, it stands
    on the left, and the batch holds position_ids as well. A padding-free batch has one row, see `join`.
    """

    tokenizer: object  # passed by Axolotl, as are padding and return_tensors; not used
    head: str
    verdicts: tuple[str, ...]
    orders: str  # as_given, random (one of the two for each pair) or both
    pad_token_id: int
    pad_to_multiple_of: int = PADDED_TO_MULTIPLE_OF
    padding_free: bool = False
    padding: bool = True
    return_tensors: str = "pt"
    seed: int = 0  # the run's, which decides the random orders
    epoch: int = 0  # with which they change; set by BeginEpoch

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """Make a batch of rows of the dataset, whose columns are datasets.FEATURES."""
        sequences = []
        labels_rov = []
        teacher_rov = []
        weight_r = []
        for row in rows:
            # The orders decide both: where A and B are swapped in the text, they are in the labels.
            swaps = self.choose_orders(row["id"])
            sequences += self.choose_sequences(row, swaps)
            labels_rov.append(self.order_verdicts(row["labels"], swaps))
            weight_r.append(row["weight"])
            if row.get("teacher"):
                teacher_rov.append(self.order_verdicts(row["teacher"], swaps))

        # The labels come first: Trainer takes the number of pairs from a batch's first value.
        batch = {
            "labels": torch.tensor(labels_rov, dtype=torch.float32),
            "weight": torch.tensor(weight_r, dtype=torch.float32),
        }
        if self.padding_free:
            batch |= self.join(sequences)
        else:
            batch |= self.pad(sequences)
        if teacher_rov:
            batch["teacher"] = torch.tensor(teacher_rov, dtype=torch.float32)
        return batch

    def choose_orders(self, row_id: str) -> list[bool]:
        """Choose the orders of a pair to train on: for each, whether A and B are swapped.

        A random order follows from the seed, the epoch and the pair alone. So a run that is resumed
        draws the orders that it would have drawn without the interruption, on any number of GPUs.
        """
        if self.head == "reward" or self.orders == "as_given":
            return [False]
        if self.orders == "random":
            coin = random.Random(f"{self.seed} {self.epoch} {row_id}")
            is_swapped = coin.random() < 0.5
            return [is_swapped]
        return [False, True]

    def choose_sequences(self, row: dict, swaps: list[bool]) -> list[list[int]]:
        """Return a pair's sequences of token ids: one for each of these orders.

        The reward head reads each response alone, in no order. For it they are the sequences of both
        responses, that of the first verdict first.
        """
        if self.head == "reward":
            sequence_a, sequence_b = row["sequences"]
            # The verdicts may be listed as model_b, model_a.
            if self.verdicts[0] == "model_b":
                return [sequence_b, sequence_a]
            return [sequence_a, sequence_b]

        as_given, swapped = row["sequences"]
        return [swapped if is_swapped else as_given for is_swapped in swaps]

    def order_verdicts(self, probabilities: list[float], swaps: list[bool]) -> list[list[float]]:
        """Return a pair's probabilities in each of these orders: a swap exchanges those of A and B."""
        probabilities_ov = []
        for is_swapped in swaps:
            if is_swapped:
                probabilities_ov.append(swap_probabilities(list(probabilities), self.verdicts))
            else:
                probabilities_ov.append(list(probabilities))
        return probabilities_ov

    def pad(self, sequences: list[list[int]]) -> dict[str, torch.Tensor]:
        """Pad sequences to a common length, a multiple of pad_to_multiple_of.

        Returns:
            input_ids and attention_mask, and for label_tokens position_ids, all of shape
            (sequences, tokens).
        """
        longest = max(len(ids) for ids in sequences)
        width = math.ceil(longest / self.pad_to_multiple_of) * self.pad_to_multiple_of
        batch_shape = (len(sequences), width)
        input_ids_bt = torch.full(batch_shape, self.pad_token_id, dtype=torch.long)
        mask_bt = torch.zeros(batch_shape, dtype=torch.long)

        # The head label_tokens reads the answer at the last place, which must not be padding.
        pads_left = self.head == "label_tokens"
        for row, ids in enumerate(sequences):
            start = width - len(ids) if pads_left else 0
            end = start + len(ids)
            input_ids_bt[row, start:end] = torch.tensor(ids)
            mask_bt[row, start:end] = 1

        batch = {"input_ids": input_ids_bt, "attention_mask": mask_bt}
        if pads_left:
            # A sequence's positions begin at 0 behind its padding.
            batch["position_ids"] = (mask_bt.cumsum(dim=-1) - 1).clamp(min=0)
        return batch

    def join(self, sequences: list[list[int]]) -> dict[str, object]:
        """Join sequences end to end, without padding; see training/padding_free.py.

        Sequences of 3 and 2 tokens become 5 tokens at the positions 0 1 2 0 1, with the bounds 0 3 5.
        Their last places are 2 and 4.

        Returns:
            input_ids and position_ids of shape (1, tokens); the sequences' bounds and the length of the longest,
            by the names under which flash-attention reads them; for label_tokens logits_to_keep, the last places.
        """
        token_ids: list[int] = []
        positions: list[int] = []
        ends = [0]
        for ids in sequences:
            token_ids += ids
            # Each sequence begins at position 0 again.
            positions += range(len(ids))
            ends.append(len(token_ids))

        bounds = torch.tensor(ends, dtype=torch.int32)
        longest = max(len(ids) for ids in sequences)
        batch = {
            "input_ids": torch.tensor([token_ids]),
            "position_ids": torch.tensor([positions]),
            "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": bounds,
            "max_length_q": longest,
            "max_length_k": longest,
        }
        # The head label_tokens reads the answer at the last place of each sequence.
        if self.head == "label_tokens":
            batch["logits_to_keep"] = bounds[1:].long() - 1
        return batch
