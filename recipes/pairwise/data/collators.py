"""Rows of the dataset → one padded batch, the two sequences of a pair side by side."""

import os
import zlib
from dataclasses import dataclass

import torch

from preprocess.model_input import swap_probabilities


@dataclass
class PairCollator:
    """Batches for all three heads. `orders`: as_given, random (one of the two for each pair) or both.

    A batch holds labels (pairs, orders, verdicts), weight (pairs,), and input_ids and attention_mask of shape
    (pairs * orders, tokens), the orders of a pair adjacent. For the reward head it has one order, and two rows of ids a
    pair, in the order of the verdicts. Padding stands on the right; for label_tokens, whose answer is read at the last
    place, on the left. `padding` and `return_tensors` are what Axolotl passes, and ignored.
    """

    tokenizer: object
    head: str
    verdicts: tuple[str, ...]
    orders: str
    pad_token_id: int
    pad_to_multiple_of: int = 8
    padding: bool = True
    return_tensors: str = "pt"
    coin: torch.Generator | None = None

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        sequences, labels = [], []
        for row in rows:
            chosen = self.chosen(row)
            sequences += [ids for ids, _ in chosen]
            labels.append([row["labels"]] if self.head == "reward" else [target for _, target in chosen])
        return {
            "labels": torch.tensor(labels, dtype=torch.float32),
            "weight": torch.tensor([row["weight"] for row in rows], dtype=torch.float32),
            **self.padded(sequences, left=self.head == "label_tokens"),
        }

    def chosen(self, row: dict) -> list[tuple[list[int], list[float]]]:
        """The sequences of a row that the batch takes, each with its target probabilities."""
        first, second = row["sequences"]
        as_given = list(row["labels"])
        if self.head == "reward":
            by_verdict = {"model_a": first, "model_b": second}
            return [(by_verdict[verdict], as_given) for verdict in self.verdicts]
        both = [(first, as_given), (second, swap_probabilities(as_given, self.verdicts))]
        if self.orders == "as_given":
            return both[:1]
        if self.orders == "random":
            return [both[int(torch.rand((), generator=self._coin()) < 0.5)]]
        return both

    def padded(self, sequences: list[list[int]], left: bool) -> dict[str, torch.Tensor]:
        """input_ids and attention_mask, both (sequences, tokens)."""
        longest = max(map(len, sequences))
        width = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        input_ids = torch.full((len(sequences), width), self.pad_token_id, dtype=torch.long)
        attention_mask = torch.zeros((len(sequences), width), dtype=torch.long)
        for number, ids in enumerate(sequences):
            place = slice(width - len(ids), width) if left else slice(len(ids))
            input_ids[number, place] = torch.tensor(ids)
            attention_mask[number, place] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def _coin(self) -> torch.Generator:
        """A generator that differs between processes and between their workers: torch's own is the same on every GPU."""
        if self.coin is None:
            seed = torch.initial_seed() + 7919 * int(os.environ.get("RANK", "0"))
            self.coin = torch.Generator().manual_seed(seed % 2**63)
        return self.coin


@dataclass
class LabelTokenCollator(PairCollator):
    """Batches for a stock causal trainer: each sequence followed by its answer's token, every other label -100."""

    label_token_ids: tuple[int, ...] = ()

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        sequences = []
        for row in rows:
            answers = likeliest({**row, "labels": list(row["labels"])}, self.verdicts)
            targets = [answers[0], swap_probabilities(answers[1], self.verdicts)]
            both = [
                [*ids, self.label_token_ids[target.index(1)]] for ids, target in zip(row["sequences"], targets, strict=True)
            ]
            taken = self.chosen({**row, "sequences": both})
            sequences += [ids for ids, _ in taken]
        batch = self.padded(sequences, left=False)
        labels = torch.full_like(batch["input_ids"], -100)
        for number, ids in enumerate(sequences):
            labels[number, len(ids) - 1] = ids[-1]
        return {**batch, "labels": labels}


def likeliest(row: dict, verdicts: tuple[str, ...]) -> tuple[list[int], list[int]]:
    """The one-hot verdict to answer with in each order, both told of the pair as given.

    Where two verdicts are equally likely, each is the answer in one of the orders, which one by a hash of the id: over both
    orders the answers are as likely as the votes, and over the rows no place is favoured.
    """
    best = [number for number, share in enumerate(row["labels"]) if share == max(row["labels"])]
    pick = (best[0], best[-1]) if zlib.crc32(row["id"].encode()) % 2 else (best[-1], best[0])
    one_hot = [[int(number == place) for number in range(len(verdicts))] for place in pick]
    return one_hot[0], one_hot[1]
