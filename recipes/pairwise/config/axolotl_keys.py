"""Check Axolotl's keys in a recipe before Axolotl starts, which takes a minute to refuse them, in a traceback.

Called by recipes.pairwise.config.schema, without torch or Axolotl: names, types and allowed words come from
recipe.schema.json, which json_schema.py writes from the installed Axolotl and which editors read too. What one key says
of another is checked here.
"""

import functools
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from jsonschema import Draft7Validator

from preprocess.core.errors import UserError
from preprocess.core.files import read_json
from preprocess.core.problems import hint, nearest, unknown_key

PLUGIN = "recipes.pairwise.plugin.PairwisePlugin"
RECIPE_SCHEMA = Path(__file__).parents[2] / "recipe.schema.json"
# Keys that train something else than the recipe means, or what cannot be packaged, with the reason and the fix.
REFUSED = {
    "reward_model": "it forces one label and its evaluation crashes; remove it, the `pairwise` block sets the head",
    "trust_remote_code": "it runs code from the hub and loads the wrong class; use a model that transformers knows",
    "sample_packing": "it pools one token for a whole packed row; remove it, rows are batched by length instead",
    "dataloader_drop_last": "it drops validation rows too, whose predictions are then missing; remove it",
    "lora_target_linear": "it puts the head under LoRA twice; list the layers in lora_target_modules",
    "process_reward_model": "it labels steps, not answers; remove it, the `pairwise` block sets the head",
    "rl": "the `pairwise` block sets the loss; remove it",
    "lora_embedding_kernel": "embeddings are not trained by LoRA here; remove it",
    "liger_cross_entropy": "it replaces a loss that no head has; remove it",
    "liger_fused_linear_cross_entropy": "it replaces a loss that no head has; remove it",
    "liger_use_token_scaling": "it changes a loss that no head has; remove it",
    "lora_fan_in_fan_out": "it is for GPT-2's transposed layers, which no model here has; remove it",
    "lora_target_parameters": "an adapter of bare parameters cannot be merged; list layers in lora_target_modules",
    "peft": "LoftQ changes the base's own weights, which the adapter's file does not hold; remove it",
    "peft_layer_replication": "the packaged model has the base's layers, each once; remove it",
    "peft_trainable_token_indices": "single rows of an embedding cannot be merged; put it into lora_modules_to_save",
    "relora": "it changes the base's own weights, which the adapter's file does not hold; remove it",
    "gptq": "the head would not be trained; use adapter: qlora with load_in_4bit: true",
    "wandb_log_model": "it uploads gigabytes; remove it",
    "comet_api_key": "a file is no place for a secret; remove it, and set COMET_API_KEY in the environment",
    "swanlab_api_key": "a file is no place for a secret; remove it, and set SWANLAB_API_KEY in the environment",
}
# The other initialisations of LoRA (PiSSA, OLoRA, …) change the base's own weights when training
# starts. The adapter's file does not hold them, so that nothing could be merged in the end.
LORA_INITIALISATIONS = (True, False, "gaussian", "orthogonal")
SET_BY_THE_BLOCK = {  # keys that the plugin or Axolotl sets whatever the recipe says: a value here would mean nothing
    "num_labels": "pairwise.verdicts and pairwise.head",
    "sequence_len": "pairwise.budget_tokens",
    "datasets": "pairwise.pairs",
    "test_datasets": "pairwise.pairs and pairwise.fold",
    "val_set_size": "pairwise.fold",
    "model_type": "pairwise.head",
    "use_wandb": "wandb_project",
}
MOST_WORDS = 12  # of a key that a line lists
# The words of a message for the types and limits of JSON Schema.
KINDS = {
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "boolean": "true or false",
    "array": "a list",
    "object": "keys and values",
}
LIMITS = {
    "exclusiveMinimum": "above",
    "minimum": "of at least",
    "exclusiveMaximum": "below",
    "maximum": "of at most",
}


@functools.cache
def schema() -> dict:
    """Return recipe.schema.json."""
    return read_json(RECIPE_SCHEMA)


