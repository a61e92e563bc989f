"""Rows of the dataset → one padded batch, the two sequences of a pair side by side."""

import math
import os
from dataclasses import dataclass

import torch

from preprocess.model_input import swap_probabilities

PADDED_TO_MULTIPLE_OF = 8  # tokens, which suits tensor cores
SEEDS_APART = 7919  # between the seeds of two processes; any prime does


@dataclass
class PairCollator:
    """Makes the batches for all three heads.

    A batch holds labels (pairs, orders, verdicts), weight (pairs,), and input_ids and
    attention_mask of shape (pairs * orders, tokens), the orders of a pair adjacent. For the reward
    head it has one order, and two rows of ids a pair, in the order of the verdicts. Where rows have
    teachers, it also holds teacher, the teachers' probabilities in the shape of labels.

    Padding stands on the right. For label_tokens, whose answer is read at the last place, it stands
    on the left, and the batch holds position_ids as well. A padding-free batch has one row, see `join`.

    Attributes:
        tokenizer: Passed by Axolotl, as are `padding` and `return_tensors`; not used.
        orders: as_given, random (one of the two for each pair) or both.
        padding_free: Whether the sequences stand end to end in one row.
    """

    tokenizer: object
    head: str
    verdicts: tuple[str, ...]
    orders: str
    pad_token_id: int
    pad_to_multiple_of: int = PADDED_TO_MULTIPLE_OF
    padding_free: bool = False
    padding: bool = True
    return_tensors: str = "pt"
    generator: torch.Generator | None = None

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        sequences = []
        labels_pov = []
        teacher_pov = []
        for row in rows:
            swaps = self.choose_orders()
            sequences += self.choose_sequences(row, swaps)
            labels_pov.append([self.order_verdicts(row["labels"], swap) for swap in swaps])
            if row.get("teacher"):
                teacher_pov.append([self.order_verdicts(row["teacher"], swap) for swap in swaps])

        weight_p = [row["weight"] for row in rows]
        batch = {
            "labels": torch.tensor(labels_pov, dtype=torch.float32),
            "weight": torch.tensor(weight_p, dtype=torch.float32),
            **(self.join(sequences) if self.padding_free else self.pad(sequences)),
        }
        if teacher_pov:
            batch["teacher"] = torch.tensor(teacher_pov, dtype=torch.float32)
        return batch

    def choose_orders(self) -> list[bool]:
        """Choose the orders of a row to train on: for each, whether it is swapped."""
        if self.head == "reward" or self.orders == "as_given":
            return [False]
        if self.orders == "random":
            return [self.is_heads()]
        return [False, True]

    def choose_sequences(self, row: dict, swaps: list[bool]) -> list[list[int]]:
        """Return a row's sequences of token ids in these orders.

        For the reward head they are those of both responses, in the order of the verdicts.
        """
        first, second = row["sequences"]
        if self.head == "reward":
            response_by_verdict = {"model_a": first, "model_b": second}
            return [response_by_verdict[verdict] for verdict in self.verdicts]
        return [second if is_swapped else first for is_swapped in swaps]

    def order_verdicts(self, probabilities: list[float], is_swapped: bool) -> list[float]:
        """Return a row's probabilities as they are in an order: swapped, A's is that of B."""
        if is_swapped:
            return swap_probabilities(list(probabilities), self.verdicts)
        return list(probabilities)

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

    def join(self, sequences: list[list[int]]) -> dict[str, object]:
        """Join sequences end to end, without padding; see training/padding_free.py.

        Returns:
            input_ids and position_ids of shape (1, tokens); the sequences' bounds and the length of the longest,
            by the names under which flash-attention reads them; for label_tokens logits_to_keep, the last places.
        """
        lengths = torch.tensor([len(ids) for ids in sequences])
        bounds = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).int()])
        longest = int(lengths.max())
        batch = {
            "input_ids": torch.tensor([sum(sequences, [])]),
            "position_ids": torch.cat([torch.arange(length) for length in lengths.tolist()])[None],
            "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": bounds,
            "max_length_q": longest,
            "max_length_k": longest,
        }
        if self.head == "label_tokens":
            batch["logits_to_keep"] = bounds[1:].long() - 1
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
