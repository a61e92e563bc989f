"""The strict schema of a recipe: its `pairwise:` block, what must not stand beside it, and where a run writes.

Nothing here imports torch or Axolotl, so that `python -m recipes.pairwise` answers in a second or two.
"""

import difflib
import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from preprocess.errors import UserError
from preprocess.files import read_json
from preprocess.model_input import Template
from recipes.pairwise.templates import NAMES, named_template

PLUGIN = "recipes.pairwise.plugin.PairwisePlugin"
NUMBERS = ("micro_batch_size", "gradient_accumulation_steps", "num_epochs", "learning_rate")
RECIPE_SCHEMA = Path(__file__).parents[1] / "recipe.schema.json"
REFUSED = {
    "reward_model": "it forces one label and its evaluation crashes; remove it, the `pairwise` block sets the head",
    "trust_remote_code": "it runs code from the hub and loads the wrong class; use a model that transformers knows",
    "sample_packing": "it pools one token for a whole packed row; remove it, rows are batched by length instead",
    "dataloader_drop_last": "it drops validation rows too, whose predictions are then missing; remove it",
    "lora_target_linear": "it puts the head under LoRA twice; list the layers in lora_target_modules",
}

SDPA_DROPS_SOFTCAP = (
    "attn_implementation: sdpa drops the soft cap without a word; use eager or flash_attention_2, or softcap: false"
)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TemplateBlock(_Strict):
    """A template spelled out in a recipe; see preprocess.model_input.Template."""

    start: str = Field(description="what stands before a conversation")
    turn: str = Field(
        description="a turn, with {prompt}, {response_a} and {response_b} in place; for reward {prompt} and {response}"
    )
    end: str = Field(description="what stands after the last turn, where a verdict is read")


class PackageBlock(_Strict):
    """How `python -m postprocess` turns the run into a Kaggle dataset."""

    quantize: Literal["none", "nf4", "int8"] = Field(
        "none", description="nf4 (4 bits), int8 (8 bits), or none: float16. The head is never quantised"
    )
    adapter: Literal["merged", "unmerged", "best"] = Field(
        "merged",
        description="what is packaged of a LoRA run: base and adapter merged; both as they are, the base in nf4; or whichever "
        "of the two agrees better with training",
    )
    tolerance: float = Field(0.05, gt=0, le=1, description="largest mean difference in probability that is let through")
    slug: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{4,48}[a-z0-9]$", description="the Kaggle dataset's slug, 6 to 50 characters")
    licence: str = Field("apache-2.0", description="Kaggle's name of the weights' licence")

    @model_validator(mode="after")
    def _an_adapter_stays_apart_only_on_nf4(self):
        if self.adapter != "merged" and self.quantize != "nf4":
            raise ValueError(f"adapter: {self.adapter} needs quantize: nf4, found quantize: {self.quantize}")
        return self


