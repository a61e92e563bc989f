"""The strict schema of a recipe: its `pairwise:` block, what must not stand beside it, and where a run writes.

Nothing here imports torch or Axolotl, so that `python -m recipes.pairwise` answers in a second or two.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from preprocess.core.errors import UserError
from preprocess.core.files import read_yaml
from preprocess.core.problems import in_words, nearest, unknown_key, without_echo
from preprocess.model_input import Template
from recipes.pairwise.config.axolotl_keys import axolotl_problems
from recipes.pairwise.config.templates import NAMES, TemplateName, named_template

SLUG = r"^[a-z0-9]+(-[a-z0-9]+)*$"  # Kaggle's
PATTERNS = {SLUG: "lower-case letters and digits, with single hyphens between them"}
GPTQ_BITS = {"gptq4": 4, "gptq8": 8}
HOW_TO_GET_IT = "accept its licence on the hub and `hf auth login`, or download it and name its folder (--base-model FOLDER)"


class _Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )


# Blocks of a recipe. What stands below a key goes into recipe.schema.json, which editors show.
class TemplateBlock(_Strict):
    """A template spelled out in a recipe; see preprocess.model_input.Template."""

    start: str
    """what stands before a conversation"""
    turn: str
    """a turn, with {prompt}, {response_a} and {response_b} in place; for reward {prompt} and {response}"""
    end: str
    """what stands after the last turn, where a verdict is read"""


class PackageBlock(_Strict):
    """How `python -m postprocess` turns the run into a Kaggle dataset."""

    quantize: Literal["none", "nf4", "int8", "gptq4", "gptq8"] = "none"
    """nf4: 4 bits; int8: 8 bits; gptq4, gptq8: calibrated on pairs, decoders only; none: float16. The head has 16 bits"""
    adapter: Literal["merged", "unmerged", "best"] = "merged"
    """of a LoRA run: base and adapter merged; both apart, the base in nf4; or the one that agrees better with training"""
    tolerance: float = Field(0.05, gt=0, le=1)
    """largest mean difference in probability that is let through"""
    tolerance_log_loss: float = Field(0.01, gt=0)
    """largest log loss that packaging may add, by the upper end of the 95 % interval"""
    tolerance_verdicts: float = Field(0.05, gt=0, le=1)
    """largest share of verdicts that packaging may change"""
    slug: str = Field(pattern=SLUG, min_length=6, max_length=50)
    """the Kaggle dataset's slug, 6 to 50 characters"""
    licence: str = Field("apache-2.0", min_length=1)
    """Kaggle's name of the weights' licence"""

    @model_validator(mode="after")
    def _an_adapter_stays_apart_only_on_nf4(self):
        if self.adapter != "merged" and self.quantize != "nf4":
            raise ValueError(
                f"adapter: {self.adapter} needs quantize: nf4, found quantize: {self.quantize}"
            )
        return self


class DistillBlock(_Strict):
    """How a student learns from teachers: see docs/distillation.md."""

    teachers: dict[str, PositiveFloat] = Field(
        min_length=1, json_schema_extra={"type": ["object", "array"], "items": {"type": "string"}}
    )
    """runs whose labels.parquet is read, by name below outputs/ or by path: a list, or a map to their weights"""
    weight: float = Field(0.9, gt=0, le=1)
    """of the teachers' part of the loss against that of the votes"""
    temperature: float = Field(5.0, gt=0, le=20)
    """softens teachers and student in the teachers' part of the loss"""
    pool: bool = False
    """also train on the pairs file's pool rows, by the teachers' labels alone"""

    @field_validator("teachers", mode="before")
    @classmethod
    def _listed_teachers_weigh_the_same(cls, teachers):
        # A map has weights already.
        if not isinstance(teachers, list):
            return teachers
        if len(set(map(str, teachers))) < len(teachers):
            raise ValueError("a teacher is named twice; give it a weight instead: {NAME: 2}")
        return dict.fromkeys(teachers, 1.0)


