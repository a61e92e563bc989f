"""Rows of the dataset → one padded batch, the two orders of a pair side by side."""

import os
from dataclasses import dataclass

import torch

from preprocess.model_input import swap_probabilities


@dataclass
class PairCollator:
    """Pads on the right. `orders`: as_given, random (one of the two for each pair) or both.

    A batch holds labels (pairs, orders, verdicts), weight (pairs,), and input_ids and attention_mask of shape
    (pairs * orders, tokens), the orders of a pair adjacent. `padding` and `return_tensors` are what Axolotl
    passes, and ignored.
    """

    tokenizer: object
    verdicts: tuple[str, ...]
    orders: str
    pad_token_id: int
    pad_to_multiple_of: int = 8
    padding: bool = True
    return_tensors: str = "pt"
    coin: torch.Generator | None = None

    def _coin(self) -> torch.Generator:
        """A generator that differs between processes and between their workers: torch's own is the same on every GPU."""
        if self.coin is None:
            seed = torch.initial_seed() + 7919 * int(os.environ.get("RANK", "0"))
            self.coin = torch.Generator().manual_seed(seed % 2**63)
        return self.coin

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        sequences, labels = [], []
        for row in rows:
            both = [
                (row["as_given"], list(row["labels"])),
                (row["swapped"], swap_probabilities(row["labels"], self.verdicts)),
            ]
            if self.orders == "as_given":
                both = both[:1]
            elif self.orders == "random":
                both = [both[int(torch.rand((), generator=self._coin()) < 0.5)]]
            sequences += [ids for ids, _ in both]
            labels.append([target for _, target in both])
        longest = max(map(len, sequences))
        width = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        input_ids = torch.full((len(sequences), width), self.pad_token_id, dtype=torch.long)
        attention_mask = torch.zeros((len(sequences), width), dtype=torch.long)
        for number, ids in enumerate(sequences):
            input_ids[number, : len(ids)] = torch.tensor(ids)
            attention_mask[number, : len(ids)] = 1
        return {
            "labels": torch.tensor(labels, dtype=torch.float32),
            "weight": torch.tensor([row["weight"] for row in rows], dtype=torch.float32),
            "input_ids": input_ids,
            "attention_mask": attention_mask,
        }
