"""What is wrong with Axolotl's keys in a recipe, told before Axolotl starts: it takes a minute to say so, in a traceback.

Types, allowed values and ranges are those of recipe.schema.json, which editors read too; what one key says of another is
checked here. Nothing here imports torch or Axolotl.
"""

import functools
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from jsonschema import Draft7Validator

from preprocess.core.files import read_json
from preprocess.core.problems import hint, nearest, unknown_key

PLUGIN = "recipes.pairwise.plugin.PairwisePlugin"
RECIPE_SCHEMA = Path(__file__).parents[2] / "recipe.schema.json"
REFUSED = {
    "reward_model": "it forces one label and its evaluation crashes; remove it, the `pairwise` block sets the head",
    "trust_remote_code": "it runs code from the hub and loads the wrong class; use a model that transformers knows",
    "sample_packing": "it pools one token for a whole packed row; remove it, rows are batched by length instead",
    "dataloader_drop_last": "it drops validation rows too, whose predictions are then missing; remove it",
    "lora_target_linear": "it puts the head under LoRA twice; list the layers in lora_target_modules",
    "process_reward_model": "it labels steps, not answers; remove it, the `pairwise` block sets the head",
    "rl": "the `pairwise` block sets the loss; remove it",
    "lora_mlp_kernel": "it takes other models than ours and stops the run; remove it",
    "lora_qkv_kernel": "it takes other models than ours and stops the run; remove it",
    "lora_o_kernel": "it takes other models than ours and stops the run; remove it",
    "lora_embedding_kernel": "it takes other models than ours and stops the run; remove it",
    "gptq": "the head would not be trained; use adapter: qlora with load_in_4bit: true",
    "wandb_log_model": "it uploads gigabytes; remove it, a tracked run refers to its weights where they are, with checksums",
    "comet_api_key": "a file is no place for a secret; remove it, and set COMET_API_KEY in the environment",
}
SET_BY_THE_BLOCK = {  # keys that are set whatever the recipe says, by the plugin or by Axolotl: a value here would mean nothing
    "num_labels": "pairwise.verdicts and pairwise.head",
    "sequence_len": "pairwise.budget_tokens",
    "datasets": "pairwise.pairs",
    "test_datasets": "pairwise.pairs and pairwise.fold",
    "val_set_size": "pairwise.fold",
    "model_type": "pairwise.head",
    "use_wandb": "wandb_project",
}
LIMITS = {  # JSON Schema's words for what a number may be
    "micro_batch_size": {"exclusiveMinimum": 0},
    "gradient_accumulation_steps": {"exclusiveMinimum": 0},
    "num_epochs": {"exclusiveMinimum": 0},
    "learning_rate": {"exclusiveMinimum": 0},
    "max_steps": {"minimum": 1},
    "warmup_ratio": {"minimum": 0, "maximum": 1},
    "warmup_steps": {"minimum": 0},
    "weight_decay": {"minimum": 0},
    "max_grad_norm": {"minimum": 0},
    "lora_r": {"minimum": 1},
    "lora_alpha": {"minimum": 1},
    "lora_dropout": {"minimum": 0, "exclusiveMaximum": 1},
    "seed": {"minimum": 0},
}
SDPA_DROPS_SOFTCAP = (
    "attn_implementation: sdpa drops the soft cap without a word; use eager or flash_attention_2, or softcap: false"
)
MOST_WORDS = 12  # of a key that a line lists
KINDS = {
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "boolean": "true or false",
    "array": "a list",
    "object": "keys and values",
}


@functools.cache
def schema() -> dict:
    """recipe.schema.json."""
    return read_json(RECIPE_SCHEMA)


@functools.cache
def validator() -> Draft7Validator:
    """Checks Axolotl's keys by recipe.schema.json; the `pairwise` block has a check of its own, with better words."""
    whole = schema()
    open_keys = {"additionalProperties": True, "required": []}
    return Draft7Validator(whole | open_keys | {"properties": whole["properties"] | {"pairwise": {}}})


def axolotl_problems(values: dict) -> list[str]:
    """What is wrong with a recipe's parsed YAML but for its `pairwise` block, one sentence a problem with key and fix."""
    told = {key: f"refused, {why}" for key, why in REFUSED.items() if values.get(key)}
    told |= {key: f"refused, {by} decides that; remove it" for key, by in SET_BY_THE_BLOCK.items() if key in values}
    told |= {key: unknown_key(key, schema()["properties"]) for key in values if key not in schema()["properties"]}
    if not isinstance(values.get("base_model"), str) or not values["base_model"]:
        told["base_model"] = f"expected a model or a folder, found {values.get('base_model')!r}"
    plugins = values.get("plugins")
    if not isinstance(plugins, list) or PLUGIN not in plugins:
        told["plugins"] = f"without {PLUGIN} Axolotl would train something else; add it"
    rest = {key: value for key, value in values.items() if key not in told and (key not in REFUSED or value)}
    by_key = [f"{key}: {sentence}" for key, sentence in told.items()]
    return [*by_key, *value_problems(rest), *adapter_problems(values), *head_problems(values), *wandb_problems(values)]