class HardwareBlock(_Strict):
    """The GPUs that a recipe is for; `pairwise check` refuses what they cannot hold."""

    gpus: PositiveInt
    """how many GPUs train"""
    gib: PositiveFloat = Field(strict=False)
    """memory of each GPU in GiB"""


class PairwiseBlock(_Strict):
    """The `pairwise:` block of a recipe."""

    # What is trained on, and what the model answers.
    pairs: str = Field("data/pairs.parquet", min_length=1)
    """what to train on; PAIRWISE_PAIRS=FILE overrides it"""
    fold: NonNegativeInt | Literal["all"] = 0
    """the fold to hold out, or all; PAIRWISE_FOLD overrides it"""
    verdicts: tuple[Literal["model_a", "model_b", "tie"], ...] = Field(
        ("model_a", "model_b"), strict=False, json_schema_extra={"minItems": 2, "uniqueItems": True}
    )
    """the order of the logits: two verdicts, or three with tie"""
    head: Literal["score", "label_tokens", "reward"] = "score"
    """score: a classification head; label_tokens: a causal LM's answer tokens; reward: one number for each answer alone"""
    train: bool = True
    """false: the base model is packaged as it is by python -m postprocess"""

    # How a pair becomes a sequence.
    template: TemplateName | TemplateBlock
    """gemma, llama3, chatml, phi4 or bert; or start, turn and end spelled out"""
    budget_tokens: int = Field(ge=64)
    """tokens of a sequence, template included"""
    truncation: Literal["left", "right", "middle"] = "middle"
    """where a text that is too long is cut"""
    orders: Literal["as_given", "random", "both"] = "both"
    """the orders of a pair in training; both stand in one micro-batch"""

    # What makes up a step.
    hardware: HardwareBlock | None = None
    """the GPUs that the recipe is for: {gpus: 8, gib: 80}"""
    pairs_per_step: PositiveInt | None = None
    """pairs of a step over all GPUs: gradient_accumulation_steps follows from it, for any number of GPUs"""

    # What is learnt from beside the votes.
    distill: DistillBlock | None = None
    """learn from the labels of teachers too"""
    tokens_per_micro_batch: int | None = Field(None, ge=64)
    """the most tokens of a micro-batch, padding included: its pairs vary, and micro_batch_size is their mean"""
    padding_free: bool = False
    """no padding: the sequences of a micro-batch stand in one row, and none sees another"""

    # What changes the loss, and the weights that the run ends with.
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """mixes the labels with the uniform distribution"""
    focal_gamma: float = Field(0.0, ge=0, le=10)
    """focal loss: verdicts that the model is sure of count less"""
    r_drop: float = Field(0.0, ge=0, le=100)
    """weight of R-Drop: two passes of a pair, with other dropout, must agree"""
    ema_decay: float = Field(0.0, ge=0, lt=1)
    """the run's weights are a moving average over its steps, e.g. 0.999"""

    # What the packaged model has to have too.
    softcap: bool = False
    """Gemma-2's soft cap of attention logits; needs eager or flash_attention_2"""
    package: PackageBlock
    """slug of the Kaggle dataset, and how the model is quantised"""

    @field_validator("fold", mode="before")
    @classmethod
    def _fold_is_a_number_or_all(cls, fold):
        # To Python, True is the integer 1.
        is_number = isinstance(fold, int) and not isinstance(fold, bool)
        is_fold = is_number and fold >= 0
        if fold != "all" and not is_fold:
            raise ValueError("expected a fold's number or all")
        return fold

    @field_validator("verdicts")
    @classmethod
    def _verdicts_are_two_or_three(cls, verdicts):
        if sorted(verdicts) not in (["model_a", "model_b"], ["model_a", "model_b", "tie"]):
            raise ValueError("expected model_a and model_b, with or without tie, each once")
        return verdicts

    @field_validator("template", mode="before")
    @classmethod
    def _template_is_known(cls, template):
        if not isinstance(template, dict | TemplateBlock) and template not in NAMES:
            match = nearest(template, NAMES)
            meant = f" (did you mean {match}?)" if match else ""
            raise ValueError(
                f"expected one of {', '.join(NAMES)}, or start, turn and end spelled out{meant}"
            )
        return template

    @model_validator(mode="after")
    def _a_template_spelled_out_has_each_place_once(self):
        if not isinstance(self.template, TemplateBlock):
            return self

        places = ["{prompt}", "{response_a}", "{response_b}"]
        if self.head == "reward":
            places = ["{prompt}", "{response}"]
        for place in places:
            if self.template.turn.count(place) != 1:
                raise ValueError(
                    f"template.turn: expected {', '.join(places)}, each once, found {self.template.turn!r}"
                )
        return self

    @model_validator(mode="after")
    def _no_key_contradicts_another(self):
        if self.head == "reward" and "tie" in self.verdicts:
            raise ValueError(
                "verdicts: a reward model cannot answer tie, as it gives each response a number; leave tie out: in "
                "training, half of a tie counts for each response"
            )
        if self.distill and not self.train:
            raise ValueError(
                "distill: with train: false nothing is trained, so no student learns from teachers; remove one of the two"
            )
        if self.head == "reward" and "orders" in self.model_fields_set:
            raise ValueError(
                "orders: a reward model reads each response alone, so that their order makes no difference; "
                "remove the key"
            )
        if self.padding_free and self.r_drop > 0:
            raise ValueError(
                "padding_free: R-Drop repeats each row of a batch, but without padding a batch is a single row; "
                "remove padding_free or r_drop"
            )
        return self

    @model_validator(mode="after")
    def _an_encoder_has_no_gptq_and_no_answer(self):
        # Of the templates that have a name, only this one is for encoders.
        if self.template != "bert":
            return self
        if self.package.quantize in GPTQ_BITS:
            raise ValueError(
                f"package.quantize: {self.package.quantize} is for decoders, but the template bert is for encoders; set "
                "int8 or none"
            )
        if self.head == "label_tokens":
            raise ValueError(
                "template: bert is for encoders, which predict no next token, so that label_tokens finds no answer; name "
                "the template of a chat model, or set head: score"
            )
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
    """Read and check a recipe. PAIRWISE_FOLD and PAIRWISE_PAIRS of the environment replace its fold and pairs.

    Raises:
        UserError: The file is missing or wrong. One message names all of its problems.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such recipe")
    values = read_yaml(path)
    problems = recipe_problems(values)
    if problems:
        raise UserError(f"{path}: " + "; ".join(problems))

    # From here on nothing can be wrong with the keys.
    block = apply_environment(PairwiseBlock.model_validate(values.pop("pairwise")))
    return Recipe(path, values, block, run_folder(values.get("output_dir"), path))


class PairwiseArgs(BaseModel):
    """What Axolotl adds to its own schema for this plugin: the block, checked here and passed on as it is."""

    pairwise: dict


# The keys of the block that hold a block themselves.
INNER_BLOCKS: dict[str, type[BaseModel]] = {
    "package": PackageBlock,
    "template": TemplateBlock,
    "distill": DistillBlock,
    "hardware": HardwareBlock,
}


def recipe_problems(values: dict) -> list[str]:
    """What is wrong with a recipe's parsed YAML, one sentence a problem, each naming its key and the fix."""
    problems = axolotl_problems(values)
    if "pairwise" not in values:
        return [*problems, "pairwise: missing; a recipe needs this block"]
    return problems + pairwise_problems(values["pairwise"])


