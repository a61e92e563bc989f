"""Axolotl's trainer with cross-entropy on soft targets in place of its loss, or with its own loss on label tokens."""

import math

import torch
from axolotl.core.trainers.base import AxolotlTrainer
from torch.utils.data import SequentialSampler
from transformers import Trainer

from recipes.pairwise.training.deepspeed_cpu import deepspeed_on_cpu, tell_accelerate

MEANINGLESS = ("ppl", "eval_ppl", "tokens/")


def soft_cross_entropy(logits, labels, weight, label_smoothing: float = 0.0):
    """Return the weighted cross-entropy's mean over pairs and orders, in float32.

    Args:
        logits: Of shape (pairs, orders, verdicts).
        labels: Target probabilities, of the same shape.
        weight: Of shape (pairs,); 1 on average over all rows, not over a batch: it counts in a micro-batch of one pair too.
        label_smoothing: The share of the uniform distribution that is mixed into the labels, as in Szegedy et al. 2016.
    """
    labels = labels * (1 - label_smoothing) + label_smoothing / labels.shape[-1]
    losses_po = -(labels * torch.log_softmax(logits.float(), dim=-1)).sum(-1)
    return (losses_po.mean(dim=1) * weight).mean()


class _AfterAxolotl(Trainer):
    """Stands behind Axolotl's trainer in the order of resolution, and so sees what that one hands on."""

    def create_accelerator_and_postprocess(self):
        if deepspeed_on_cpu(self.args.deepspeed):
            tell_accelerate()
        super().create_accelerator_and_postprocess()

    def log(self, logs, start_time=None):
        if not math.isfinite(float(logs.get("grad_norm", 0.0))):
            raise FloatingPointError(
                f"step {self.state.global_step}: the gradient is not finite; lower learning_rate or train in bf16, not fp16"
            )
        super().log({key: value for key, value in logs.items() if not key.startswith(MEANINGLESS)}, start_time)


class _PairTrainer(AxolotlTrainer, _AfterAxolotl):
    """What both trainers below need: `label_smoothing` and `label_token_ids` are set by the plugin."""

    label_smoothing = 0.0
    label_token_ids: tuple[int, ...] = ()

    def _prepare_input(self, data):
        # Trainer casts every float to DeepSpeed's type, and bf16 makes 0.334 of a third of the votes.
        return data.to(self.args.device) if isinstance(data, torch.Tensor) else super()._prepare_input(data)

    def _get_eval_sampler(self, eval_dataset=None):
        # Predictions are matched with rows by position: never grouped by length, whatever the training sampler is.
        return SequentialSampler(eval_dataset if eval_dataset is not None else self.eval_dataset)


class PairwiseTrainer(_PairTrainer):
    """Trains classifiers and reward models on batches of `PairCollator`.

    A reward model's logits (2 * pairs, 1) are viewed as (pairs, 1, 2): the softmax over the two rewards is Bradley and
    Terry's model (1952), and a tie's label of one half each is its usual extension.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # A classifier's forward takes **kwargs, from which Trainer concludes that the loss is normalised by the model, and
        # leaves out the division by gradient_accumulation_steps.
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels, weight = inputs["labels"], inputs["weight"]
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        logits_pov = logits.view(labels.shape)
        smoothing = self.label_smoothing if model.training else 0.0
        loss = soft_cross_entropy(logits_pov, labels, weight, smoothing)
        return (loss, {"logits": logits_pov.float()}) if return_outputs else loss


class LabelTokenTrainer(_PairTrainer):
    """Trains by Axolotl's stock causal loss on batches of `LabelTokenCollator`; predicts from batches of `PairCollator`.

    Evaluation reads the label tokens' logits at the last place only: a whole vocabulary at every place would not fit.
    """

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        mask = inputs["attention_mask"]
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad(), self.compute_loss_context_manager():
            output = model(
                input_ids=inputs["input_ids"], attention_mask=mask, position_ids=places, logits_to_keep=1, use_cache=False
            )
        logits_pov = output.logits[:, -1, list(self.label_token_ids)].float().view(inputs["labels"].shape)
        loss = soft_cross_entropy(logits_pov, inputs["labels"], inputs["weight"])
        return (loss, None, None) if prediction_loss_only else (loss, logits_pov, inputs["labels"])
