"""The Axolotl plugin: a thin adapter from Axolotl's hooks to the plain functions of this package.

Axolotl reads the recipe, loads the model, applies the adapter and runs the loop. This plugin refuses what would go wrong
(`register`), brings the datasets, collator, trainer and metrics, sees to the head, the pad id and the soft cap, and at the
end writes predictions.parquet, metrics.json, history.json, contract.json and model_input.py beside the weights.
"""

import logging
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import torch
from axolotl.common.datasets import TrainDatasetMeta
from axolotl.integrations.base import BasePlugin
from axolotl.loaders import load_tokenizer
from axolotl.utils.trainer import calculate_total_num_steps
from transformers import set_seed
from transformers.integrations import is_deepspeed_zero3_enabled

from preprocess.core import ledger
from preprocess.core.errors import UserError
from preprocess.core.files import atomic_file, read_json, sha256, write_json
from preprocess.model_input import ContractError
from recipes.pairwise.config.model_checks import (
    check_config,
    check_layers,
    check_vocabulary,
    read_config,
    warn_of_home_path,
)
from recipes.pairwise.config.schema import apply_environment, check_run, run_folder
from recipes.pairwise.contract import new_contract, record_training, write_contract
from recipes.pairwise.data.collators import LabelTokenCollator, PairCollator
from recipes.pairwise.data.datasets import datasets_of, read_pairs
from recipes.pairwise.tracking import metrics, recipe_copy, wandb_run
from recipes.pairwise.training import deepspeed_cpu, zero3
from recipes.pairwise.training.trainer import LabelTokenTrainer, PairwiseTrainer

LOG = logging.getLogger(__name__)
INSTEAD = {
    "merge-lora": "it would lose the head without a word; use python -m postprocess RECIPE",
    "quantize": "it loads a causal model and loses the head; use python -m postprocess RECIPE",
    "evaluate": "it ignores this plugin's datasets; metrics.json and predictions.parquet are written by axolotl train",
    "inference": "a classifier does not generate text; use python -m kaggle_kernels rehearse SPEC --test FILE",
    "lm-eval": "a classifier does not generate text; use python -m kaggle_kernels rehearse SPEC --test FILE",
}
LORA_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")
HEADS = ("score", "classifier")


