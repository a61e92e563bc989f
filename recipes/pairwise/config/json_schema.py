"""python -m recipes.pairwise.config.json_schema [--check]: recipes/recipe.schema.json, by which editors check recipes.

It holds Axolotl's keys, as the installed Axolotl describes them, and our `pairwise:` block, both from their pydantic models,
with every other key an error. JSON Schema's draft 7 is the newest that the YAML language server reads.
"""

import inspect
import json
from importlib.metadata import version
from pathlib import Path

import click
from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import PydanticSerializationError

from preprocess.core.errors import UserError, exits_with_2
from preprocess.core.files import atomic_file, read_json
from recipes.pairwise.config.axolotl_keys import (
    LIMITS,
    PLUGIN,
    RECIPE_SCHEMA,
    REFUSED,
    SET_BY_THE_BLOCK,
)
from recipes.pairwise.config.schema import PairwiseBlock
from recipes.pairwise.config.templates import NAMES

COMMAND = "python -m recipes.pairwise.config.json_schema"
DRAFT = "http://json-schema.org/draft-07/schema#"


class Tolerant(GenerateJsonSchema):
    """Pydantic's generator, which leaves open what JSON Schema cannot describe instead of failing on it."""

    def handle_invalid_for_json_schema(self, schema, error_info):
        return {}

    def enum_schema(self, schema):
        try:
            return super().enum_schema(schema)
        except PydanticSerializationError:  # the members are torch's dtypes; Axolotl takes them by name
            return {"enum": [member.name for member in schema["members"]]}

    def emit_warning(self, kind, detail):
        pass


def model_schema(model: type[BaseModel]) -> dict:
    """A model's JSON Schema in draft 7."""
    return tidy(model.model_json_schema(schema_generator=Tolerant, ref_template="#/definitions/{model}"))


def tidy(node, names: bool = False):
    """A part of a schema without titles and null defaults; a reference has no neighbours, which draft 7 would not see.

    `names` says that the keys of `node` are names of properties or definitions, which all stay.
    """
    if isinstance(node, list):
        return [tidy(value) for value in node]
    if not isinstance(node, dict):
        return node
    kept = {
        "definitions" if key == "$defs" else key: tidy(value, names=not names and key in ("properties", "$defs"))
        for key, value in node.items()
        if names or not (key == "title" or (key == "default" and value is None))
    }
    return {"allOf": [{"$ref": kept.pop("$ref")}], **kept} if "$ref" in kept and len(kept) > 1 else kept