def pairwise_problems(block: object) -> list[str]:
    """Return what is wrong with a `pairwise:` block, one sentence a problem."""
    try:
        PairwiseBlock.model_validate(block)
    except ValidationError as error:
        pydantic_errors = error.errors()
    else:
        return []

    known_keys = list(PairwiseBlock.model_fields)
    for inner_block in INNER_BLOCKS.values():
        known_keys += inner_block.model_fields

    sentences = []
    # A mistyped key is also reported as missing, which without_echo drops.
    for problem in without_echo(pydantic_errors, known_keys):
        # `template` is a name or a block. Where the block has a mistake, pydantic also reports that it
        # is none of the names, at the path ("template", "literal[…]").
        is_about_names = any(str(part).startswith("literal[") for part in problem["loc"])
        if not is_about_names:
            sentences.append(explain(problem))
    return sentences


def explain(problem: dict) -> str:
    """Turn one of pydantic's errors into a line for the user.

    There are four kinds, in the order of the code below:

        pairwise.hed: unknown key; did you mean head?
        pairwise.package.slug: missing; add it: the Kaggle dataset's slug, 6 to 50 characters
        pairwise.package.adapter: unmerged needs quantize: nf4, found quantize: int8
        pairwise.budget_tokens: expected a number of at least 64, found 1

    Of the error, `loc` is the path to the value, such as ("package", "slug"), and `input` what the recipe has there.
    """
    # A template may be a name or a block. If it is a block, pydantic puts that class's name into the path.
    path = [str(part) for part in problem["loc"] if part != "TemplateBlock"]
    key = ".".join(["pairwise", *path])

    # Beside the key stand those of the block inside, or of the whole block.
    known_fields = PairwiseBlock.model_fields
    if len(path) > 1 and path[0] in INNER_BLOCKS:
        known_fields = INNER_BLOCKS[path[0]].model_fields

    if problem["type"] == "extra_forbidden":
        return f"{key}: {unknown_key(path[-1], known_fields)}"
    if problem["type"] == "missing":
        return f"{key}: missing; add it: {known_fields[path[-1]].description}"

    # Our validators of a whole block, such as `distill`, begin their message with the key inside it that is
    # wrong. pydantic puts "Value error, " before that.
    is_from_whole_block = problem["type"] == "value_error" and isinstance(problem["input"], dict)
    if is_from_whole_block:
        message = problem["msg"].removeprefix("Value error, ")
        return f"{key}.{message}"

    # What is left is a value of the wrong kind or size.
    return f"{key}: {in_words(problem, PATTERNS)}"