def value_problems(values: dict) -> Iterator[str]:
    """Values of another type than Axolotl's, beyond what they may be, or not finite."""
    for error in validator().iter_errors(values):
        where = ".".join(map(str, error.absolute_path))
        if error.validator == "additionalProperties":
            known = error.schema["properties"]
            yield from (f"{where}.{key}: {unknown_key(key, known)}" for key in error.instance if key not in known)
        else:
            yield f"{where}: expected {expected(error.schema)}, found {error.instance!r}{meant(error)}"
    for key, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{key}: expected a number, found {value!r}"


def expected(part: Mapping) -> str:
    """What a part of the schema asks for, in words."""
    if "$ref" in part:
        return expected(schema()["definitions"][part["$ref"].rpartition("/")[2]])
    if "enum" in part:
        few = part["enum"][:MOST_WORDS]
        more = f", … ({len(part['enum'])} in all: recipes/{RECIPE_SCHEMA.name})" if len(few) < len(part["enum"]) else ""
        return "one of " + ", ".join(map(str, few)) + more
    if "const" in part:
        return json.dumps(part["const"])
    for several in ("anyOf", "oneOf", "allOf"):
        if several in part:
            return " or ".join(dict.fromkeys(expected(option) for option in part[several]))
    limits = {"exclusiveMinimum": "above", "minimum": "of at least", "exclusiveMaximum": "below", "maximum": "of at most"}
    told = [f"{word} {part[name]}" for name, word in limits.items() if name in part]
    return " ".join([KINDS.get(part.get("type"), "something else"), " and ".join(told)]).rstrip()


def meant(error) -> str:
    """What may have been meant: the nearest of the allowed words, or what YAML made of another one."""
    words = allowed(error.schema)
    match = nearest(error.instance, words) if isinstance(error.instance, str) else None
    if match:
        return f"; did you mean {match}?"
    takes_text = bool(words) or "text" in expected(error.schema)
    return hint(error.instance) if takes_text or not isinstance(error.instance, bool) else ""


def allowed(part: Mapping) -> list[str]:
    """The words that a part of the schema allows, those of its alternatives included."""
    if "$ref" in part:
        return allowed(schema()["definitions"][part["$ref"].rpartition("/")[2]])
    options = [word for option in part.get("anyOf", ()) for word in allowed(option)]
    return [word for word in (*part.get("enum", ()), part.get("const")) if isinstance(word, str)] + options


def adapter_problems(values: dict) -> Iterator[str]:
    """What the adapter's keys say of each other."""
    adapter, targets, block = values.get("adapter"), values.get("lora_target_modules"), values.get("pairwise")
    block = block if isinstance(block, dict) else {}
    lora = [key for key in values if str(key).startswith(("lora_", "peft_")) and not str(key).endswith("_kernel")]
    if "adapter" not in values and lora and not any(values.get(key) for key in REFUSED):
        yield f"adapter: missing beside {lora[0]}: every weight would be trained; set adapter: lora, or remove what is LoRA's"
    if adapter == "qlora" and values.get("load_in_4bit") is not True:
        yield "load_in_4bit: adapter: qlora trains on a base in 4 bits; set load_in_4bit: true, or adapter: lora"
    if adapter and not targets and block.get("train") is not False:
        yield f"lora_target_modules: missing; list the layers that {adapter} is to adapt, e.g. [q_proj, v_proj]"
    package = block.get("package")
    if isinstance(package, dict) and package.get("adapter", "merged") != "merged" and adapter not in ("lora", "qlora"):
        yield "pairwise.package.adapter: the run has no adapter; remove the key, or set adapter: lora or qlora"
    if block.get("train") is False and adapter:
        yield "adapter: nothing is trained with pairwise.train: false; remove the key"


def head_problems(values: dict) -> Iterator[str]:
    """What would quantise the head, or change how it is reached."""
    block, quantising = values.get("pairwise"), values.get("bnb_config_kwargs")
    block = block if isinstance(block, dict) else {}
    skipped = quantising.get("llm_int8_skip_modules") if isinstance(quantising, dict) else None
    head = "lm_head" if block.get("head") == "label_tokens" else "score"
    if isinstance(skipped, list) and head not in skipped:
        key = "bnb_config_kwargs.llm_int8_skip_modules"
        yield f"{key}: it replaces the default list, so the head would be quantised; add {head}"
    if block.get("softcap") and values.get("attn_implementation") == "sdpa":
        yield SDPA_DROPS_SOFTCAP


def wandb_problems(values: dict) -> Iterator[str]:
    """Keys of wandb without the one that turns it on."""
    others = [key for key in values if str(key).startswith("wandb_") and key not in REFUSED]
    if others and not values.get("wandb_project"):
        yield f"{others[0]}: means nothing without a project; set wandb_project, or remove the key"
