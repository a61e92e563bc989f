"""python -m recipes.pairwise.config.json_schema [--check]: write recipes/recipe.schema.json.

By this file editors complete and check recipes, and axolotl_keys.py checks them without importing Axolotl, which takes
seconds. Of Axolotl's keys, and of those that its plugins bring, it holds names, types and allowed words; of our
`pairwise:` block all that its pydantic model says. JSON Schema's draft 7 is the newest that the YAML language server reads.
"""

import importlib
import inspect
import json
import pkgutil
from collections.abc import Iterable, Sequence
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Literal, Union, get_args, get_origin

import click
from pydantic import BaseModel

from preprocess.core.errors import UserError, exits_with_2
from preprocess.core.files import atomic_file
from recipes.pairwise.config.axolotl_keys import (
    LORA_INITIALISATIONS,
    PLUGIN,
    RECIPE_SCHEMA,
    REFUSED,
    SET_BY_THE_BLOCK,
)
from recipes.pairwise.config.schema import PairwiseBlock

COMMAND = "python -m recipes.pairwise.config.json_schema"
DRAFT = "http://json-schema.org/draft-07/schema#"
JSON_TYPES = {
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    list: "array",
    tuple: "array",
    dict: "object",
}
NARROWER = {  # Axolotl takes these as any number, or as any text that it hands on to transformers and PEFT
    "micro_batch_size": {"exclusiveMinimum": 0},
    "gradient_accumulation_steps": {"exclusiveMinimum": 0},
    "num_epochs": {"exclusiveMinimum": 0},
    "learning_rate": {"type": "number", "exclusiveMinimum": 0},
    "max_steps": {"minimum": 1},
    "warmup_ratio": {"minimum": 0, "maximum": 1},
    "warmup_steps": {"minimum": 0},
    "weight_decay": {"minimum": 0},
    "max_grad_norm": {"minimum": 0},
    "peft_init_lora_weights": {"enum": list(LORA_INITIALISATIONS)},
    "lora_r": {"minimum": 1},
    "lora_alpha": {"minimum": 1},
    "lora_dropout": {"minimum": 0, "exclusiveMaximum": 1},
    "seed": {"minimum": 0},
    "adapter": {"enum": ["lora", "qlora"]},
    "attn_implementation": {"enum": ["eager", "sdpa", "flash_attention_2", "flash_attention_3"]},
    "wandb_mode": {"enum": ["online", "offline", "disabled"]},
    "wandb_watch": {"enum": ["false", "gradients", "parameters", "all"]},
}


def block_schema(model: type[BaseModel]) -> dict:
    """Return the JSON Schema of a pydantic model of ours."""
    schema = model.model_json_schema()
    del schema["title"]
    return schema


def model_keys(model: type[BaseModel]) -> dict[str, dict]:
    """Return the keys of one of Axolotl's pydantic models, each with its types or its words."""
    return {
        field.alias or name: key_schema(field.annotation)
        for name, field in model.model_fields.items()
    }


def key_schema(annotation: object) -> dict:
    """Return the JSON Schema of a key, from the annotation of its field.

    Literal["a", "b"] | None becomes {"enum": ["a", "b"]}, and int | list[str] becomes
    {"type": ["array", "integer"], "items": {"type": "string"}}. Null is left out: Axolotl allows it
    nearly everywhere, and a recipe says it by leaving out the key.
    """
    words = []
    types = set()
    items = {}
    for option in alternatives(annotation):
        if option is NoneType:
            continue

        words_of_option = list_literals(option)
        if words_of_option:
            words += words_of_option
            continue

        type_of_option = json_type(get_origin(option) or option)
        if type_of_option is None:
            return {}  # any value is allowed
        types.add(type_of_option)
        if get_args(option) == (str,):
            items = {"items": {"type": "string"}}

    # An enum lists all values that are allowed, so that only true and false can join the words.
    if words and not types:
        return {"enum": words}
    if words and types == {"boolean"}:
        return {"enum": [*words, True, False]}
    if words:
        types.add("string")

    # To JSON Schema every integer is a number.
    if "number" in types:
        types.discard("integer")
    names = sorted(types)
    return {"type": names[0] if len(names) == 1 else names} | items


def list_literals(option: object) -> list:
    """List the values of a Literal or of an enumeration; none for any other type."""
    if get_origin(option) is Literal:
        return list(get_args(option))
    if isinstance(option, type) and issubclass(option, Enum):
        return [member.value for member in option]
    return []


def json_type(kind: object) -> str | None:
    """Return JSON's name of a Python type; None of one that may be anything in JSON."""
    is_model = isinstance(kind, type) and issubclass(kind, BaseModel)
    return "object" if is_model else JSON_TYPES.get(kind)


def alternatives(annotation: object) -> list:
    """Return the members of a union, those of a union inside it included; of anything else itself."""
    if get_origin(annotation) is Annotated:
        return alternatives(get_args(annotation)[0])
    if get_origin(annotation) not in (Union, UnionType):
        return [annotation]
    members = []
    for member in get_args(annotation):
        members += alternatives(member)
    return members


