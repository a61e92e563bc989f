"""Axolotl's trainer with one loss for all heads: cross-entropy on votes, mixed with teachers' labels."""

import math
from collections.abc import Iterator

import torch
from axolotl.core.trainers.base import AxolotlTrainer
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback

from recipes.pairwise.config.schema import PairwiseBlock
from recipes.pairwise.data.token_budget import TokenBudgetBatches
from recipes.pairwise.training.deepspeed_cpu import deepspeed_on_cpu, tell_accelerate
from recipes.pairwise.training.losses import distillation_loss, soft_cross_entropy
from recipes.pairwise.training.regularisers import r_drop_penalty, repeat_batch

# Axolotl logs these; they mean nothing for a model that generates no text.
MEANINGLESS_METRICS = ("ppl", "eval_ppl", "tokens/")

# fp16's loss scale starts at 65,536 and is halved at every overflow: below this, all steps overflow.
LEAST_LOSS_SCALE = 1.0


def label_token_options(padding_free: bool) -> dict[str, object]:
    """Return the arguments with which a causal LM computes logits only where the answer stands."""
    options: dict[str, object] = {"use_cache": False}
    # Padded rows end with it. A padding-free batch names the places itself.
    if not padding_free:
        options["logits_to_keep"] = 1
    return options


def check_gradient(norm: float, step: int, loss_scale: float | None) -> None:
    """Raise FloatingPointError where the training has diverged.

    Args:
        norm: The gradient's norm in the last step.
        step: The number of that step, for the message.
        loss_scale: fp16's loss scale, or None in other dtypes. Such a scale is found by trying:
            a step that overflows now and then is routine, is left out, and halves it.
    """
    if math.isfinite(norm):
        return
    is_routine_overflow = loss_scale is not None and loss_scale >= LEAST_LOSS_SCALE
    if is_routine_overflow:
        return
    raise FloatingPointError(
        f"step {step}: the gradient is not finite; lower learning_rate or train in bf16, not fp16"
    )


def weigh_by_pair(micro_batches: list[dict]) -> None:
    """Scale the rows' weights so that each pair of a step counts the same, in any micro-batch.

    The loss is a mean over a micro-batch, and Trainer averages those of a step: without this a pair
    in a small micro-batch would count for more than one in a large one. They are changed in place.
    """
    if not micro_batches:
        return

    pair_counts = [len(batch["labels"]) for batch in micro_batches]
    mean_count = sum(pair_counts) / len(pair_counts)
    for batch, pair_count in zip(micro_batches, pair_counts, strict=True):
        batch["weight"] = batch["weight"] * (pair_count / mean_count)


class RowOrder(Sampler):
    """The rows of an epoch in transformers' random order, which follows from the seed and the epoch.

    transformers' samplers go on from the random numbers before them, which a resumed run has not drawn.
    """

    def __init__(self, sampler: Sampler, seed: int):
        self.sampler = sampler
        self.seed = seed
        self.epoch = 0  # set by BeginEpoch

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        self.sampler.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(self.sampler)


class BeginEpoch(TrainerCallback):
    """Tells the collator and the order of the rows, which draw by seed and epoch, that an epoch begins.

    accelerate would tell them, but in a resumed run its sampler that skips rows stands in between.
    """

    def __init__(self, trainer: "PairwiseTrainer"):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        epoch = int(state.epoch or 0)
        self.trainer.data_collator.epoch = epoch
        self.trainer.train_order.epoch = epoch


class _AfterAxolotl(Trainer):
    """Stands behind Axolotl's trainer in the order of resolution, and so sees what it hands on."""

    def create_accelerator_and_postprocess(self):
        if deepspeed_on_cpu(self.args.deepspeed):
            tell_accelerate()
        super().create_accelerator_and_postprocess()

    def log(self, logs, start_time=None):
        check_gradient(float(logs.get("grad_norm", 0.0)), self.state.global_step, self.loss_scale())

        names = [name for name in logs if not name.startswith(MEANINGLESS_METRICS)]
        super().log({name: logs[name] for name in names}, start_time)

    def loss_scale(self) -> float | None:
        """Return the present loss scale of training in fp16, None in other dtypes."""
        if not self.args.fp16:
            return None
        if self.accelerator.scaler is None:
            # DeepSpeed scales by itself, and ends a run whose scale has fallen to its least.
            return math.inf
        return self.accelerator.scaler.get_scale()


