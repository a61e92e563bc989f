"""Trained runs for the tests of postprocess, built without training: a tiny base, an adapter with random A, B and head.

A run is of one head (score, reward, label_tokens), and of a base in 16 bits or, as QLoRA trains it, in nf4.
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch
import yaml
from click.testing import CliRunner, Result
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BitsAndBytesConfig

from kaggle_kernels.runtime.models.model import CLASSES
from kaggle_kernels.runtime.models.scoring import ORDERS, score
from kaggle_kernels.runtime.package import read_tokenizer
from postprocess.__main__ import main
from preprocess import model_input
from recipes.pairwise.config.axolotl_keys import PLUGIN
from recipes.pairwise.config.schema import PairwiseBlock
from recipes.pairwise.contract import new_contract, write_contract
from recipes.pairwise.tracking.metrics import predictions
from tests import tiny

TEMPLATES = {"llama": "llama3", "qwen2": "chatml", **dict.fromkeys(tiny.ENCODERS, "bert")}  # gemma for the others
BUDGETS = {"llama": 256, "qwen2": 192}  # 128 for the others
TARGETS = {
    "bert": ["query", "value", "dense"],
    "modernbert": ["Wqkv", "Wi", "Wo"],
    "deberta-v2": ["query_proj", "value_proj"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
}
HEADS = {"modernbert": ["head"], "deberta-v2": ["pooler"]}  # what their heads have beside a classifier
DECODER_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROWS = 24
FEW_ROWS = {"tolerance_log_loss": 1.0, "tolerance_verdicts": 1.0}  # so few decide nothing finer
TWO = ("model_a", "model_b")
NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "float32",
    "bnb_4bit_quant_storage": "bfloat16",
    "llm_int8_skip_modules": ["score"],
}


@dataclass(frozen=True)
class Made:
    """A run on disk and the model that training would have ended with, in memory."""

    recipe: Path
    folder: Path
    base: Path
    model: torch.nn.Module

    def contract(self):
        """The run's contract."""
        return model_input.read_contract(self.folder)


def pairs_file(path: Path, rows: int = ROWS, training_rows: int = 0) -> pl.DataFrame:
    """Write a pairs.parquet with generated pairs of fold 0, and after them `training_rows` of fold 1; those of fold 0."""
    raw = tiny.pairs(rows + training_rows, seed=11)
    turns = [pl.concat_list(name).alias(name) for name in ("prompt", "response_a", "response_b")]
    shares = [(pl.col("winner") == name).cast(pl.Float32).alias(f"p_{name}") for name in model_input.VERDICTS]
    others = {
        "source": pl.lit("tiny"),
        "group": (pl.int_range(pl.len()) - 3).clip(0),  # the first four rows are one group
        "fold": (pl.int_range(pl.len()) >= rows).cast(pl.Int8),
        "weight": pl.lit(1, pl.Float32),
    }
    frame = raw.drop("model_a", "model_b").with_columns(*turns, *shares, **others)
    frame.write_parquet(path)
    return frame[:rows]


def recipe_file(folder: Path, base: Path, kind: str, verdicts: tuple[str, ...], head: str, keys: dict, **package) -> Path:
    """Write a recipe for a run in folder/run; `keys` are Axolotl's."""
    block = {
        "pairs": str(folder / "pairs.parquet"),
        "template": TEMPLATES.get(kind, "gemma"),
        "budget_tokens": BUDGETS.get(kind, 128) + 64 * (head == "label_tokens"),
        "verdicts": list(verdicts),
        "head": head,
        "package": {"slug": "tiny-package", **FEW_ROWS, **package},
    }
    path = folder / "recipe.yml"
    values = {"base_model": str(base), "plugins": [PLUGIN], "output_dir": str(folder / "run"), "pairwise": block, **keys}
    path.write_text(yaml.safe_dump(values))
    return path


def make(
    folder: Path,
    base: Path,
    kind: str,
    *,
    verdicts: tuple = TWO,
    head: str = "score",
    full: bool = False,
    qlora: bool = False,
    lora: dict | None = None,
    rows: int = ROWS,
    training_rows: int = 0,
    seed: int = 1,
    **package,
) -> Made:
    """A run of the base model of `kind`, as training leaves it: LoRA by default, QLoRA, or a full fine-tune."""
    keys = {} if full else {"adapter": "qlora", "load_in_4bit": True} if qlora else {"adapter": "lora"}
    if keys:
        keys["lora_target_modules"] = TARGETS.get(kind, DECODER_TARGETS)
    recipe = recipe_file(folder, base, kind, verdicts, head, keys, **package)
    block = PairwiseBlock.model_validate(yaml.safe_load(recipe.read_text())["pairwise"])
    run_folder = folder / "run"
    torch.manual_seed(seed)
    model = base_model(base, kind, head, len(verdicts), qlora)
    if not full:
        model = with_adapter(model, kind, head, **(lora or {}))
    model.save_pretrained(run_folder)
    if qlora:
        (run_folder / "config.json").write_text(json.dumps({"dtype": "float32", "quantization_config": NF4}))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(run_folder)  # as training does: what a class of transformers made of the base's file
    contract = new_contract(block, tokenizer, attention="sdpa", base_model=str(base), revision=None, pad_token_id=0)
    write_contract(run_folder, contract, recipe)
    set_json(run_folder / "metrics.json", fold=0, rows_were_trained_on=False)
    write_predictions(run_folder, model, pairs_file(folder / "pairs.parquet", rows, training_rows))
    return Made(recipe, run_folder, base, model)