def axolotl_problems(values: dict) -> list[str]:
    """Return what is wrong with a recipe's keys of Axolotl, all but `pairwise`."""
    problems = []
    base_model = values.get("base_model")
    if not isinstance(base_model, str) or not base_model:
        problems.append(f"base_model: expected a model or a folder, found {base_model!r}")
    plugins = values.get("plugins", [])
    if isinstance(plugins, list) and PLUGIN not in plugins:
        problems.append(f"plugins: without {PLUGIN} Axolotl would train something else; add it")

    for key, value in values.items():
        if key not in ("base_model", "pairwise"):
            problems += key_problems(key, value, plugins)

    # Keys that are right alone may contradict each other.
    for find_problems in (
        adapter_problems,
        quantised_head_problems,
        batch_problems,
        attention_problems,
        average_problems,
        wandb_problems,
    ):
        problems += find_problems(values)

    # Two checks may find the same problem. A dict keeps one of each, in their order.
    return list(dict.fromkeys(problems))


def key_problems(key: object, value: object, plugins: object) -> list[str]:
    """Return what is wrong with one key of a recipe, whatever its other keys say."""
    # A refused key may stand in the recipe if it is turned off, with false or without a value.
    if key in REFUSED and not value:
        return []
    if key in REFUSED:
        return [f"{key}: refused, {REFUSED[key]}"]
    # The plugin or Axolotl would overwrite the value, and the user would not notice.
    if key in SET_BY_THE_BLOCK:
        return [f"{key}: refused, it follows from {SET_BY_THE_BLOCK[key]}; remove it"]

    known_keys = schema()["properties"]
    if key not in known_keys:
        return [f"{key}: {unknown_key(key, known_keys)}"]

    # A key may belong to a plugin of Axolotl's. Axolotl ignores it where the recipe lacks the plugin.
    plugin = known_keys[key].get("plugin")
    if plugin and not is_named(plugin, plugins):
        return [f"{key}: needs a plugin of Axolotl's; add {plugin} to plugins, or remove the key"]
    return list(value_problems(key, value))


def is_named(plugin: str, plugins: object) -> bool:
    """Return whether a recipe names a plugin of Axolotl's, by any path inside the plugin's package.

    axolotl.integrations.liger.LigerPlugin is also named by axolotl.integrations.liger.plugin.LigerPlugin.
    """
    # A value of another type is a problem of its own, and names nothing.
    if not isinstance(plugins, list):
        return False
    package = plugin.rpartition(".")[0]
    return any(str(name).startswith(f"{package}.") for name in plugins)


def value_problems(key: str, value: object) -> Iterator[str]:
    """Yield what is wrong with a key's value, by the part of recipe.schema.json that describes the key."""
    # JSON Schema takes infinity and NaN, which YAML writes as .inf and .nan, for numbers.
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{key}: expected a number, found {value!r}"

    # Of each error, jsonschema gives the value at fault (`instance`), the path to it inside `value`, the
    # part of the schema that it violates (`schema`), and that part's violated word (`validator`).
    for error in Draft7Validator(schema()["properties"][key]).iter_errors(value):
        path = ".".join(map(str, (key, *error.absolute_path)))
        if error.validator == "additionalProperties":
            # One error stands for all unknown keys of a value. Each gets its own advice.
            allowed_names = error.schema["properties"]
            for name in error.instance:
                if name not in allowed_names:
                    yield f"{path}.{name}: {unknown_key(name, allowed_names)}"
        elif error.validator == "contains":
            # Our plugin is not among the plugins. axolotl_problems says that, also of a recipe without any.
            continue
        else:
            advice = suggestion(error.schema, error.instance)
            yield f"{path}: expected {describe_part(error.schema)}, found {error.instance!r}{advice}"