class PairwiseTrainer(AxolotlTrainer, _AfterAxolotl):
    """Trains all three heads on batches of PairCollator.

    A reward model's logits (2 * pairs, 1) are viewed as (pairs, 1, 2): the softmax over the two
    rewards is Bradley and Terry's model (1952), and a tie's label of one half each is its usual
    extension. A causal LM's logits are those of the label tokens alone, see heads.py.
    """

    # Set by the plugin.
    block: PairwiseBlock  # the recipe's; its keys on the loss are read here
    model_options: dict = {}  # further arguments of the model's forward
    token_budget_batches: TokenBudgetBatches | None = None  # where the recipe has a token budget
    # Of the training rows: token_budget_batches, or a RowOrder.
    train_order: TokenBudgetBatches | RowOrder | None = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # The model's forward takes **kwargs, from which Trainer concludes that the loss is
        # normalised by the model, and leaves out the division by gradient_accumulation_steps.
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the loss of a batch of PairCollator, and where they are asked for its logits."""
        # R-Drop compares two passes of a pair, which differ by their dropout.
        uses_r_drop = self.block.r_drop > 0 and model.training
        model_inputs = repeat_batch(inputs) if uses_r_drop else dict(inputs)

        # What the loss reads is no input of the model.
        labels = model_inputs.pop("labels")
        weight = model_inputs.pop("weight")
        teacher = model_inputs.pop("teacher", None)
        logits = model(**model_inputs, **self.model_options).logits
        logits_pov = logits.view(labels.shape).float()

        if model.training:
            loss = self.training_loss(logits_pov, labels, weight, teacher)
        else:
            # Metrics are against human votes, and comparable whatever a run is trained with.
            loss = soft_cross_entropy(logits_pov, labels, weight)

        if return_outputs:
            return loss, {"logits": logits_pov}
        return loss

    def training_loss(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        weight: torch.Tensor,
        teacher: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the loss of a training step, with all that the recipe adds to cross-entropy.

        Args:
            logits: Of shape (pairs, orders, verdicts); with R-Drop, of a batch from repeat_batch.
            labels: Of the same shape, see soft_cross_entropy.
            weight: Of shape (pairs,), see soft_cross_entropy.
            teacher: The teachers' probabilities, of the shape of the labels; None without teachers.
        """
        block = self.block
        loss = soft_cross_entropy(logits, labels, weight, block.label_smoothing, block.focal_gamma)

        if teacher is not None:
            teacher_share = block.distill.weight
            divergence = distillation_loss(logits, teacher, weight, block.distill.temperature)
            loss = (1 - teacher_share) * loss + teacher_share * divergence

        if block.r_drop > 0:
            loss = loss + block.r_drop * r_drop_penalty(logits, weight)
        return loss

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, item_count = super().get_batch_samples(epoch_iterator, num_batches, device)
        weigh_by_pair(batches)
        return batches, item_count

    def get_train_dataloader(self):
        if self.token_budget_batches is None:
            return super().get_train_dataloader()

        # accelerate would fill up micro-batches that differ in size; processes have equally many.
        evens_batches = self.accelerator.even_batches
        self.accelerator.even_batches = False
        dataloader = super().get_train_dataloader()
        self.accelerator.even_batches = evens_batches
        return dataloader

    def _get_train_sampler(self, train_dataset=None):
        if self.token_budget_batches is not None:
            self.train_order = self.token_budget_batches
        else:
            sampler = super()._get_train_sampler(train_dataset)
            self.train_order = RowOrder(sampler, self.args.seed)
        return self.train_order

    def _prepare_input(self, data):
        # Trainer casts every float to DeepSpeed's type, and bf16 makes 0.334 of a third of votes.
        if isinstance(data, torch.Tensor):
            return data.to(self.args.device)
        return super()._prepare_input(data)

    def _get_eval_sampler(self, eval_dataset=None):
        # Predictions are matched with rows by position: never grouped by length, as training may be.
        return SequentialSampler(eval_dataset if eval_dataset is not None else self.eval_dataset)
