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
    """Return the keys of one of Axolotl's pydantic models, each with the JSON Schema of its values."""
    keys = {}
    for name, field in model.model_fields.items():
        # A field with an alias is written by its alias in YAML.
        key = field.alias or name
        keys[key] = key_schema(field.annotation)
    return keys


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

        kind = get_origin(option) or option
        is_model = isinstance(kind, type) and issubclass(kind, BaseModel)
        if not is_model and kind not in JSON_TYPES:
            return {}  # any value is allowed
        types.add("object" if is_model else JSON_TYPES[kind])
        if get_args(option) == (str,):
            items = {"items": {"type": "string"}}

    # An enum lists every value that is allowed. Of a type, only the two values of a boolean can be listed.
    if words and not types:
        return {"enum": words}
    if words and types == {"boolean"}:
        return {"enum": [*words, True, False]}
    # Beside any other type, the words are allowed as any text is.
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
    """Return Axolotl's own keys, each with the JSON Schema of its values, which for some is stricter than Axolotl."""
    # Importing Axolotl takes seconds.
    from axolotl.utils.schemas.config import AxolotlInputConfig, SpecialTokensConfig  # noqa: PLC0415
    from axolotl.utils.schemas.enums import CustomSupportedOptimizers  # noqa: PLC0415
    from transformers.trainer_utils import SaveStrategy, SchedulerType  # noqa: PLC0415
    from transformers.training_args import OptimizerNames  # noqa: PLC0415

    keys = model_keys(AxolotlInputConfig)
    for key, limits in NARROWER.items():
        # A list of words says all. Limits of a number are added to the type that Axolotl gives it.
        keys[key] = limits if "enum" in limits else keys[key] | limits

    # Axolotl takes any text for these, and fails after it has loaded the model.
    keys["lr_scheduler"] = list_words(SchedulerType, others=["one_cycle", "rex"])
    keys["optimizer"] = list_words([*OptimizerNames, *CustomSupportedOptimizers])
    keys["save_strategy"] = list_words(SaveStrategy)

    # Two keys hold keys themselves.
    inner_keys = {
        "special_tokens": model_keys(SpecialTokensConfig),
        "bnb_config_kwargs": bitsandbytes_keys(),
    }
    for key, properties in inner_keys.items():
        keys[key] |= {"properties": properties, "additionalProperties": False}
    return keys


def bitsandbytes_keys() -> dict[str, dict]:
    """Return the arguments of transformers' BitsAndBytesConfig, each with the JSON Schema of its values.

    It does not say their types, so that they are read off its defaults: load_in_4bit=False becomes
    {"type": "boolean"}. An argument with the default None may be anything: {}.
    """
    from transformers import BitsAndBytesConfig  # noqa: PLC0415

    keys: dict[str, dict] = {}
    for parameter in inspect.signature(BitsAndBytesConfig).parameters.values():
        # **kwargs is no argument of its own.
        if parameter.kind is parameter.VAR_KEYWORD:
            continue
        if parameter.default is None:
            keys[parameter.name] = {}
        else:
            keys[parameter.name] = key_schema(type(parameter.default))

    # Of these two more is known than their defaults tell.
    keys["bnb_4bit_quant_type"] = {"enum": ["nf4", "fp4"]}
    keys["llm_int8_skip_modules"] = {"type": "array", "items": {"type": "string"}}
    return keys


def list_words(members: Iterable[Enum], others: Sequence[str] = ()) -> dict:
    """Return the schema of a key that takes the values of an enumeration, or one of some other words."""
    words = [member.value for member in members]
    return {"enum": sorted([*words, *others])}


def plugin_keys() -> dict[str, dict]:
    """Return the keys that Axolotl's plugins bring, each with the JSON Schema of its values.

    Beside its type, each has under "plugin" the plugin that a recipe must name to use it:
    {"liger_rope": {"type": "boolean", "plugin": "axolotl.integrations.liger.LigerPlugin"}, …}.
    """
    keys = {}
    for plugin_name, plugin in find_plugins().items():
        # get_input_args returns the name of the pydantic model of its keys, as package.module.Class.
        model_module, _, model_class = plugin().get_input_args().rpartition(".")
        model = getattr(importlib.import_module(model_module), model_class)

        for key, part in model_keys(model).items():
            keys[key] = part | {"plugin": plugin_name}
    return keys


def find_plugins() -> dict[str, type]:
    """Find the classes of Axolotl's plugins, by their names such as axolotl.integrations.liger.LigerPlugin."""
    from axolotl import integrations  # noqa: PLC0415  see axolotl_keys
    from axolotl.integrations.base import BasePlugin  # noqa: PLC0415

    plugins = {}
    for module in pkgutil.iter_modules(integrations.__path__, "axolotl.integrations."):
        # The llm_compressor plugin cannot be imported without a library that nothing here needs.
        if not module.ispkg or module.name.endswith(".llm_compressor"):
            continue

        package = importlib.import_module(module.name)
        for name, member in inspect.getmembers(package, inspect.isclass):
            # A package also imports other classes, among them the base class of all plugins.
            is_plugin = issubclass(member, BasePlugin) and member is not BasePlugin
            if is_plugin:
                plugins[f"{module.name}.{name}"] = member
    return plugins


def recipe_schema() -> dict:
    """Return the JSON Schema of a recipe: what `pairwise check` would refuse, as far as JSON Schema can say it."""
    # Where a plugin and Axolotl have a key of the same name, Axolotl's, on the right, replaces it.
    properties = plugin_keys() | axolotl_keys()

    # A recipe's list of plugins must contain ours.
    properties["plugins"]["contains"] = {"const": PLUGIN}

    # A refused key may stand there with the value false.
    for key, reason in REFUSED.items():
        properties[key] = {"const": False, "description": f"Refused: {reason}."}
    # A key that follows from the `pairwise:` block may not stand there: no value satisfies {"not": {}}.
    for key, setter in SET_BY_THE_BLOCK.items():
        properties[key] = {"not": {}, "description": f"Refused: it follows from {setter}."}

    # pydantic puts the blocks inside ours under "$defs" and refers to them as "#/$defs/NAME". "#" is
    # the top of the file, so that they have to move there.
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
    """Return a schema as JSON, a line for each keyword; in "properties" a line for all keys of an initial letter."""
    lines = []
    for keyword, value in schema.items():
        text = text_of_properties(value) if keyword == "properties" else json.dumps(value)
        lines.append(f" {json.dumps(keyword)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def text_of_properties(properties: dict) -> str:
    """Return the properties of a schema as JSON, sorted, in a line for each initial letter."""
    keys_by_initial: dict[str, list[str]] = {}
    for name in sorted(properties):
        key_text = f"{json.dumps(name)}: {json.dumps(properties[name])}"
        keys_by_initial.setdefault(name[0], []).append(key_text)

    lines = [", ".join(key_texts) for key_texts in keys_by_initial.values()]
    return "{\n  " + ",\n  ".join(lines) + "\n }"


def write_or_check(path: Path, schema: dict, command: str, check: bool) -> None:
    """Write a schema to a file, or with `check` raise UserError unless the file holds it already.

    The message names `command`, which writes the file.
    """
    text = text_of(schema)
    if not check:
        with atomic_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
        print(f"{path.name}: written")
        return

    is_up_to_date = path.is_file() and path.read_text(encoding="utf-8") == text
    if not is_up_to_date:
        raise UserError(f"{path.name}: not up to date; run `{command}`, and commit what it wrote")
    print(f"{path.name}: up to date")


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