def stop(error: Exception, recipe: Path | None = None) -> None:
    """End every process with exit code 2; the first one on each machine says why, in one line that names the recipe."""
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        named = recipe is None or str(recipe) in str(error)
        print(f"error: {error}" if named else f"error: {recipe}: {error}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def command_line() -> str:
    """The axolotl command that runs, e.g. "train" or "merge-lora"."""
    module = Path(sys.argv[0]).stem.replace("_", "-")
    return sys.argv[1] if module == "axolotl" and len(sys.argv) > 1 else module


class PairwisePlugin(BasePlugin):
    """See the module's docstring; each hook's place in a run is Axolotl's to decide."""

    def __init__(self):
        super().__init__()
        self.block = None
        self.config = None
        self.contract = None
        self.trainer = None
        self.recipe = None
        self.resolved = None
        self.begun_from: dict = {}
        self.started = time.monotonic()
        self.predicted = self.written = False

    def get_input_args(self) -> str:
        return "recipes.pairwise.config.schema.PairwiseArgs"

    def register(self, cfg):
        """Check the recipe before Axolotl does, and fill in the keys that are the same for every recipe."""
        try:
            command = command_line()
            if command in INSTEAD:
                raise UserError(f"axolotl {command}: refused, {INSTEAD[command]}")
            self.recipe = Path(cfg["axolotl_config_path"])
            self.resolved = recipe_copy.resolved(cfg, self.recipe)
            recipe_copy.begin_trial(self.resolved, self.recipe)
            lasting = recipe_copy.lasting(self.recipe, self.resolved["output_dir"])
            self.begun_from = {"recipe_sha256": ledger.fingerprint(lasting), **ledger.git_state()}
            self.block = apply_environment(check_run(cfg, self.recipe))
            wandb_run.check(cfg)
            checkpointing = zero3.checkpointing_kwargs(cfg)
            if not self.block.train:
                raise UserError(
                    f"{self.recipe}: pairwise.train is false, there is nothing to train; package the base model with "
                    f"python -m postprocess {self.recipe}"
                )
            self.config = read_config(cfg["base_model"], cfg.get("revision_of_model"))
            if int(os.environ.get("LOCAL_RANK", "0")) == 0:
                warn_of_home_path(cfg["base_model"])
            overrides = cfg.get("model_config") or cfg.get("overrides_of_model_config") or {}
            asked = {"budget_tokens": self.block.budget_tokens, "softcap": self.block.softcap}
            check_config(self.config, overrides=overrides, **asked)
            targets, saved = cfg.get("lora_target_modules"), cfg.get("lora_modules_to_save")
            check_layers(self.config, self.block.head, targets=targets, saved=saved)
        except UserError as error:
            recipe_copy.end_refused_trial(self.resolved, self.recipe, error)
            stop(error, self.recipe)
        cfg["output_dir"] = str(run_folder(cfg.get("output_dir"), self.recipe))
        if self.block.head == "label_tokens":
            cfg["model_type"] = "AutoModelForCausalLM"
        else:
            cfg["model_type"] = "AutoModelForSequenceClassification"
            cfg["num_labels"] = 1 if self.block.head == "reward" else len(self.block.verdicts)
        # Axolotl wants this key; the plugin brings its own datasets.
        cfg["datasets"] = [{"path": "pairwise", "type": "completion"}]
        cfg["sequence_len"] = self.block.budget_tokens
        cfg["attn_implementation"] = cfg.get("attn_implementation") or ("eager" if self.block.softcap else "sdpa")
        for kernel in LORA_KERNELS:
            cfg[kernel] = False
        if cfg.get("gradient_checkpointing"):
            cfg["gradient_checkpointing_kwargs"] = checkpointing
        if not torch.cuda.is_available():
            # Axolotl takes `bf16: auto` on a CPU for fp16, in which the first step ends in NaN.
            cfg["bf16"] = cfg["fp16"] = False
            use_all_cores()
            torch.cuda.can_device_access_peer = no_gpu_has_peers
            if deepspeed_cpu.deepspeed_on_cpu(cfg.get("deepspeed")):
                deepspeed_cpu.start_group()

    def load_datasets(self, cfg, preprocess=False):
        if not torch.cuda.is_available():
            # Later is too late: Axolotl would give each process a CUDA device.
            cfg.device_map = {"": "cpu"}
            if deepspeed_cpu.deepspeed_on_cpu(cfg.get("deepspeed")):
                cfg.device_map = None
        try:
            tokenizer = load_tokenizer(cfg)
            self.contract = self._new_contract(cfg, tokenizer)
            cache = Path(cfg.output_dir) / "prepared"
            train, validation = datasets_of(Path(self.block.pairs), self.block.fold, tokenizer, self.contract, cache)
            check_resume(cfg, self.block, self.recipe)
        except (UserError, ContractError) as error:
            stop(error, self.recipe)
        total_steps = cfg.max_steps or calculate_total_num_steps(cfg, train)
        return TrainDatasetMeta(train_dataset=train, eval_dataset=validation, total_num_steps=total_steps)

    def _new_contract(self, cfg, tokenizer):
        if not hasattr(tokenizer, "backend_tokenizer"):
            raise UserError(f"{self.recipe}: base_model {cfg.base_model} has no fast tokenizer (tokenizer.json)")
        if tokenizer.pad_token_id is None:
            raise UserError(
                f"{self.recipe}: the tokenizer has no pad token; set special_tokens: {{pad_token: …}} in the recipe"
            )
        vocabulary_size = self.config.get_text_config().vocab_size
        check_vocabulary(cfg.special_tokens or {}, tokenizer, cfg.base_model, vocabulary_size)
        return new_contract(
            self.block,
            tokenizer,
            attention=cfg.attn_implementation,
            base_model=cfg.base_model,
            revision=cfg.revision_of_model,
            pad_token_id=tokenizer.pad_token_id,
        )

    def pre_model_load(self, cfg):
        """One seed for a fresh head and adapter: the same run twice, and every process, starts from the same weights."""
        try:
            wandb_run.start(cfg, self.resolved, self.contract)
        except UserError as error:
            stop(error, self.recipe)
        set_seed(cfg.seed if cfg.seed is not None else 42)

    def post_model_build(self, cfg, model):
        """Pad id, soft cap, label names, and a head that holds sane numbers; the hub's commit, where it came from there."""
        self.contract = replace(self.contract, revision=self.contract.revision or getattr(model.config, "_commit_hash", None))
        try:
            if self.block.head != "label_tokens":
                ensure_head(model)
                name_labels(model.config, ("reward",) if self.block.head == "reward" else self.block.verdicts)
        except UserError as error:
            stop(error, self.recipe)
        model.config.pad_token_id = self.contract.pad_token_id
        if not self.block.softcap and getattr(model.config, "attn_logit_softcapping", None) is not None:
            model.config.attn_logit_softcapping = None
            for module in model.modules():
                if hasattr(module, "attn_logit_softcapping"):
                    module.attn_logit_softcapping = None

    def post_lora_load(self, cfg, model):
        if zero3.is_zero3(cfg.deepspeed):
            zero3.fetch_heads_as_one(model)

    def post_model_load(self, cfg, model):
        """The model has its adapter now. `bf16: full` trains without autocast, so that one type must stay in all layers."""
        if not cfg.deepspeed and not cfg.fsdp_config and cfg.bf16 != "full":
            train_in_float32(model)

    def get_trainer_cls(self, cfg):
        return LabelTokenTrainer if self.block.head == "label_tokens" else PairwiseTrainer

    def get_training_args(self, cfg):
        # Axolotl evaluates before the first step where eval_steps is set; that doubles the shortest runs for nothing.
        arguments = {"remove_unused_columns": False, "label_names": ["labels"], "eval_on_start": False}
        if deepspeed_cpu.deepspeed_on_cpu(cfg.get("deepspeed")):
            arguments["accelerator_config"] = {"use_configured_state": True}
        return arguments

    def get_collator_cls_and_kwargs(self, cfg, is_eval=False):
        predicts_answers = self.block.head == "label_tokens" and not is_eval
        answers = {"label_token_ids": self.contract.label_token_ids} if predicts_answers else {}
        return LabelTokenCollator if predicts_answers else PairCollator, answers | {
            "head": self.block.head,
            "verdicts": self.block.verdicts,
            "orders": "both" if is_eval else self.block.orders,
            "pad_token_id": self.contract.pad_token_id,
            "pad_to_multiple_of": 8,
        }

    def post_trainer_create(self, cfg, trainer):
        """Metrics in both orders; and nothing of an earlier run may vouch for this one's weights."""
        trainer.label_smoothing = self.block.label_smoothing
        trainer.label_token_ids = self.contract.label_token_ids
        trainer.compute_metrics = self._scores
        self.trainer = trainer
        wandb_run.make_harmless(trainer)
        if trainer.is_world_process_zero():
            for name in ("contract.json", "metrics.json", "predictions.parquet", "history.json"):
                (Path(cfg.output_dir) / name).unlink(missing_ok=True)
            recipe_copy.keep(self.resolved)

    def add_callbacks_post_trainer(self, cfg, trainer):
        return [deepspeed_cpu.StepsWithoutGrad(trainer)] if deepspeed_cpu.deepspeed_on_cpu(cfg.get("deepspeed")) else []

    def _scores(self, prediction) -> dict[str, float]:
        rows = self.trainer.eval_dataset
        both = metrics.probabilities(prediction.predictions, self.block.verdicts)
        labels, winners = prediction.label_ids[:, 0], np.array(rows["winner"])
        wandb_run.log_groups(self.block.pairs, list(rows["id"]), both, labels, winners)
        return metrics.scores(both, labels, winners)

    def post_train(self, cfg, model):
        """Called twice: after the last step, when all processes can still predict; and after the weights were saved."""
        folder = Path(cfg.output_dir)
        if not self.predicted:
            self.predicted = True
            deepspeed_cpu.check_engine(cfg.deepspeed, self.trainer)
            # Axolotl saves only after this hook: whatever goes wrong while predicting must not cost the weights.
            if is_deepspeed_zero3_enabled():
                self.trainer.save_model(str(folder))
            elif self.trainer.is_world_process_zero():
                model.save_pretrained(folder)
            self._predict(folder)
        elif not self.written and self.trainer.is_world_process_zero():
            self.written = True
            zero3.check_whole(folder)
            write_contract(folder, self.contract, self.recipe)
            LOG.info("contract.json and model_input.py written to %s", folder)
            record_training(recipe_copy.lasting(self.recipe, folder), folder, self.block.pairs, **self.begun_from)
            wandb_run.finish(folder, self.block.pairs, self.block.verdicts)

    def _predict(self, folder: Path) -> None:
        trained = time.monotonic()
        output = self.trainer.predict(self.trainer.eval_dataset, metric_key_prefix="eval")
        if not self.trainer.is_world_process_zero():
            return
        both = metrics.probabilities(output.predictions, self.block.verdicts)
        if not np.isfinite(both).all():
            stop(UserError(f"{folder}: the model's probabilities are not finite; lower the learning rate or use bf16"))
        frame = read_pairs(self.block.pairs)
        table = metrics.predictions(list(self.trainer.eval_dataset["id"]), both, self.block.verdicts, frame)
        with atomic_file(folder / "predictions.parquet") as temporary:
            table.write_parquet(temporary)
        rows = frame.filter(pl.col("id").is_in(table["id"].to_list()))
        values = {
            **metrics.scores(both, output.label_ids[:, 0], np.array(self.trainer.eval_dataset["winner"])),
            "accuracy_of_longer": metrics.longer_is_right(rows),
            "rows": len(table),
            "training_rows": len(self.trainer.train_dataset),
            "fold": self.block.fold,
            "rows_were_trained_on": self.block.fold == "all",
            "steps": self.trainer.state.global_step,
            "seconds_training": round(trained - self.started, 1),
            "seconds_predicting": round(time.monotonic() - trained, 1),
            "pairs_sha256": sha256(self.block.pairs),
        }
        write_json(folder / "metrics.json", values)
        write_json(folder / "history.json", metrics.history(self.trainer.state.log_history))
        LOG.info(
            "validation: accuracy %.4f, log loss %.4f, flips %.3f", *(values[k] for k in ("accuracy", "log_loss", "flip_rate"))
        )


def use_all_cores() -> None:
    """Give a single process every core: accelerate's launcher sets OMP_NUM_THREADS to 1 where it is unset, GPU or not."""
    if os.environ.get("OMP_NUM_THREADS") == "1" and os.environ.get("WORLD_SIZE", "1") == "1":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(cores)


def no_gpu_has_peers(device, peer) -> bool:
    """What torch.cuda.can_device_access_peer is on a machine without a GPU, where Axolotl asks it in several processes.

    PyTorch's own raises: in a build without CUDA an AssertionError, which Axolotl lets pass, in one with CUDA (PyPI's) a
    RuntimeError, which ends the run.
    """
    return False


def check_resume(cfg, block, recipe: Path) -> None:
    """Raise UserError where the run would go on from a checkpoint of other rows or settings; write down whose these are."""
    folder = Path(cfg.output_dir)
    identity = {
        "fold": block.fold,
        "pairs_sha256": sha256(block.pairs),
        "block": block.model_dump(mode="json"),
    }
    resumes = cfg.resume_from_checkpoint or cfg.auto_resume_from_checkpoints
    if resumes and any(folder.glob("checkpoint-*")):
        known = read_json(folder / "run.json") if (folder / "run.json").exists() else None
        if known != identity:
            raise UserError(
                f"{folder}: its checkpoints were trained with another fold, other pairs or another pairwise block than "
                f"{recipe} has now; remove them, or do not resume"
            )
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        write_json(folder / "run.json", identity)


def train_in_float32(model) -> None:
    """Hold what is trained in float32, as DeepSpeed does by itself: Axolotl loads in bf16, where small steps round to nothing.

    LoRA's matrices are float32 already; the head beside them and a full fine-tune are not. Autocast computes in bf16 still.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()


def name_labels(config, names) -> None:
    """Write the head's outputs into the configuration, by name."""
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}
    config.problem_type = None


def ensure_head(model) -> None:
    """Give the head fresh weights where loading left it uninitialised (seen under ZeRO-3 and in bf16): std 0.02, as usual."""
    names = [name for name in HEADS if hasattr(model, name)]
    if not names:
        raise UserError(f"{type(model).__name__}: no head named {' or '.join(HEADS)}")
    head = getattr(model, names[0])
    with zero3.gathered(head.parameters()):
        for parameter_name, weight in head.named_parameters():
            if weight.dim() != 2:
                continue
            spread = weight.detach().float().std().item()
            if not (np.isfinite(spread) and 0 < spread < 0.1):
                LOG.warning("head %s.%s has standard deviation %s: initialised anew", names[0], parameter_name, spread)
                torch.nn.init.normal_(weight.data, std=0.02)
