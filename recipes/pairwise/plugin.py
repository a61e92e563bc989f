"""The Axolotl plugin: a thin adapter from Axolotl's hooks to the plain functions of this package.

Axolotl reads the recipe, loads the model, applies the adapter and runs the loop. The plugin refuses what would go wrong,
brings datasets, collator, trainer and metrics, sees to the head, and at the end writes predictions.parquet, metrics.json,
history.json, contract.json and model_input.py beside the weights. The hooks stand in the order in which Axolotl calls them.
"""

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from axolotl.common.datasets import TrainDatasetMeta
from axolotl.integrations.base import BasePlugin
from axolotl.loaders import load_tokenizer
from axolotl.utils.trainer import calculate_total_num_steps
from datasets import Dataset
from transformers import set_seed
from transformers.integrations import is_deepspeed_zero3_enabled

from preprocess.core import ledger
from preprocess.core.errors import UserError
from preprocess.model_input import Contract
from recipes.pairwise.config import run_config
from recipes.pairwise.config.earlier_runs import choose_head_start
from recipes.pairwise.config.schema import PairwiseBlock
from recipes.pairwise.contract import new_contract, record_training, write_contract
from recipes.pairwise.data.collators import PADDED_TO_MULTIPLE_OF, PairCollator
from recipes.pairwise.data.datasets import datasets_of
from recipes.pairwise.data.token_budget import StepShape, TokenBudgetBatches
from recipes.pairwise.processes import (
    LOG,
    check_compiler_locks,
    end_without_telemetry,
    stop,
    stopping_on_errors,
)
from recipes.pairwise.tracking import metrics, recipe_copy, results, wandb_run
from recipes.pairwise.training import (
    checkpoints,
    cpu,
    deepspeed_cpu,
    heads,
    kernels,
    weights,
    zero3,
)
from recipes.pairwise.training.moving_average import MovingAverage
from recipes.pairwise.training.padding_free import use_padding_free
from recipes.pairwise.training.regularisers import require_dropout
from recipes.pairwise.training.trainer import BeginEpoch, PairwiseTrainer, label_token_options

DEFAULT_SEED = 42
VALIDATED_AT_ONCE = 4  # micro-batches: without gradients a batch needs a fraction of the memory


def find_seed(cfg) -> int:
    """Return the run's seed: every run has one, so that all processes start from the same weights."""
    return cfg.seed if cfg.seed is not None else DEFAULT_SEED