def invoke(recipe: Path, *options: str) -> Result:
    """The command `python -m postprocess RECIPE`."""
    return CliRunner().invoke(main, [str(recipe), *options])


def succeed(recipe: Path, *options: str) -> str:
    """What the command prints, which must end well."""
    result = invoke(recipe, *options)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def refuse(recipe: Path, *options: str) -> str:
    """The one line of error of the command, which must end with exit code 2."""
    result = invoke(recipe, *options)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1), (result.output, result.exception)
    return result.stderr


def made_stages(printed: str) -> list[str]:
    """The stages that the command has made, by what it printed."""
    return re.findall(r"^(\S+) +[\d.]+ s   /", printed, re.MULTILINE)


def current_stages(printed: str) -> list[str]:
    """The stages that were up to date, by what the command printed."""
    return re.findall(r"^(\S+) +up to date ", printed, re.MULTILINE)


def set_json(file: Path, **values) -> None:
    """Change keys of a JSON file, or write them where there is none."""
    before = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(before | values))


def change_tensors(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Rewrite a safetensors file after `change(tensors)`, which changes the dictionary."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def with_json(name: str, **values) -> Callable[[Made], object]:
    """A damage to a run: other values in one of its files."""
    return lambda made: set_json(made.folder / name, **values)


def in_adapter(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Made], object]:
    """A damage to a run: its adapter's tensors after `change(tensors)`."""
    return lambda made: change_tensors(made.folder / "adapter_model.safetensors", change)


def change_base(made: Made, folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """Let the run be one of a changed copy of its base, which is written to `folder`."""
    shutil.copytree(made.base, folder)
    change_tensors(folder / "model.safetensors", change)
    set_base(made, folder)
    return folder


def set_base(made: Made, base: Path) -> None:
    """Let the run be one of another base model, everywhere that its name stands."""
    for file in (made.recipe, made.folder / "contract.json", made.folder / "adapter_config.json"):
        text = file.read_text()
        assert str(made.base) in text
        file.write_text(text.replace(str(made.base), str(base)))


def base_model(base: Path, kind: str, head: str, verdicts: int, qlora: bool = False) -> torch.nn.Module:
    """The base with its head, random and large enough to have opinions, or a causal LM's own."""
    options = {"quantization_config": BitsAndBytesConfig(**NF4), "device_map": {"": "cpu"}} if qlora else {}
    if head != "label_tokens":
        options["num_labels"] = 1 if head == "reward" else verdicts
    model = CLASSES[head].from_pretrained(base, pad_token_id=0, dtype=torch.float32, **options)
    if kind == "gemma2":
        model.config.attn_logit_softcapping = None
    own_head = model.classifier if kind in tiny.ENCODERS else getattr(model, "score", None)
    with torch.no_grad():
        for parameter in own_head.parameters() if own_head else ():
            parameter.normal_(0, 0.15)
    return model.eval()


def with_adapter(model: torch.nn.Module, kind: str, head: str, **lora) -> PeftModel:
    """The model with a LoRA adapter whose A and B are random and not zero."""
    settings = {"r": 8, "lora_alpha": 16, "target_modules": TARGETS.get(kind, DECODER_TARGETS)} | lora
    settings["modules_to_save"] = [*settings.get("modules_to_save", []), *HEADS.get(kind, [])]
    task = "CAUSAL_LM" if head == "label_tokens" else "SEQ_CLS"
    model = get_peft_model(model, LoraConfig(task_type=task, **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "lora_B" in name or "lora_embedding" in name:
                parameter.normal_(0, 0.05)
            if ".modules_to_save." in name:
                parameter.mul_(1.1)
            if "lora_magnitude_vector" in name:
                parameter.mul_(torch.empty_like(parameter).uniform_(0.8, 1.2))
    return model.eval()


def write_predictions(run_folder: Path, model: torch.nn.Module, frame: pl.DataFrame) -> None:
    """Write predictions.parquet as training does, from the model in memory."""
    contract = model_input.read_contract(run_folder)
    pairs = [model_input.pair_from_row(row) for row in frame.iter_rows(named=True)]
    found = score(model, model_input, read_tokenizer(run_folder), contract, pairs)
    both = np.array([[found[pair.id][order] for order in ORDERS] for pair in pairs])
    predictions([pair.id for pair in pairs], both, contract.verdicts, frame).write_parquet(run_folder / "predictions.parquet")