def describe_part(part: Mapping) -> str:
    """Return in words what a part of the schema allows.

    {"type": "number", "minimum": 0} becomes "a number of at least 0", {"enum": ["lora", "qlora"]} becomes
    "one of lora, qlora".
    """
    if "enum" in part:
        # true and false are listed as YAML writes them, not as True and False.
        words = [word if isinstance(word, str) else json.dumps(word) for word in part["enum"]]
        listed = ", ".join(words[:MOST_WORDS])
        if len(words) > MOST_WORDS:
            listed += f", … ({len(words)} in all: recipes/{RECIPE_SCHEMA.name})"
        return f"one of {listed}"

    kinds = " or ".join(KINDS[kind] for kind in types_of(part))
    limits = []
    for keyword, word in LIMITS.items():
        if keyword in part:
            limits.append(f"{word} {part[keyword]}")
    # Without limits a space would remain at the end.
    return f"{kinds} {' and '.join(limits)}".rstrip()


def suggestion(part: Mapping, value: object) -> str:
    """Suggest what may have been meant by a wrong value; empty where there is nothing to suggest."""
    words = [word for word in part.get("enum", []) if isinstance(word, str)]

    # A misspelt word, such as lorra for lora.
    if isinstance(value, str):
        match = nearest(value, words)
        if match:
            return f"; did you mean {match}?"

    # YAML reads no and on as a truth value. `hint` says so, which helps only where text is expected.
    takes_text = bool(words) or "string" in types_of(part)
    if isinstance(value, bool) and not takes_text:
        return ""
    return hint(value)


def types_of(part: Mapping) -> list[str]:
    """Return the JSON types that a part of the schema allows, which names them alone or in a list."""
    types = part.get("type", [])
    return [types] if isinstance(types, str) else types


def adapter_problems(values: dict) -> Iterator[str]:
    """Yield where the keys about a recipe's adapter contradict each other or the `pairwise:` block.

    An adapter is a pair of small matrices beside each chosen layer of the base model. With one (LoRA, or
    QLoRA, whose base model is held in 4 bits) only these are trained. Without, every weight is.
    """
    adapter = values.get("adapter")
    block = block_of(values)

    # Without the key `adapter`, Axolotl ignores the other keys of LoRA.
    lora_keys = [
        key for key in values if str(key).startswith(("lora_", "peft_")) and key not in REFUSED
    ]
    if lora_keys and "adapter" not in values:
        keys = ", ".join(lora_keys)
        yield f"adapter: missing, so every weight is trained without regard to {keys}; set adapter: lora, or remove these"

    # Axolotl would load the base model in 16 bits.
    if adapter == "qlora" and values.get("load_in_4bit") is not True:
        yield "load_in_4bit: adapter: qlora needs a base model in 4 bits; set load_in_4bit: true, or adapter: lora"

    is_trained = block.get("train") is not False
    if adapter and not is_trained:
        yield "adapter: with pairwise.train: false nothing is trained, so there is no adapter; remove the key"
    if adapter and is_trained and not values.get("lora_target_modules"):
        yield f"lora_target_modules: missing; list the layers that {adapter} is to adapt, e.g. [q_proj, v_proj]"

    # "unmerged" keeps the adapter apart from the base model, and "best" tries whether that is better.
    package = block.get("package")
    packaged_adapter = package.get("adapter", "merged") if isinstance(package, dict) else "merged"
    if packaged_adapter != "merged" and adapter not in ("lora", "qlora"):
        yield f"pairwise.package.adapter: {packaged_adapter} needs a run with adapter: lora or qlora; add that, or remove it"


def quantised_head_problems(values: dict) -> Iterator[str]:
    """Yield that the head would be quantised together with the base model's layers.

    llm_int8_skip_modules lists the modules that bitsandbytes leaves as they are. By default it holds the
    head. A recipe's own list replaces the default, and so must name the head too.
    """
    quantisation = values.get("bnb_config_kwargs")
    if not isinstance(quantisation, dict):
        return
    skipped_modules = quantisation.get("llm_int8_skip_modules")
    if not isinstance(skipped_modules, list):
        return

    head = "lm_head" if block_of(values).get("head") == "label_tokens" else "score"
    if head not in skipped_modules:
        key = "bnb_config_kwargs.llm_int8_skip_modules"
        yield f"{key}: this list replaces the default one, so that the head would be quantised; add {head}"