def apply_environment(block: PairwiseBlock) -> PairwiseBlock:
    """Return the block with what the environment changes in it."""
    return block.model_copy(update=read_environment())


def read_environment() -> dict[str, object]:
    """Read which keys of the `pairwise` block the environment changes, and to which values.

    PAIRWISE_FOLD=2 changes `fold`, PAIRWISE_PAIRS=FILE changes `pairs`. One training can so run on each
    fold without a recipe for each.

    Raises:
        UserError: PAIRWISE_FOLD is neither a number nor all.
    """
    changes: dict[str, object] = {}
    fold = os.environ.get("PAIRWISE_FOLD")
    if fold == "all":
        changes["fold"] = fold
    elif fold:
        if not (fold.isascii() and fold.isdecimal()):
            raise UserError(f"PAIRWISE_FOLD={fold}: expected a fold's number or all")
        changes["fold"] = int(fold)

    # Whether the file exists is seen where it is read.
    pairs = os.environ.get("PAIRWISE_PAIRS")
    if pairs:
        changes["pairs"] = pairs
    return changes


def run_folder(output_dir: str | None, recipe: Path) -> Path:
    """Return the folder of a run: output_dir, by default outputs/NAME, or below it fold-2 with PAIRWISE_FOLD=2."""
    folder = Path(output_dir) if output_dir else Path("outputs") / recipe.stem
    fold = os.environ.get("PAIRWISE_FOLD", "")
    if fold.isdecimal():
        return folder / f"fold-{fold}"
    return folder
