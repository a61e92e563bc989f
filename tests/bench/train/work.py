"""What all contenders of the training bench have in common: rows, model, settings, and how a run is measured.

The loss is Bradley and Terry's, which TRL's RewardTrainer has too: the negative log likelihood that
the chosen response gets the larger reward. So only pairs with a winner are read, and each counts 1.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch
from datasets import Dataset, load_from_disk
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
    set_seed,
)

from preprocess.core.errors import UserError
from preprocess.core.files import read_yaml
from recipes.pairwise.config.schema import PairwiseBlock
from recipes.pairwise.contract import new_contract
from recipes.pairwise.data.datasets import encode_rows, read_pairs
from tests import tiny
from tests.bench.kernel import forward_operations

RECIPE = tiny.ROOT / "recipes" / "minilm_reward.yml"
SEED = 42
HELD_OUT_FOLD = 0
QUARTERS = 4

# A model's operations: forward once, and for the gradients of inputs and weights once more each.
TRAINING_OVER_FORWARD = 3


@dataclass(frozen=True)
class Measured:
    """One training run of one contender.

    Attributes:
        pairs: How many pairs it trained on.
        seconds: From the first step to the last, without loading and without evaluation.
        cpu_seconds: Of all threads in that time; other work on the machine adds less to it.
        padding: The tokens that were computed, over the tokens of the rows.
        operations: Floating-point operations that the rows' own tokens need.
        losses: The training loss's mean in each quarter of the run.
        held_out_before: The mean loss on the held-out rows before the first step.
        held_out_after: The same after the last step.
    """

    pairs: int
    seconds: float
    cpu_seconds: float
    padding: float
    operations: float
    losses: tuple[float, ...]
    held_out_before: float
    held_out_after: float


def draw_rows(pairs: Path, trained: int, held_out: int) -> pl.DataFrame:
    """Draw pairs that have a winner; the first fold is held out, the next one is trained on.

    Args:
        pairs: A pairs.parquet.
        trained: How many pairs to train on.
        held_out: How many pairs to measure the loss on.

    Raises:
        UserError: The file holds fewer.
    """
    rows = read_pairs(pairs).filter(role="train").filter(pl.col("winner") != "tie")
    if len(rows) < trained + held_out:
        raise UserError(
            f"{pairs}: {len(rows):,} pairs have a winner, {trained + held_out:,} are needed; "
            "give a larger file, or lower --trained or --held-out"
        )

    drawn = rows.sample(trained + held_out, seed=SEED, shuffle=True)
    is_held_out = pl.int_range(pl.len()) < held_out
    fold = pl.when(is_held_out).then(HELD_OUT_FOLD).otherwise(HELD_OUT_FOLD + 1)
    is_a = pl.col("winner") == "model_a"
    return drawn.with_columns(
        fold=fold.cast(pl.Int8),
        weight=pl.lit(1.0, dtype=pl.Float32),
        p_model_a=is_a.cast(pl.Float32),
        p_model_b=(~is_a).cast(pl.Float32),
        p_tie=pl.lit(0.0, dtype=pl.Float32),
    )


def prepare(folder: Path, rows: pl.DataFrame, base: Path, budget_tokens: int) -> None:
    """Write what every run reads into a folder: base/, pairs.parquet, train/ and held_out/.

    All start from the same weights, the head's included, and without dropout: TRL turns it off.

    Args:
        folder: Does not exist yet.
        rows: As draw_rows gives them.
        base: The folder of a model without a head.
        budget_tokens: Of a sequence.
    """
    folder.mkdir(parents=True)
    rows.write_parquet(folder / "pairs.parquet")

    set_seed(SEED)
    config = AutoConfig.from_pretrained(base, num_labels=1)
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    model = AutoModelForSequenceClassification.from_pretrained(
        base, config=config, dtype=torch.float32
    )
    model.save_pretrained(folder / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(folder / "base")

    values = read_yaml(RECIPE)["pairwise"] | {"budget_tokens": budget_tokens}
    contract = new_contract(
        PairwiseBlock.model_validate(values),
        tokenizer,
        attention="sdpa",
        base_model=str(base),
        revision=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    is_held_out = pl.col("fold") == HELD_OUT_FOLD
    for name, part in (("held_out", rows.filter(is_held_out)), ("train", rows.filter(~is_held_out))):
        sequences = encode_rows(part, tokenizer, contract)
        choose(part, sequences).save_to_disk(folder / name)


def choose(rows: pl.DataFrame, sequences: list[list[list[int]]]) -> Dataset:
    """Return a dataset as TRL reads it: the ids of the chosen and of the rejected response."""
    chosen = []
    rejected = []
    for winner, (ids_a, ids_b) in zip(rows["winner"], sequences, strict=True):
        a_won = winner == "model_a"
        chosen.append(ids_a if a_won else ids_b)
        rejected.append(ids_b if a_won else ids_a)

    lengths = [max(len(ids_a), len(ids_b)) for ids_a, ids_b in sequences]
    columns = {"chosen_ids": chosen, "rejected_ids": rejected, "length": lengths}
    return Dataset.from_dict(columns)


class Measurement(TrainerCallback):
    """Measures the run of any trainer of transformers' kind.

    Attributes:
        folder: The one that prepare wrote.
        measured: The figures, when the training has ended.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.computed_tokens = 0
        self.measured: Measured | None = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Evaluate, then count tokens and time from here on."""
        self.held_out_before = measure_loss(model, load_from_disk(self.folder / "held_out"))
        self.hook = model.register_forward_pre_hook(self.count_tokens, with_kwargs=True)
        self.started = time.perf_counter()
        self.cpu_started = time.process_time()

    def count_tokens(self, model, arguments, keywords):
        """Count what a forward computes, padding included."""
        self.computed_tokens += keywords["input_ids"].numel()

    def on_train_end(self, args, state, control, model=None, **kwargs):
        """Stop the clocks, then evaluate again."""
        seconds = time.perf_counter() - self.started
        cpu_seconds = time.process_time() - self.cpu_started
        self.hook.remove()

        rows = load_from_disk(self.folder / "train")
        lengths = []
        for name in ("chosen_ids", "rejected_ids"):
            lengths += [len(ids) for ids in rows[name]]
        losses = [line["loss"] for line in state.log_history if "loss" in line]
        quarters = np.array_split(losses, QUARTERS)

        self.measured = Measured(
            pairs=len(rows),
            seconds=seconds,
            cpu_seconds=cpu_seconds,
            padding=self.computed_tokens / sum(lengths),
            operations=TRAINING_OVER_FORWARD * forward_operations(model, lengths),
            losses=tuple(float(np.mean(quarter)) for quarter in quarters),
            held_out_before=self.held_out_before,
            held_out_after=measure_loss(model, load_from_disk(self.folder / "held_out")),
        )


@torch.no_grad()
def measure_loss(model: nn.Module, rows: Dataset) -> float:
    """Return the mean loss of a reward model on rows as `choose` makes them."""
    was_training = model.training
    model.eval()
    losses = []
    for row in rows:
        rewards = []
        for name in ("chosen_ids", "rejected_ids"):
            ids_bt = torch.tensor([row[name]], device=model.device)
            mask_bt = torch.ones_like(ids_bt)
            rewards.append(model(input_ids=ids_bt, attention_mask=mask_bt).logits.squeeze())
        losses.append(-nn.functional.logsigmoid(rewards[0] - rewards[1]).item())
    model.train(was_training)
    return float(np.mean(losses))
