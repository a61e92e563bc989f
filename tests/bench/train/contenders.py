"""The contenders of the training bench; each function is run in a process of its own.

All train the same model on the same token ids, in float32, without gradient checkpointing, with the
recipe's learning rate and its pairs of a micro-batch and of a step.
"""

from pathlib import Path

import torch
import yaml
from axolotl.cli.train import do_cli
from axolotl.integrations.base import BasePlugin, PluginManager
from datasets import load_from_disk
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments
from trl import RewardConfig, RewardTrainer

from preprocess.core.files import read_yaml
from recipes.pairwise.config.recipe_files import find_recipe
from recipes.pairwise.training import cpu
from tests.bench.train.work import HELD_OUT_FOLD, SEED, Measured, Measurement

RECIPE = "minilm_reward"

# The runs' processes fork from one that has imported these and computed nothing. On a GPU each starts
# anew: libraries ask for devices when they are imported, and CUDA does not survive a fork.
SLOW_IMPORTS = () if torch.cuda.is_available() else (__name__, "tests.forked_imports")

# Of a ratio Axolotl makes other numbers than transformers, and of one step it makes two.
WARMUP_STEPS = 2


def load_arguments(folder: Path, groups_lengths: bool) -> dict:
    """Return the arguments that TRL and Trainer share: those of the recipe, else their defaults."""
    recipe = read_yaml(find_recipe(RECIPE))
    return {
        "output_dir": str(folder / "run"),
        "per_device_train_batch_size": recipe["micro_batch_size"],
        "gradient_accumulation_steps": recipe["gradient_accumulation_steps"],
        # The recipe's optimizer is theirs by default, and in one kernel.
        "num_train_epochs": recipe["num_epochs"],
        "learning_rate": recipe["learning_rate"],
        "lr_scheduler_type": recipe["lr_scheduler"],
        "warmup_steps": WARMUP_STEPS,
        "weight_decay": recipe["weight_decay"],
        "train_sampling_strategy": "group_by_length" if groups_lengths else "random",
        "remove_unused_columns": False,  # the column of lengths is one
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "seed": SEED,
        # TRL's defaults are bf16 and checkpointing.
        "bf16": False,
        "gradient_checkpointing": False,
    }


def load_model(folder: Path) -> nn.Module:
    """Load the model that all start from."""
    return AutoModelForSequenceClassification.from_pretrained(folder / "base", dtype=torch.float32)


def train_with_trl(folder: Path, groups_lengths: bool) -> Measured:
    """Train with TRL's RewardTrainer."""
    cpu.use_all_cores()  # as our plugin does
    measurement = Measurement(folder)
    trainer = RewardTrainer(
        model=load_model(folder),
        args=RewardConfig(max_length=None, **load_arguments(folder, groups_lengths)),
        train_dataset=load_from_disk(folder / "train"),
        processing_class=AutoTokenizer.from_pretrained(folder / "base"),
        callbacks=[measurement],
    )

    trainer.train()
    return measurement.measured


class PlainRewardTrainer(Trainer):
    """The trainer of a plain script: the chosen responses of a batch stand before the rejected."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        rewards = model(**inputs).logits.squeeze(-1)
        chosen, rejected = rewards.chunk(2)
        loss = -nn.functional.logsigmoid(chosen - rejected).mean()
        return (loss, {"rewards": rewards}) if return_outputs else loss


def train_with_trainer(folder: Path, groups_lengths: bool) -> Measured:
    """Train with transformers' Trainer, as a plain script does."""
    cpu.use_all_cores()  # as our plugin does
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    measurement = Measurement(folder)

    def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
        sequences = [row["chosen_ids"] for row in rows]
        sequences += [row["rejected_ids"] for row in rows]
        return tokenizer.pad({"input_ids": sequences}, return_tensors="pt")

    trainer = PlainRewardTrainer(
        model=load_model(folder),
        args=TrainingArguments(**load_arguments(folder, groups_lengths)),
        data_collator=collate,
        train_dataset=load_from_disk(folder / "train"),
        callbacks=[measurement],
    )

    # The mean over a step's micro-batches is the loss's, as in the other contenders.
    trainer.model_accepts_loss_kwargs = False
    trainer.train()
    return measurement.measured


class MeasuringPlugin(BasePlugin):
    """Adds the measurement to a run of Axolotl."""

    measurement: Measurement | None = None

    def add_callbacks_post_trainer(self, cfg, trainer):
        padding_free = bool(cfg.pairwise.get("padding_free"))
        self.measurement = Measurement(Path(cfg.base_model).parent, padding_free)
        return [self.measurement]


def write_recipe(folder: Path, name: str, changes: dict) -> Path:
    """Write ours.yml: a recipe on the bench's rows and model, measured; a change to None takes a key away."""
    values = read_yaml(find_recipe(name))
    block = values["pairwise"] | changes.get("pairwise", {})
    block |= {"pairs": str(folder / "pairs.parquet"), "fold": HELD_OUT_FOLD}
    measuring_plugin = f"{__name__}.{MeasuringPlugin.__name__}"

    values |= changes
    values |= {
        "base_model": str(folder / "base"),
        "output_dir": str(folder / "run"),
        "pairwise": remove_absent(block),
        "plugins": [*values["plugins"], measuring_plugin],
        "logging_steps": 1,
        "save_strategy": "no",
        "save_steps": None,
        "warmup_ratio": None,
        "warmup_steps": WARMUP_STEPS,
        "seed": SEED,
    }

    recipe = folder / "ours.yml"
    recipe.write_text(yaml.safe_dump(remove_absent(values)))
    return recipe


def remove_absent(values: dict) -> dict:
    """Return the keys that have a value."""
    return {key: value for key, value in values.items() if value is not None}


def train_with_ours(folder: Path, changes: dict, recipe: str = RECIPE) -> Measured:
    """Train with a recipe's own code through Axolotl; see write_recipe."""
    do_cli(config=str(write_recipe(folder, recipe, changes)))

    # Axolotl keeps its plugins for itself, and returns nothing.
    for plugin in PluginManager.get_instance().plugins.values():
        if isinstance(plugin, MeasuringPlugin):
            return plugin.measurement.measured
    raise RuntimeError("Axolotl did not load the measuring plugin")