def axolotl_keys() -> dict[str, dict]:
    """Return Axolotl's own keys, those narrowed that it hands on unchecked. Imports Axolotl, which takes seconds."""
    from axolotl.utils.schemas.config import AxolotlInputConfig, SpecialTokensConfig  # noqa: PLC0415
    from axolotl.utils.schemas.enums import CustomSupportedOptimizers  # noqa: PLC0415
    from transformers import BitsAndBytesConfig  # noqa: PLC0415
    from transformers.trainer_utils import SaveStrategy, SchedulerType  # noqa: PLC0415
    from transformers.training_args import OptimizerNames  # noqa: PLC0415

    keys = model_keys(AxolotlInputConfig)
    for key, narrower in NARROWER.items():
        keys[key] = narrower if "enum" in narrower else keys[key] | narrower

    # Axolotl takes any text for these, and fails after it has loaded the model.
    keys["lr_scheduler"] = list_words(SchedulerType, others=["one_cycle", "rex"])
    keys["optimizer"] = list_words([*OptimizerNames, *CustomSupportedOptimizers])
    keys["save_strategy"] = list_words(SaveStrategy)

    keys["special_tokens"] |= {
        "properties": model_keys(SpecialTokensConfig),
        "additionalProperties": False,
    }

    # The arguments of bitsandbytes' configuration have the types of their defaults.
    quantising = {}
    for parameter in inspect.signature(BitsAndBytesConfig).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            continue
        quantising[parameter.name] = {}
        if parameter.default is not None:
            quantising[parameter.name] = key_schema(type(parameter.default))
    quantising["bnb_4bit_quant_type"] = {"enum": ["nf4", "fp4"]}
    quantising["llm_int8_skip_modules"] = {"type": "array", "items": {"type": "string"}}
    keys["bnb_config_kwargs"] |= {"properties": quantising, "additionalProperties": False}
    return keys


def list_words(members: Iterable[Enum], others: Sequence[str] = ()) -> dict:
    """Return the schema of a key that takes the values of an enumeration, or one of some other words."""
    words = [member.value for member in members]
    return {"enum": sorted([*words, *others])}


def plugin_keys() -> dict[str, dict]:
    """Return the keys that Axolotl's plugins bring, each with the plugin's name as a recipe gives it."""
    from axolotl import integrations  # noqa: PLC0415  see axolotl_keys
    from axolotl.integrations.base import BasePlugin  # noqa: PLC0415

    keys = {}
    for module in pkgutil.iter_modules(integrations.__path__, "axolotl.integrations."):
        # The llm_compressor plugin cannot be imported without a library that nothing here needs.
        if not module.ispkg or module.name.endswith(".llm_compressor"):
            continue
        for name, member in inspect.getmembers(
            importlib.import_module(module.name), inspect.isclass
        ):
            if not issubclass(member, BasePlugin) or member is BasePlugin:
                continue

            # A plugin names the model of its keys as package.module.Class.
            arguments_module, _, arguments_class = member().get_input_args().rpartition(".")
            arguments = getattr(importlib.import_module(arguments_module), arguments_class)
            for key, part in model_keys(arguments).items():
                keys[key] = part | {"plugin": f"{module.name}.{name}"}
    return keys


def recipe_schema() -> dict:
    """Return the schema of a recipe: what the strict check refuses is refused here too, where a schema can say it."""
    # Axolotl's own keys come last: a plugin must not redefine them.
    properties = plugin_keys() | axolotl_keys()
    properties["plugins"]["contains"] = {"const": PLUGIN}

    # These may only be false, and those may not be there at all.
    for key, reason in REFUSED.items():
        properties[key] = {"const": False, "description": f"Refused: {reason}."}
    for key, setter in SET_BY_THE_BLOCK.items():
        properties[key] = {"not": {}, "description": f"Refused: {setter} decides that."}

    # The definitions of blocks inside ours stand at the top of a schema.
    block = block_schema(PairwiseBlock)
    definitions = block.pop("$defs")
    properties["pairwise"] = block

    return {
        "$schema": DRAFT,
        "$comment": f"Written by `{COMMAND}` from Axolotl {version('axolotl')}; change nothing here.",
        "title": "A recipe: one training run",
        "type": "object",
        "additionalProperties": False,
        "required": ["base_model", "plugins", "pairwise"],
        "$defs": definitions,
        "properties": properties,
    }


def text_of(schema: dict) -> str:
    """Return a schema as JSON, with one line for all keys of an initial letter: a change in one key is a change in one line."""
    lines = []
    for keyword, value in schema.items():
        text = json.dumps(value)
        if keyword == "properties":
            rows_by_initial: dict[str, list[str]] = {}
            for name in sorted(value):
                row = rows_by_initial.setdefault(name[0], [])
                row.append(f"{json.dumps(name)}: {json.dumps(value[name])}")
            rows = [", ".join(row) for row in rows_by_initial.values()]
            text = "{\n  " + ",\n  ".join(rows) + "\n }"
        lines.append(f" {json.dumps(keyword)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def write_or_check(path: Path, schema: dict, command: str, check: bool) -> None:
    """Write a schema with `command`, or with `check` compare the file with it: a UserError where they differ."""
    text = text_of(schema)
    if not check:
        with atomic_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")

    # For `make lint`: the committed file has to be what would be written.
    elif not path.is_file() or path.read_text(encoding="utf-8") != text:
        raise UserError(f"{path.name}: not up to date; run `{command}`, and commit what it wrote")
    print(f"{path.name}: {'up to date' if check else 'written'}")


@click.command()
@click.option(
    "--check", is_flag=True, help="Write nothing; exit with 2 where the file is not up to date."
)
@exits_with_2
def main(check: bool) -> None:
    """Write recipes/recipe.schema.json from the installed Axolotl and the `pairwise:` block."""
    write_or_check(RECIPE_SCHEMA, recipe_schema(), COMMAND, check)


if __name__ == "__main__":
    main()