class PairwiseBlock(_Strict):
    """The `pairwise:` block of a recipe."""

    pairs: str = Field("data/pairs.parquet", description="what to train on; PAIRWISE_PAIRS=FILE overrides it")
    fold: int | str = Field(0, description="the fold to hold out, or all; PAIRWISE_FOLD overrides it")
    verdicts: tuple[Literal["model_a", "model_b", "tie"], ...] = Field(
        ("model_a", "model_b"), description="the order of the logits: two verdicts, or three with tie"
    )
    head: Literal["score", "label_tokens", "reward"] = Field(
        "score",
        description="score: a classification head on prompt and both answers; label_tokens: the answer tokens of a causal LM; "
        "reward: one number for each answer alone (Bradley-Terry)",
    )
    train: bool = Field(True, description="false: the base model is packaged as it is by python -m postprocess")
    template: str | TemplateBlock = Field(description="gemma, llama3, chatml or bert; or start, turn and end spelled out")
    budget_tokens: int = Field(ge=64, description="tokens of a sequence, template included")
    truncation: Literal["left", "right", "middle"] = Field("middle", description="where a text that is too long is cut")
    orders: Literal["as_given", "random", "both"] = Field(
        "both", description="the orders of a pair in training; both stand in one micro-batch"
    )
    loss: Literal["cross_entropy"] = Field(
        "cross_entropy",
        description="on soft labels, rows weighted; label_tokens learns the likeliest verdict, every row counting the same",
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="mixes the labels with the uniform distribution")
    softcap: bool = Field(False, description="Gemma-2's soft cap of attention logits; needs eager or flash_attention_2")
    package: PackageBlock

    @field_validator("fold")
    @classmethod
    def _fold_is_a_number_or_all(cls, fold):
        if fold != "all" and (isinstance(fold, str) or fold < 0):
            raise ValueError("expected a fold's number or all")
        return fold

    @field_validator("verdicts")
    @classmethod
    def _verdicts_are_two_or_three(cls, verdicts):
        if sorted(verdicts) not in (["model_a", "model_b"], ["model_a", "model_b", "tie"]):
            raise ValueError("expected model_a and model_b, with or without tie, each once")
        return verdicts

    @field_validator("template")
    @classmethod
    def _template_is_known(cls, template):
        if isinstance(template, str) and template not in NAMES:
            raise ValueError(f"expected one of {', '.join(NAMES)}, or start, turn and end spelled out")
        return template

    @model_validator(mode="after")
    def _the_head_suits_the_rest(self):
        if self.head == "reward" and "tie" in self.verdicts:
            raise ValueError("verdicts: a reward model tells no ties apart; leave out tie, half of a tie goes to each side")
        if self.head == "reward" and "orders" in self.model_fields_set:
            raise ValueError("orders: a reward model sees each answer alone, its orders are the same; remove the key")
        if self.head == "label_tokens" and self.template == "bert":
            raise ValueError("template: bert has no answer to predict; label_tokens needs gemma, llama3 or chatml")
        if self.head == "label_tokens" and self.label_smoothing:
            raise ValueError("label_smoothing: Axolotl's causal trainer has none; remove the key")
        return self

    def resolved_template(self) -> Template:
        """The template that the block names or spells out."""
        if isinstance(self.template, str):
            return named_template(self.template, self.head, self.verdicts)
        return Template(self.template.start, self.template.turn, self.template.end)


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. `axolotl` holds every key but `pairwise`; the environment's overrides are applied."""

    path: Path
    axolotl: dict
    pairwise: PairwiseBlock
    run_folder: Path


def read_recipe(path: Path | str) -> Recipe:
    """Read and check a recipe; every problem found is in one UserError. PAIRWISE_FOLD and PAIRWISE_PAIRS apply."""
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe") from None
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected keys and values, found {type(values).__name__}")
    problems = recipe_problems(values)
    if problems:
        raise UserError(f"{path}: " + "; ".join(problems))
    block = apply_environment(PairwiseBlock.model_validate(values.pop("pairwise")))
    return Recipe(path, values, block, run_folder(values.get("output_dir"), path))


class PairwiseArgs(BaseModel):
    """What Axolotl adds to its own schema for this plugin: the block, checked here and passed on as it is."""

    pairwise: dict


def check_run(cfg: dict, recipe: Path) -> PairwiseBlock:
    """The block of the run that Axolotl is about to start. `cfg` is the recipe with the command line's overrides.

    Unknown keys are looked for in the file: Axolotl adds keys of its own to `cfg`.
    """
    problems = [f"{key}: refused, {why}" for key, why in REFUSED.items() if cfg.get(key)]
    if recipe.is_file():
        overridden = {key: cfg.get(key) for key in (*REFUSED, "attn_implementation", "base_model")}
        problems = recipe_problems(yaml.safe_load(recipe.read_text(encoding="utf-8")) | overridden)
    if problems:
        raise UserError(f"{recipe}: " + "; ".join(problems))
    return PairwiseBlock.model_validate(dict(cfg["pairwise"]))


@functools.cache
def known_keys() -> tuple[str, ...]:
    """The keys that may stand at the top of a recipe: Axolotl's and `pairwise`, read from recipe.schema.json."""
    return tuple(read_json(RECIPE_SCHEMA)["properties"])


def recipe_problems(values: dict) -> list[str]:
    """What is wrong with a recipe's parsed YAML, one sentence a problem, each naming its key and the fix."""
    problems = [f"{key}: refused, {why}" for key, why in REFUSED.items() if values.get(key)]
    for key in values:
        if key not in known_keys():
            problems.append(f"{key}: unknown key{_nearest(key, known_keys())}")
    problems += run_problems(values)
    quantising = values.get("bnb_config_kwargs")
    skipped = quantising.get("llm_int8_skip_modules") if isinstance(quantising, dict) else None
    block = values.get("pairwise")
    head = "lm_head" if isinstance(block, dict) and block.get("head") == "label_tokens" else "score"
    if skipped is not None and (not isinstance(skipped, list) or head not in skipped):
        problems.append(
            f"bnb_config_kwargs.llm_int8_skip_modules: it replaces the default list, so the head would be quantised; add {head}"
        )
    if "pairwise" not in values:
        return [*problems, "pairwise: missing; a recipe needs this block"]
    return problems + pairwise_problems(values["pairwise"])