class PairwisePlugin(BasePlugin):
    """One training run. What a hook learns stands in an attribute for those after it."""

    def __init__(self):
        super().__init__()
        self.started = time.monotonic()

        # Set by `register`.
        self.recipe: Path | None = None
        self.resolved = None  # the recipe's keys as they run: see recipe_copy.resolve_recipe
        self.begun_from: dict = {}  # for the ledger: the recipe's hash and the git state
        self.block: PairwiseBlock | None = None
        self.model_config = None
        self.earlier_run = None  # the run that this one goes on from
        self.head_start = None  # whether the base model's head is kept

        # Set by `load_datasets`.
        self.contract: Contract | None = None
        self.batches: TokenBudgetBatches | None = None  # where the recipe has a token budget

        # Set by `post_trainer_create` and `post_train`.
        self.trainer: PairwiseTrainer | None = None
        self.has_predicted = False
        self.is_complete = False

    def register(self, cfg):
        """Check the recipe before Axolotl does, and set the keys that are the same for every recipe."""
        end_without_telemetry()
        with stopping_on_errors():
            run_config.refuse_other_commands(sys.argv)

        self.recipe = Path(cfg["axolotl_config_path"])
        try:
            self._note_beginning(cfg)
            empty_model, checkpointing = self._check_recipe(cfg)
        except UserError as error:
            # A sweep lists its trials, those that were refused among them.
            recipe_copy.end_refused_trial(self.resolved, self.recipe, error)
            stop(error, self.recipe)

        self._set_keys(cfg, empty_model, checkpointing)

    def _note_beginning(self, cfg) -> None:
        """Note the recipe as it is now, which may change while the training runs."""
        self.resolved = recipe_copy.resolve_recipe(cfg, self.recipe)
        recipe_copy.begin_trial(self.resolved, self.recipe)

        recipe_file = recipe_copy.lasting_recipe(self.recipe, self.resolved["output_dir"])
        recipe_sha256 = ledger.fingerprint(recipe_file)
        self.begun_from = {"recipe_sha256": recipe_sha256, **ledger.git_state()}

    def _check_recipe(self, cfg):
        """Check the recipe, then its base model, of which only the configuration is read.

        Returns:
            The base model without weights; and the arguments of PyTorch's gradient checkpointing, which
            recomputes activations in the backward pass.
        """
        self.block = run_config.check_run(cfg, self.recipe)
        run_config.set_accumulation_steps(cfg, self.block)
        wandb_run.check(cfg)
        checkpointing = zero3.checkpointing_kwargs(cfg)
        if cfg.get("deepspeed"):
            check_compiler_locks()

        empty_model = run_config.check_base_model(cfg, self.block)
        self.model_config = empty_model.config
        self.earlier_run = run_config.check_start(cfg, self.block)
        return empty_model, checkpointing

    def _set_keys(self, cfg, empty_model, checkpointing: dict) -> None:
        """Set the keys of Axolotl's that follow from the block, the base model and this machine."""
        run_config.set_fixed_keys(cfg, self.block, self.recipe, checkpointing)

        # A base model that has a classification head may keep it.
        has_adapter = bool(cfg.get("lora_model_dir"))
        self.head_start = choose_head_start(
            self.model_config, self.block, self.earlier_run, has_adapter
        )
        run_config.set_model_keys(cfg, self.block, empty_model, self.head_start)

        kernels.choose_lora_kernels(cfg, self.model_config.model_type)
        kernels.turn_on_liger(cfg)
        if not torch.cuda.is_available():
            cpu.prepare(cfg)

    def get_input_args(self) -> str:
        """Name the model by which Axolotl lets the `pairwise:` block pass."""
        return "recipes.pairwise.config.schema.PairwiseArgs"

    def load_datasets(self, cfg, preprocess=False):
        """Give Axolotl the training and validation rows: both orders of every pair as token ids.

        Made on the way, and kept for the later hooks: the contract, which says how a pair becomes token
        ids, and the batches of a recipe with a token budget. A mistake in the recipe ends the run here,
        before the model is loaded.
        """
        if not torch.cuda.is_available():
            cpu.place_model(cfg)

        with stopping_on_errors(self.recipe):
            tokenizer = load_tokenizer(cfg)
            run_config.check_tokenizer(cfg, tokenizer, self.model_config)

            # The kernel will encode its rows by this contract too.
            self.contract = new_contract(
                self.block,
                tokenizer,
                attention=cfg.attn_implementation,
                base_model=cfg.base_model,
                revision=cfg.revision_of_model,
                pad_token_id=tokenizer.pad_token_id,
            )

            # Rows that an earlier run with this contract has tokenised are read from the cache.
            cache = Path(cfg.output_dir) / "prepared"
            train, validation = datasets_of(self.block, tokenizer, self.contract, cache)

            if self.block.tokens_per_micro_batch:
                self.batches = self._plan_batches(cfg, train)
            checkpoints.check_resume(cfg, self.block, self.resolved)

        total_steps = cfg.max_steps or calculate_total_num_steps(cfg, train)
        return TrainDatasetMeta(
            train_dataset=train, eval_dataset=validation, total_num_steps=total_steps
        )

    def _plan_batches(self, cfg, train: Dataset) -> TokenBudgetBatches:
        """Plan the micro-batches of a recipe that limits their tokens, and not their pairs."""
        # The tokens that each of a pair's two sequences takes. With padding both are as long as the
        # longer one. Without, their mean counts.
        if self.block.padding_free:
            lengths_r = np.array(train["tokens"]) / 2
        else:
            lengths_r = np.array(train["length"])

        has_two_sequences = self.block.head == "reward" or self.block.orders == "both"
        shape = StepShape(
            mean_pairs=cfg.micro_batch_size,
            turns=cfg.gradient_accumulation_steps,
            processes=int(os.environ.get("WORLD_SIZE", "1")),
            sequences_per_pair=2 if has_two_sequences else 1,
        )
        return TokenBudgetBatches(
            lengths_r, shape, self.block.tokens_per_micro_batch, find_seed(cfg)
        )

    def pre_model_load(self, cfg):
        """Start the tracking; and seed, so that every process starts from the same fresh head and adapter."""
        with stopping_on_errors(self.recipe):
            wandb_run.start(cfg, self.resolved, self.contract)
        set_seed(find_seed(cfg))

    def post_model_build(self, cfg, model):
        """Set up the loaded model: its head, the names of its labels, the pad token and the soft cap."""
        # The contract names the exact commit of a model from the hub, also where the recipe names none.
        hub_commit = getattr(model.config, "_commit_hash", None)
        self.contract = replace(self.contract, revision=self.contract.revision or hub_commit)

        if self.block.head != "label_tokens":
            with stopping_on_errors(self.recipe):
                heads.start_head(model, self.head_start, self.contract.num_labels)
            labels = ("reward",) if self.block.head == "reward" else self.block.verdicts
            heads.name_labels(model.config, labels)
        model.config.pad_token_id = self.contract.pad_token_id
        if not self.block.softcap:
            weights.remove_softcap(model)

    def post_lora_load(self, cfg, model):
        """Have ZeRO-3 fetch PEFT's copy of the head in one piece."""
        if zero3.is_zero3(cfg.deepspeed):
            zero3.fetch_heads_as_one(model)

    def post_model_load(self, cfg, model):
        """Compute logits in float32, take padding-free batches, hold what is trained in float32 (DeepSpeed and FSDP do)."""
        heads.replace_head_forward(model, self.contract.label_token_ids)
        if self.block.padding_free:
            with stopping_on_errors(self.recipe):
                use_padding_free(model)
        if not cfg.deepspeed and not cfg.fsdp_config:
            weights.train_in_float32(model)

    def get_training_args(self, cfg):
        """Return what replaces Axolotl's choices among the arguments of transformers' Trainer."""
        arguments = {
            # Our loss reads columns that the model does not take as inputs, such as the weights.
            "remove_unused_columns": False,
            "label_names": ["labels"],
            # With eval_steps, Axolotl would also evaluate before the first step, which doubles the shortest runs.
            "eval_on_start": False,
        }

        # Without gradients, more pairs fit into memory.
        if self.resolved.get("eval_batch_size") is None:
            arguments["per_device_eval_batch_size"] = VALIDATED_AT_ONCE * cfg.micro_batch_size
        if deepspeed_cpu.deepspeed_on_cpu(cfg.get("deepspeed")):
            arguments["accelerator_config"] = {"use_configured_state": True}
        return arguments

    def get_trainer_cls(self, cfg):
        """Bring the trainer with our loss."""
        return PairwiseTrainer

    def get_collator_cls_and_kwargs(self, cfg, is_eval=False):
        """Bring the collator; evaluation always sees both orders."""
        return PairCollator, {
            "head": self.block.head,
            "verdicts": self.block.verdicts,
            "orders": "both" if is_eval else self.block.orders,
            "pad_token_id": self.contract.pad_token_id,
            "pad_to_multiple_of": PADDED_TO_MULTIPLE_OF,
            "padding_free": self.block.padding_free,
            "seed": find_seed(cfg),
        }

    def add_callbacks_post_trainer(self, cfg, trainer):
        """Bring what acts between steps: the number of the epoch, for DeepSpeed on CPUs, a moving average."""
        callbacks = [BeginEpoch(trainer)]
        if deepspeed_cpu.deepspeed_on_cpu(cfg.get("deepspeed")):
            callbacks.append(deepspeed_cpu.StepsWithoutGrad(trainer))
        if self.block.ema_decay > 0:
            callbacks.append(MovingAverage(self.block.ema_decay))
        return callbacks

    def post_trainer_create(self, cfg, trainer):
        """Give the trainer its loss's settings and metrics; keep the recipe, and clear away an earlier run's results."""
        # It sets the loss: label smoothing, focal loss, R-Drop and the teachers' part.
        trainer.block = self.block
        if self.block.r_drop > 0:
            with stopping_on_errors(self.recipe):
                require_dropout(trainer.model)

        # What a forward pass is given, and what an evaluation measures.
        if self.block.head == "label_tokens":
            trainer.model_options = label_token_options(self.block.padding_free)
        trainer.token_budget_batches = self.batches
        trainer.compute_metrics = self._compute_metrics
        self.trainer = trainer

        # A failure of wandb must not end the training.
        wandb_run.make_harmless(trainer)
        if trainer.is_world_process_zero():
            results.remove_earlier(Path(cfg.output_dir))
            recipe_copy.write_copy(self.resolved)

    def _compute_metrics(self, prediction) -> dict[str, float]:
        """Score an evaluation, during the training and after it."""
        both_rov = metrics.probabilities(prediction.predictions, self.block.verdicts)
        labels_rv = prediction.label_ids[:, 0]
        winners_r = np.array(self.trainer.eval_dataset["winner"])
        return metrics.scores(both_rov, labels_rv, winners_r)

    def post_train(self, cfg, model):
        """Predict the validation rows after the training, and complete the run folder once the weights are saved.

        Axolotl calls this hook at both moments: after the last step, and after it has saved the weights.
        """
        folder = Path(cfg.output_dir)
        if not self.has_predicted:
            self.has_predicted = True
            deepspeed_cpu.check_engine(cfg.deepspeed, self.trainer)
            self._save_weights(folder, model)
            with stopping_on_errors():
                results.write_results(folder, self.trainer, self.block, self.started)
            return

        # The second call. One process writes for all.
        if self.is_complete or not self.trainer.is_world_process_zero():
            return
        self.is_complete = True
        zero3.check_whole(folder)

        # The contract says what the weights are, so that it comes after them.
        started_from = self.earlier_run.describe() if self.earlier_run else None
        write_contract(folder, self.contract, self.recipe, started_from)
        LOG.info("contract.json and model_input.py written to %s", folder)

        lasting_recipe = recipe_copy.lasting_recipe(self.recipe, folder)
        begun_from = self.begun_from | {"started_from": started_from}
        record_training(lasting_recipe, folder, self.block.pairs, **begun_from)
        wandb_run.finish(folder)

    def _save_weights(self, folder: Path, model) -> None:
        """Save the weights before Axolotl does: whatever goes wrong while predicting must not cost them."""
        if is_deepspeed_zero3_enabled():
            self.trainer.save_model(str(folder))
        elif self.trainer.is_world_process_zero():
            model.save_pretrained(folder)
