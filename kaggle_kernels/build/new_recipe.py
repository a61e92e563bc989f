"""`pairwise new NAME --base MODEL`: write a recipe and a spec from what the base model's configuration says."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch
from transformers import AutoTokenizer, PretrainedConfig

from kaggle_kernels.build.memory_fit import BITSANDBYTES
from kaggle_kernels.build.training_plan import (
    TRAINING_GPU_GIB,
    TRAINING_GPUS,
    Serving,
    Training,
    describe_hardware,
    plan_serving,
    plan_training,
)
from preprocess.core.errors import UserError
from preprocess.core.files import atomic_file
from preprocess.model_input import ContractError, Template
from recipes.pairwise.config.chat_template import derive_template, find_template_name
from recipes.pairwise.config.model_checks import build_empty_model, read_config
from recipes.pairwise.config.schema import read_recipe
from recipes.pairwise.config.served_models import why_not_served
from recipes.pairwise.contract import new_contract
from recipes.pairwise.memory.base_model import BaseModel, make_record, read_records, write_records
from recipes.pairwise.memory.measure import measure

NAME = re.compile(r"[a-z0-9]+(_[a-z0-9]+)*")
VERDICTS = ("model_a", "model_b")

RECIPE = """\
# yaml-language-server: $schema=recipe.schema.json
# What:     {base}, head {head}; check the licence of the base model before you publish
# Command:  axolotl train recipes/{name}.yml
# Hardware: {hardware}
# Score:    not measured yet
base_model: {base}
{special_tokens}plugins: [recipes.pairwise.plugin.PairwisePlugin]
pairwise:
  head: {head}
  template: {template}
  budget_tokens: {budget_tokens}
{step}  package: {{quantize: {quantize}, slug: {slug}, licence: other}}

{training}"""
STEP = """\
  pairs_per_step: {pairs}
  hardware: {{gpus: {gpus}, gib: {gib}}}
"""
ADAPTER = """\
adapter: lora
lora_r: 64
lora_alpha: 128
lora_dropout: 0.05
lora_target_modules: [{targets}]
micro_batch_size: {pairs}
num_epochs: 1
learning_rate: 0.0001
lr_scheduler: cosine
warmup_ratio: 0.05
weight_decay: 0.01
max_grad_norm: 1.0
optimizer: adamw_torch_fused
gradient_checkpointing: true
group_by_length: true
save_strategy: steps
save_steps: 100
save_total_limit: 1
bf16: auto
deepspeed: recipes/deepspeed/{deepspeed}.json
"""
EVERY_WEIGHT = """\
micro_batch_size: {pairs}
gradient_accumulation_steps: 2
num_epochs: 1
learning_rate: 0.00005
lr_scheduler: cosine
warmup_ratio: 0.1
weight_decay: 0.01
optimizer: adamw_torch
group_by_length: true
save_strategy: "no"
bf16: auto
"""
SPEC = """\
# yaml-language-server: $schema=../spec.schema.json
# {base}, head {head}, for WSDM.
# python -m kaggle_kernels rehearse {name} --test test.parquet
title: {title}
competition: wsdm
packages: [{{run: {name}, dataset: {slug}, placement: {placement}}}]
tokens_per_batch: {tokens_per_batch}
"""
PAIRS_OF_A_STEP = 64  # over all GPUs


@dataclass(frozen=True)
class NewModel:
    """What the two files say. Without a serving there is no spec."""

    name: str
    base: str
    head: str
    template: Template
    pad_token: str | None  # None: the tokenizer's own
    training: Training
    serving: Serving | None

    @property
    def slug(self) -> str:
        """The Kaggle dataset's."""
        return "pairwise-" + self.name.replace("_", "-")


def write_recipe_and_spec(name: str, base: str, head: str) -> None:
    """Write recipes/NAME.yml and kaggle_kernels/specs/NAME.yml, and print the template.

    Raises:
        UserError: A file is there already, or the base model cannot be trained this way.
    """
    recipe_path = Path("recipes") / f"{name}.yml"
    spec_path = Path("kaggle_kernels/specs") / f"{name}.yml"
    check_name(name, (recipe_path, spec_path))

    config = read_config(base, None)
    model = build_empty_model(config, head)
    base_model = measure(config)
    training = plan_training(base_model, list_linear_names(model), head)

    try:
        tokenizer = AutoTokenizer.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise UserError(f"--base: {base} has no tokenizer that can be read ({error})") from None
    template = derive_template(tokenizer, head, VERDICTS)
    pad_token = choose_pad_token(tokenizer, template)

    # A teacher trains here, though no T4 can serve it.
    serving = None
    reason = why_not_served(config.model_type, head)
    if reason is None:
        serving = plan_serving(base_model, head, training.budget_tokens)
        reason = "no format of it fits two T4s"

    new = NewModel(name, base, head, template, pad_token, training, serving)
    with atomic_file(recipe_path) as temporary:
        temporary.write_text(format_recipe(new), encoding="utf-8")
        check_recipe(temporary, new, tokenizer)
    keep_sizes(base, config, base_model)
    click.echo(f"{recipe_path}: written")

    if serving is None:
        click.echo(f"no spec, a teacher only: {reason}")
    else:
        with atomic_file(spec_path) as temporary:
            temporary.write_text(format_spec(new), encoding="utf-8")
        click.echo(f"{spec_path}: written")

    # To be compared with the base model's own template before a long run.
    parts = [quote(text) for text in asdict(template).values()]
    click.echo(f"template: {' '.join(parts)}")