def batch_problems(values: dict) -> Iterator[str]:
    """Yield where one of Axolotl's keys sets what the `pairwise:` block already says about batches."""
    block = block_of(values)
    if block.get("tokens_per_micro_batch") and values.get("group_by_length"):
        yield "group_by_length: pairwise.tokens_per_micro_batch decides which rows share a batch; remove one of the two"
    if block.get("pairs_per_step") and values.get("gradient_accumulation_steps"):
        yield "gradient_accumulation_steps: pairwise.pairs_per_step already decides this number; remove one of the two"


def attention_problems(values: dict) -> Iterator[str]:
    """Yield where the recipe's attention cannot do what its `pairwise:` block asks for.

    | attn_implementation | softcap: bounded logits | padding_free: several sequences in one row |
    |---------------------|-------------------------|--------------------------------------------|
    | eager               | yes                     | no                                         |
    | sdpa                | no                      | yes                                        |
    | flash_attention_2   | yes                     | yes                                        |
    """
    block = block_of(values)
    attention = values.get("attn_implementation")

    # Another model would be trained than the one that is packaged.
    if block.get("softcap") and attention == "sdpa":
        yield "attn_implementation: sdpa ignores the soft cap; set eager or flash_attention_2, or pairwise.softcap: false"
    if block.get("padding_free") and attention == "eager":
        yield "attn_implementation: with eager, the sequences of a padding-free row would see each other; remove the key"
    needs_both = block.get("padding_free") and block.get("softcap")
    if needs_both and attention != "flash_attention_2":
        yield "pairwise.padding_free: with pairwise.softcap it needs attn_implementation: flash_attention_2; set that"


def average_problems(values: dict) -> Iterator[str]:
    """Yield which keys a moving average of the weights (`pairwise.ema_decay`) cannot be combined with."""
    if not block_of(values).get("ema_decay"):
        return
    for key in ("deepspeed", "fsdp_config"):
        if values.get(key):
            yield f"pairwise.ema_decay: with {key} no process holds all weights that are averaged; remove one of the two"
    if values.get("load_best_model_at_end"):
        yield "pairwise.ema_decay: the average would replace the best checkpoint; remove load_best_model_at_end, or ema_decay"


def count_accumulation_steps(pairs_per_step: int, micro_batch_size: int, gpus: int) -> int:
    """Count the micro-batches that each GPU takes in a step: 64 pairs, 2 at a time on 8 GPUs, are 4.

    Raises:
        UserError: The pairs cannot be shared out evenly.
    """
    pairs_at_once = micro_batch_size * gpus
    # Each GPU takes as many micro-batches as the others.
    if pairs_per_step % pairs_at_once == 0:
        return pairs_per_step // pairs_at_once

    # Advise the nearest number of pairs that can be shared, for which the learning rate still suits.
    # Of 64 pairs, 12 at a time, that is 5 * 12 = 60.
    nearest_steps = max(1, round(pairs_per_step / pairs_at_once))
    nearest_multiple = nearest_steps * pairs_at_once
    raise UserError(
        f"pairwise.pairs_per_step: {pairs_per_step} is no multiple of {pairs_at_once} "
        f"(micro_batch_size {micro_batch_size} on {gpus} GPUs); set it to {nearest_multiple}, or take another number of GPUs"
    )


def wandb_problems(values: dict) -> Iterator[str]:
    """Yield that a recipe sets up wandb, but lacks wandb_project, which turns it on."""
    wandb_keys = [key for key in values if str(key).startswith("wandb_") and key not in REFUSED]
    if wandb_keys and not values.get("wandb_project"):
        yield f"{wandb_keys[0]}: has no effect, since wandb_project is missing; add that, or remove the key"


def block_of(values: dict) -> dict:
    """Return a recipe's `pairwise:` block, empty where it is no block, which its own check says."""
    block = values.get("pairwise")
    return block if isinstance(block, dict) else {}