def run_problems(values: dict) -> list[str]:
    """What is wrong with keys that every run needs; Axolotl checks the rest when it starts."""
    problems = []
    if not isinstance(values.get("base_model"), str) or not values["base_model"]:
        problems.append(f"base_model: expected a model or a folder, found {values.get('base_model')!r}")
    plugins = values.get("plugins")
    if not isinstance(plugins, list) or PLUGIN not in plugins:
        problems.append(f"plugins: without {PLUGIN} Axolotl would train something else; add it")
    if not isinstance(values.get("output_dir") or "", str):
        problems.append(f"output_dir: expected a folder, found {values['output_dir']!r}")
    for key in NUMBERS:
        value = values.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            problems.append(f"{key}: expected a number above 0, found {value!r}")
    block = values.get("pairwise")
    if not isinstance(block, dict):
        return problems
    if block.get("softcap") and values.get("attn_implementation") == "sdpa":
        problems.append(SDPA_DROPS_SOFTCAP)
    kept_apart = isinstance(block.get("package"), dict) and block["package"].get("adapter", "merged") != "merged"
    if kept_apart and values.get("adapter") not in ("lora", "qlora"):
        problems.append("pairwise.package.adapter: the run has no adapter; remove the key, or set adapter: lora or qlora")
    if block.get("train") is False and values.get("adapter"):
        problems.append("adapter: nothing is trained with pairwise.train: false; remove the key")
    return problems


def pairwise_problems(block: object) -> list[str]:
    """What is wrong with a `pairwise:` block, one sentence a problem."""
    try:
        PairwiseBlock.model_validate(block)
    except ValidationError as error:
        spelled_out = any(
            "TemplateBlock" in problem["loc"] and isinstance(block["template"], dict) for problem in error.errors()
        )
        not_meant = ("template", "str") if spelled_out else ("template", "TemplateBlock")
        return [_explain(problem) for problem in error.errors() if problem["loc"][:2] != not_meant]
    return []


def _explain(problem: dict) -> str:
    where = [str(part) for part in problem["loc"] if part not in ("str", "int", "TemplateBlock")]
    key = ".".join(["pairwise", *where])
    if problem["type"] == "extra_forbidden":
        known = PackageBlock if where[:1] == ["package"] else TemplateBlock if where[:1] == ["template"] else PairwiseBlock
        return f"{key}: unknown key{_nearest(where[-1], known.model_fields)}"
    if problem["type"] == "missing":
        return f"{key}: missing"
    message = problem["msg"].removeprefix("Value error, ")
    if isinstance(problem["input"], dict):  # of the block as a whole: the message begins with the key
        return f"{key}.{message}"
    return f"{key}: {message}, found {problem['input']!r}"


def _nearest(key: str, known) -> str:
    match = difflib.get_close_matches(str(key), list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]}?" if match else "; remove it"


def apply_environment(block: PairwiseBlock) -> PairwiseBlock:
    """The block with PAIRWISE_FOLD (a number or all) and PAIRWISE_PAIRS (a file) in place of its own."""
    changes: dict = {}
    if fold := os.environ.get("PAIRWISE_FOLD"):
        if fold != "all" and not (fold.isascii() and fold.isdecimal()):
            raise UserError(f"PAIRWISE_FOLD={fold}: expected a fold's number or all")
        changes["fold"] = fold if fold == "all" else int(fold)
    if pairs := os.environ.get("PAIRWISE_PAIRS"):
        changes["pairs"] = pairs
    return block.model_copy(update=changes)


def run_folder(output_dir: str | None, recipe: Path) -> Path:
    """Where a run writes: output_dir, by default outputs/STEM; a fold numbered by PAIRWISE_FOLD in fold-k below it."""
    folder = Path(output_dir) if output_dir else Path("outputs") / recipe.stem
    fold = os.environ.get("PAIRWISE_FOLD", "")
    return folder / f"fold-{fold}" if fold.isdecimal() else folder
