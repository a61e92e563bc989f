"""Rows of the dataset → one padded batch, the two sequences of a pair side by side."""

import math
import os
from dataclasses import dataclass

import torch

from preprocess.model_input import swap_probabilities

SEEDS_APART = 7919  # between the seeds of two processes; any prime does


@dataclass
class PairCollator:
    """Makes the batches for all three heads.

    A batch holds labels (pairs, orders, verdicts), weight (pairs,), and input_ids and
    attention_mask of shape (pairs * orders, tokens), the orders of a pair adjacent. For the reward
    head it has one order, and two rows of ids a pair, in the order of the verdicts.

    Padding stands on the right. For label_tokens, whose answer is read at the last place, it stands
    on the left, and the batch holds position_ids as well.

    Attributes:
        tokenizer: Passed by Axolotl, as are `padding` and `return_tensors`; not used.
        orders: as_given, random (one of the two for each pair) or both.
    """

    tokenizer: object
    head: str
    verdicts: tuple[str, ...]
    orders: str
    pad_token_id: int
    pad_to_multiple_of: int = 8
    padding: bool = True
    return_tensors: str = "pt"
    generator: torch.Generator | None = None

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        sequences = []
        labels_pov = []
        for row in rows:
            if self.head == "reward":
                sequences += self.reward_sequences(row)
                labels_pov.append([row["labels"]])
                continue
            row_orders = self.choose_orders(row)
            sequences += [ids for ids, _ in row_orders]
            labels_pov.append([labels_v for _, labels_v in row_orders])

        weight_p = [row["weight"] for row in rows]
        return {
            "labels": torch.tensor(labels_pov, dtype=torch.float32),
            "weight": torch.tensor(weight_p, dtype=torch.float32),
            **self.pad(sequences),
        }

    def reward_sequences(self, row: dict) -> list[list[int]]:
        """Return the sequences of both responses in the order of the verdicts."""
        response_a, response_b = row["sequences"]
        sequences = {"model_a": response_a, "model_b": response_b}
        return [sequences[verdict] for verdict in self.verdicts]

    def choose_orders(self, row: dict) -> list[tuple[list[int], list[float]]]:
        """Return the sequences of a row to train on, each with its target probabilities."""
        ids_as_given, ids_swapped = row["sequences"]
        labels_v = list(row["labels"])
        as_given = (ids_as_given, labels_v)
        swapped = (ids_swapped, swap_probabilities(labels_v, self.verdicts))

        if self.orders == "as_given":
            return [as_given]
        if self.orders == "random":
            return [swapped] if self.is_heads() else [as_given]
        return [as_given, swapped]

    def pad(self, sequences: list[list[int]]) -> dict[str, torch.Tensor]:
        """Pad sequences to a common length, a multiple of pad_to_multiple_of.

        Returns:
            input_ids and attention_mask, and for label_tokens position_ids, all of shape
            (sequences, tokens).
        """
        pads_left = self.head == "label_tokens"
        longest = max(len(ids) for ids in sequences)
        width = math.ceil(longest / self.pad_to_multiple_of) * self.pad_to_multiple_of
        input_ids_bt = torch.full((len(sequences), width), self.pad_token_id, dtype=torch.long)
        mask_bt = torch.zeros((len(sequences), width), dtype=torch.long)

        for number, ids in enumerate(sequences):
            start = width - len(ids) if pads_left else 0
            input_ids_bt[number, start : start + len(ids)] = torch.tensor(ids)
            mask_bt[number, start : start + len(ids)] = 1

        batch = {"input_ids": input_ids_bt, "attention_mask": mask_bt}
        if pads_left:
            # A sequence's positions begin at 0 behind its padding.
            batch["position_ids"] = (mask_bt.cumsum(dim=-1) - 1).clamp(min=0)
        return batch

    def is_heads(self) -> bool:
        """Toss a coin that differs between processes and their workers.

        torch's own generator has the same seed on every GPU.
        """
        if self.generator is None:
            rank = int(os.environ.get("RANK", "0"))
            seed = torch.initial_seed() + SEEDS_APART * rank
            self.generator = torch.Generator().manual_seed(seed % 2**63)
        return torch.rand((), generator=self.generator).item() < 0.5