def inlined(node, definitions: dict):
    """A part of a schema with each reference replaced by what it refers to; none may refer to itself."""
    if isinstance(node, list):
        return [inlined(value, definitions) for value in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        return inlined(definitions[node["$ref"].rpartition("/")[2]], definitions)
    whole = {key: inlined(value, definitions) for key, value in node.items()}
    return {**whole.pop("allOf")[0], **whole} if len(whole.get("allOf", [])) == 1 else whole


def block_schema(model: type[BaseModel]) -> dict:
    """The schema of a model of ours in one piece: its sub-blocks stand where they are used."""
    schema = model_schema(model)
    definitions = schema.pop("definitions", {})
    return inlined(schema, definitions)


def pairwise_schema() -> dict:
    """Our block, with what its validators say beyond the types."""
    schema = block_schema(PairwiseBlock)
    properties = schema["properties"]
    properties["fold"]["anyOf"] = [{"type": "integer", "minimum": 0}, {"const": "all"}]
    properties["verdicts"] |= {"minItems": 2, "uniqueItems": True}
    properties["template"]["anyOf"] = [
        {"enum": list(NAMES)} if option == {"type": "string"} else option for option in properties["template"]["anyOf"]
    ]
    return schema


def axolotl_schema() -> dict:
    """Axolotl's own keys as `properties`, and the `definitions` that they refer to. Imports Axolotl, which takes seconds."""
    from axolotl.utils.schemas.config import AxolotlInputConfig  # noqa: PLC0415  the check does without

    schema = model_schema(AxolotlInputConfig)
    properties = {key: without_null(value) for key, value in sorted(schema["properties"].items())}
    for key, field in AxolotlInputConfig.model_fields.items():
        if field.deprecated:
            properties[key]["deprecationMessage"] = field.deprecated
    for key, words in allowed_words().items():
        properties[key] = {"enum": words} | {k: v for k, v in properties[key].items() if k in ("default", "description")}
    properties["bnb_config_kwargs"] |= {"properties": bitsandbytes_schema(), "additionalProperties": False}
    schema["definitions"]["SpecialTokensConfig"]["additionalProperties"] = False
    return {"definitions": schema["definitions"], "properties": properties}


def allowed_words() -> dict[str, list[str]]:
    """The words of keys that Axolotl takes as any text, and hands on to transformers and PEFT."""
    from axolotl.utils.schemas.enums import CustomSupportedOptimizers  # noqa: PLC0415  see axolotl_schema
    from transformers.trainer_utils import SaveStrategy, SchedulerType  # noqa: PLC0415
    from transformers.training_args import OptimizerNames  # noqa: PLC0415

    return {
        "adapter": ["lora", "qlora"],
        "attn_implementation": ["eager", "sdpa", "flash_attention_2", "flash_attention_3"],
        "lr_scheduler": sorted([*(kind.value for kind in SchedulerType), "one_cycle", "rex"]),
        "optimizer": sorted(kind.value for kind in (*OptimizerNames, *CustomSupportedOptimizers)),
        "save_strategy": sorted(kind.value for kind in SaveStrategy),
        "wandb_mode": ["online", "offline", "disabled"],
        "wandb_watch": ["false", "gradients", "parameters", "all"],
    }


def bitsandbytes_schema() -> dict[str, dict]:
    """What may stand in bnb_config_kwargs: the arguments of transformers' BitsAndBytesConfig, with their types."""
    from transformers import BitsAndBytesConfig  # noqa: PLC0415  see axolotl_schema

    kinds = {bool: {"type": "boolean"}, float: {"type": "number"}}
    arguments = inspect.signature(BitsAndBytesConfig).parameters.values()
    known = {one.name: kinds.get(type(one.default), {}) for one in arguments if one.kind is not one.VAR_KEYWORD}
    modules = {"type": "array", "items": {"type": "string"}}
    return known | {"bnb_4bit_quant_type": {"enum": ["nf4", "fp4"]}, "llm_int8_skip_modules": modules}


def without_null(schema: dict) -> dict:
    """A key's schema without null, which Axolotl allows nearly everywhere and a recipe says by leaving the key out."""
    options = [option for option in schema.get("anyOf", []) if option != {"type": "null"}]
    rest = {key: value for key, value in schema.items() if key != "anyOf"}
    if len(options) == 1:
        return ({"allOf": options} if "$ref" in options[0] else options[0]) | rest
    return {"anyOf": options} | rest if options else rest


def committed_axolotl_schema() -> dict:
    """What axolotl_schema gave when the file was written; a UserError where that was another Axolotl."""
    committed = read_json(RECIPE_SCHEMA)
    if committed.get("$comment") != comment():
        raise UserError(f"{RECIPE_SCHEMA.name}: not of Axolotl {version('axolotl')}; run `{COMMAND}`, and commit what it wrote")
    return committed


def comment() -> str:
    return f"Written by `{COMMAND}` from Axolotl {version('axolotl')}; change nothing here."


def recipe_schema(axolotl: dict) -> dict:
    """The whole schema of a recipe: what the strict check refuses is refused here too, where a schema can say it."""
    properties = {"pairwise": pairwise_schema()} | {k: v for k, v in axolotl["properties"].items() if k != "pairwise"}
    properties["plugins"] = properties["plugins"] | {"contains": {"const": PLUGIN}}
    for key, limits in LIMITS.items():
        kind = {"type": properties[key].get("type", "number")} | limits
        properties[key] = kind | {k: v for k, v in properties[key].items() if k == "description"}
    for key, why in REFUSED.items():
        properties[key] = {"const": False, "description": f"Refused: {why}."}
    for key, by in SET_BY_THE_BLOCK.items():
        properties[key] = {"not": {}, "description": f"Refused: {by} decides that."}
    return {
        "$schema": DRAFT,
        "$comment": comment(),
        "title": "A recipe: one training run",
        "type": "object",
        "additionalProperties": False,
        "required": ["base_model", "plugins", "pairwise"],
        "definitions": dict(sorted(axolotl["definitions"].items())),
        "properties": properties,
    }


def text_of(schema: dict) -> str:
    """A schema as JSON with one line for each key and each definition, so that a change is a short difference."""
    lines = []
    for key, value in schema.items():
        whole = json.dumps(value)
        if key in ("definitions", "properties"):
            whole = "{\n" + ",\n".join(f"  {json.dumps(name)}: {json.dumps(part)}" for name, part in value.items()) + "\n }"
        lines.append(f" {json.dumps(key)}: {whole}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def write_or_check(path: Path, schema: dict, command: str, check: bool) -> None:
    """Write a schema with `command`, or with `check` compare the file with it: a UserError where they differ."""
    text = text_of(schema)
    if not check:
        with atomic_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    elif not path.is_file() or path.read_text(encoding="utf-8") != text:
        raise UserError(f"{path.name}: not up to date; run `{command}`, and commit what it wrote")
    print(f"{path.name}: {'up to date' if check else 'written'}")


@click.command()
@click.option("--check", is_flag=True, help="Write nothing; exit with 2 where the file is not up to date.")
@exits_with_2
def main(check: bool) -> None:
    """Write recipes/recipe.schema.json. The check takes Axolotl's part from the file while Axolotl's version is the same."""
    axolotl = committed_axolotl_schema() if check else axolotl_schema()
    write_or_check(RECIPE_SCHEMA, recipe_schema(axolotl), COMMAND, check)


if __name__ == "__main__":
    main()
