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
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, BatchEncoding, TrainerCallback, set_seed

from preprocess.core.errors import UserError
from recipes.pairwise.config.schema import PairwiseBlock
from recipes.pairwise.contract import new_contract
from recipes.pairwise.data.collators import PairCollator
from recipes.pairwise.data.datasets import encode_rows, read_pairs
from tests.bench.kernel import forward_operations

SEED = 42
HELD_OUT_FOLD = 0
QUARTERS = 4
VERDICTS = ("model_a", "model_b")

# Operations of a step over those of its forward pass: the gradients of the inputs take as many
# again, and those of the weights too, which LoRA does not compute. Recomputed ones do not count.
STEP_OVER_FORWARD = 3
STEP_OVER_FORWARD_WITH_LORA = 2


@dataclass(frozen=True)
class Measured:
    """One training run of one contender.

    Attributes:
        pairs: How many pairs it trained on.
        seconds: From the first step to the last by read_clock, without loading and evaluation.
        padding: The tokens that were computed, over the tokens of the rows.
        operations: Floating-point operations that the rows' own tokens need.
        peak_bytes: The most memory of a GPU that was in use; 0 without one.
        losses: The training loss's mean in each quarter of the run.
        held_out_before: The mean loss on the held-out rows before the first step.
        held_out_after: The same after the last step.
    """

    pairs: int
    seconds: float
    padding: float
    operations: float
    peak_bytes: int
    losses: tuple[float, ...]
    held_out_before: float
    held_out_after: float


def read_clock() -> float:
    """Read the clock: without a GPU the CPU time of all threads, in seconds.

    Other work on the machine takes turns on its cores, and adds little to a process's own time.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def draw_rows(pairs: Path, trained: int, held_out: int) -> pl.DataFrame:
    """Draw pairs that have a winner: `held_out` in the first fold, `trained` in the next one."""
    rows = read_pairs(pairs).filter(role="train").filter(pl.col("winner") != "tie")
    if len(rows) < trained + held_out:
        raise UserError(
            f"{pairs}: {len(rows):,} pairs have a winner, {trained + held_out:,} are needed; "
            "give a larger file, or lower --trained"
        )

    # The weights and shares of votes of the file would be those of ours alone.
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


def write_base(folder: Path, base: str) -> None:
    """Write base/: `base` with a new head, and without dropout, which TRL turns off."""
    set_seed(SEED)
    config = AutoConfig.from_pretrained(base, num_labels=1)
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        if hasattr(config, name):
            setattr(config, name, 0.0)

    # The head is drawn here, once for all contenders.
    model = AutoModelForSequenceClassification.from_pretrained(base, config=config, dtype=torch.float32)
    model.save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(base).save_pretrained(folder / "base")


def write_rows(folder: Path, rows: pl.DataFrame, block: dict) -> None:
    """Write pairs.parquet, and train/ and held_out/ with the same rows as token ids, beside base/."""
    rows.write_parquet(folder / "pairs.parquet")
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    contract = new_contract(
        PairwiseBlock.model_validate(block),
        tokenizer,
        attention="sdpa",
        base_model=str(folder / "base"),
        revision=None,
        pad_token_id=tokenizer.pad_token_id,
    )

    is_held_out = pl.col("fold") == HELD_OUT_FOLD
    parts = {"held_out": rows.filter(is_held_out), "train": rows.filter(~is_held_out)}
    for name, part in parts.items():
        sequences = encode_rows(part, tokenizer, contract)
        choose(part, sequences).save_to_disk(folder / name)


def choose(rows: pl.DataFrame, sequences: list[list[list[int]]]) -> Dataset:
    """Return a dataset as TRL reads it: the ids of the chosen and of the rejected response."""
    pairs = []
    for winner, ids in zip(rows["winner"], sequences, strict=True):
        chosen, rejected = ids if winner == "model_a" else reversed(ids)
        length = max(len(chosen), len(rejected))
        pairs.append({"chosen_ids": chosen, "rejected_ids": rejected, "length": length})
    return Dataset.from_list(pairs)


class Measurement(TrainerCallback):
    """Measures the run of any trainer of transformers' kind.

    Attributes:
        folder: Holds what write_base and write_rows wrote.
        padding_free: Whether the model takes padding-free batches alone.
        measured: The figures, when the training has ended.
    """

    def __init__(self, folder: Path, padding_free: bool = False):
        self.folder = folder
        self.padding_free = padding_free
        self.computed_tokens = 0
        self.measured: Measured | None = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Evaluate, then count tokens and time from here on."""
        self.held_out_before = measure_loss(model, self.folder, self.padding_free)
        self.hook = model.register_forward_pre_hook(self.count_tokens, with_kwargs=True)
        self.started = read_clock()

    def count_tokens(self, model, arguments, keywords):
        """Count what a forward computes, padding included."""
        self.computed_tokens += keywords["input_ids"].numel()

    def on_train_end(self, args, state, control, model=None, **kwargs):
        """Stop the clocks, then evaluate again."""
        seconds = read_clock() - self.started
        self.hook.remove()

        rows = load_from_disk(self.folder / "train")
        lengths = [len(ids) for name in ("chosen_ids", "rejected_ids") for ids in rows[name]]

        step_over_forward = STEP_OVER_FORWARD
        if isinstance(model, PeftModel):
            step_over_forward = STEP_OVER_FORWARD_WITH_LORA

        # Every step is logged.
        losses = [line["loss"] for line in state.log_history if "loss" in line]
        quarters = np.array_split(losses, QUARTERS)

        self.measured = Measured(
            pairs=len(rows),
            seconds=seconds,
            padding=self.computed_tokens / sum(lengths),
            operations=step_over_forward * forward_operations(self.load_shape(), lengths),
            peak_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
            losses=tuple(float(np.mean(quarter)) for quarter in quarters),
            held_out_before=self.held_out_before,
            held_out_after=measure_loss(model, self.folder, self.padding_free),
        )

    def load_shape(self) -> nn.Module:
        """Return the base model without weights: those of a quantised one are packed."""
        config = AutoConfig.from_pretrained(self.folder / "base")
        with torch.device("meta"):
            return AutoModelForSequenceClassification.from_config(config)


@torch.no_grad()
def measure_loss(model: nn.Module, folder: Path, padding_free: bool) -> float:
    """Return the mean loss of a reward model on the held-out rows.

    Args:
        model: Is in training mode, before and after.
        folder: Holds what write_rows wrote.
        padding_free: Whether the model takes padding-free batches alone.
    """
    model.eval()
    # With a pair at a time, padding and its cost are the same for all.
    collate = PairCollator(None, "reward", VERDICTS, "both", 0, padding_free=padding_free)
    losses = []

    for row in load_from_disk(folder / "held_out"):
        sequences = [row["chosen_ids"], row["rejected_ids"]]
        pair = {"id": "", "sequences": sequences, "labels": [1, 0], "weight": 1}
        batch = BatchEncoding(collate([pair])).to(model.device)
        del batch["labels"], batch["weight"]
        chosen, rejected = model(**batch).logits.flatten()
        losses.append(-nn.functional.logsigmoid(chosen - rejected).item())

    model.train()
    return float(np.mean(losses))