def check_name(name: str, paths: Sequence[Path]) -> None:
    """Raise UserError where a name is none for a recipe, or taken."""
    if not NAME.fullmatch(name):
        raise UserError(
            f"{name}: expected lower-case letters and digits, joined by _, e.g. qwen3_8b_cls"
        )
    for path in paths:
        if path.exists():
            raise UserError(f"{path}: exists already; remove it, or take another name")


def list_linear_names(model: torch.nn.Module) -> list[str]:
    """List the names of a base model's linear layers, each once, in the model's order."""
    # The layers of a model repeat the same names.
    names = []
    for path, module in model.base_model.named_modules():
        name = path.rpartition(".")[2]
        if isinstance(module, torch.nn.Linear) and name not in names:
            names.append(name)
    return names


def choose_pad_token(tokenizer, template: Template) -> str | None:
    """Choose the token by which shorter rows of a batch are filled up, for a new recipe.

    A row must not end with it: a classifier reads the last token that is no padding.

    Returns:
        The token; None where the tokenizer's own will do.
    """
    # The text at the end of each row: the template's end, or where that is empty, the end of a turn.
    row_end = template.end or template.turn
    if tokenizer.pad_token and not row_end.endswith(tokenizer.pad_token):
        return None

    # Tokens beside the vocabulary, such as <|finetune_right_pad_id|> and <|reserved_special_token_0|>.
    special_tokens = [token.content for token in tokenizer.added_tokens_decoder.values()]
    for word in ("pad", "reserved"):
        for special_token in special_tokens:
            if word in special_token and not row_end.endswith(special_token):
                return special_token
    raise UserError(
        f"--base: {tokenizer.name_or_path} has no pad token and no reserved token; write the recipe by hand, with "
        "special_tokens: {pad_token: …}"
    )


def check_recipe(path: Path, new: NewModel, tokenizer) -> None:
    """Check the recipe that was just written, so that a mistake shows now and not when training starts.

    Raises:
        UserError: A key of the recipe is wrong, or its template does not go with the base model's tokenizer.
    """
    block = read_recipe(path).pairwise

    # Training begins with a contract, in which the tokenizer encodes an example by the template. Only
    # whether that succeeds matters here.
    pad_token = new.pad_token or tokenizer.pad_token
    try:
        new_contract(
            block,
            tokenizer,
            attention="sdpa",
            base_model=new.base,
            revision=None,
            pad_token_id=tokenizer.convert_tokens_to_ids(pad_token),
        )
    except ContractError as error:
        raise UserError(f"{new.name}: {error}") from None


def keep_sizes(base: str, config: PretrainedConfig, base_model: BaseModel) -> None:
    """Keep the sizes of a hub's model in this repository, so that `build` needs no hub.

    A model in a folder needs no record: it is measured whenever its sizes are needed.
    """
    if Path(base).is_dir():
        return
    records = dict(read_records())
    records[base] = make_record(config.to_diff_dict(), base_model)
    write_records(records)


def format_recipe(new: NewModel) -> str:
    """Write the text of the recipe."""
    plan = new.training
    step = ""
    if plan.lora_targets:
        step = STEP.format(pairs=PAIRS_OF_A_STEP, gpus=TRAINING_GPUS, gib=TRAINING_GPU_GIB)
        training_keys = ADAPTER.format(
            targets=", ".join(plan.lora_targets),
            pairs=plan.micro_batch_size,
            deepspeed=plan.deepspeed,
        )
    else:
        training_keys = EVERY_WEIGHT.format(pairs=plan.micro_batch_size)

    # A template that has no name in the project is written out.
    template = find_template_name(new.template, new.head, VERDICTS)
    if template is None:
        parts = [f"{key}: {quote(text)}" for key, text in asdict(new.template).items()]
        template = f"{{{', '.join(parts)}}}"
    special_tokens = ""
    if new.pad_token:
        special_tokens = f"special_tokens: {{pad_token: {quote(new.pad_token)}}}\n"

    return RECIPE.format(
        name=new.name,
        base=new.base,
        head=new.head,
        hardware=describe_hardware(plan),
        special_tokens=special_tokens,
        template=template,
        budget_tokens=plan.budget_tokens,
        step=step,
        quantize=new.serving.quantize if new.serving else "nf4",
        slug=new.slug,
        training=training_keys,
    )


def format_spec(new: NewModel) -> str:
    """Write the text of the spec."""
    text = SPEC.format(
        name=new.name,
        base=new.base,
        head=new.head,
        title=f"Pairwise {new.name.replace('_', ' ').title()}",
        slug=new.slug,
        placement=new.serving.placement,
        tokens_per_batch=new.serving.tokens_per_batch,
    )
    if new.serving.quantize in BITSANDBYTES:
        text += "wheels: pairwise-wheels\n"
    return text


def quote(text: str) -> str:
    """Write a text in quotes, in one line, as JSON and YAML both read it."""
    return json.dumps(text, ensure_ascii=False)
