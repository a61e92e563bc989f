"""Check a recipe against its base model: positions, settings, vocabulary and layers.

The checks read only the model's config.json and its tokenizer, before rows are tokenised or weights are
loaded. Each raises a UserError where the recipe and the model do not fit.
"""

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from preprocess.core.errors import UserError
from preprocess.core.problems import nearest, unknown_key
from recipes.pairwise.config.schema import HOW_TO_GET_IT, PairwiseBlock
from recipes.pairwise.config.served_models import why_not_served


def read_config(base_model: str, revision: str | None):
    """Read the configuration of a base model, a folder or OWNER/NAME on the hub, as transformers' config object.

    Raises:
        UserError: There is no such model, or transformers cannot read its configuration.
    """
    folder = Path(base_model)
    is_model_folder = (folder / "config.json").is_file()
    looks_like_path = base_model.startswith((".", "/", "~"))
    could_be_repository = base_model.count("/") == 1 and not looks_like_path

    # transformers looks on the hub for whatever is no model's folder, and its error speaks of the hub
    # then. So a folder without a model, and a name that no repository can have, are refused here.
    may_be_on_hub = could_be_repository and not folder.exists()
    if not is_model_folder and not may_be_on_hub:
        raise UserError(
            f"base_model: {base_model} is neither a model's folder (no config.json there) nor a name on the hub (OWNER/NAME); "
            "correct it"
        )
    try:
        return AutoConfig.from_pretrained(base_model, revision=revision)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"base_model: {base_model} cannot be read ({reason}); {HOW_TO_GET_IT}"
        ) from None


def warn_of_home_path(base_model: str) -> None:
    """Print a warning where the base model is named by an absolute path below the home folder.

    contract.json, which is published with the model, holds this path, and so the user's name.
    """
    path = Path(base_model).expanduser()
    if path.is_absolute() and path.is_relative_to(Path.home()):
        print(
            f"warning: base_model: {base_model} is a path in your home folder; contract.json will hold it, and push refuses "
            "to publish it; name the model relative to the current folder, or by its repository",
            file=sys.stderr,
            flush=True,
        )


def warn_of_unserved_model(model_type: str, head: str) -> None:
    """Print a warning where Kaggle's T4s cannot run the model. It can still be a teacher, which labels rows here."""
    reason = why_not_served(model_type, head)
    if reason is not None:
        print(f"warning: base_model: {reason}; it cannot be packaged", file=sys.stderr, flush=True)


def check_config(config, block: PairwiseBlock, overrides: Mapping[str, object]) -> None:
    """Check that a base model has what a recipe asks of it; `overrides` is the recipe's model_config.

    Raises:
        UserError: The model has fewer positions than the recipe has tokens, no setting of an override's
            name, or no soft cap that could be kept.
    """
    # A model that also reads images keeps the settings of its language model apart.
    text_config = config.get_text_config()
    positions = getattr(text_config, "max_position_embeddings", None)
    if positions and block.budget_tokens > positions:
        raise UserError(
            f"pairwise.budget_tokens: {block.budget_tokens}, but the base model has {positions} positions; lower it"
        )

    # transformers takes an unknown key as well, and nothing reads it.
    config_keys = config.to_dict()
    for key in overrides:
        if key not in config_keys:
            raise UserError(f"model_config.{key}: {unknown_key(key, config_keys)}")

    if block.softcap and not getattr(text_config, "attn_logit_softcapping", None):
        raise UserError(
            "pairwise.softcap: the base model has no soft cap of attention logits; remove the key"
        )


def build_empty_model(config, head: str) -> torch.nn.Module:
    """Build a base model with a head and without weights, which costs neither time nor memory.

    Raises:
        UserError: transformers has no class for such a model with such a head.
    """
    # label_tokens is the layer that predicts tokens, the other two are classification heads.
    auto_class = AutoModelForSequenceClassification
    if head == "label_tokens":
        auto_class = AutoModelForCausalLM

    # Tensors on the meta device have a shape, and no values.
    try:
        with torch.device("meta"):
            return auto_class.from_config(config)
    except ValueError:
        raise UserError(
            f"base_model: transformers has no model of the type {config.model_type} with the head {head}"
        ) from None


def list_head_modules(model: torch.nn.Module) -> list[str]:
    """List the names of the modules that make up a model's head.

    That is ["score"] for a decoder that classifies, ["pooler", "classifier"] for some encoders, and
    ["lm_head"] for a causal LM.
    """
    names = []
    for name, module in model.named_children():
        # transformers calls everything but the head the base model: `model.model` or `model.bert`.
        is_base_model = name == model.base_model_prefix
        # A dropout or an activation is a module too, and has nothing to train.
        has_weights = any(True for _ in module.parameters())
        if has_weights and not is_base_model:
            names.append(name)
    return names


def check_layers(
    model: torch.nn.Module, *, targets: Iterable[str] | str | None, saved: Iterable[str] | None
) -> None:
    """Check that the model has the layers that LoRA is to adapt or to train whole.

    PEFT accepts a list of which only some names fit, and ignores the others without a word.

    Raises:
        UserError: No layer has one of the names.
    """
    # Recipes name layers by the last part of their path: q_proj of model.layers.0.self_attn.q_proj.
    layers = {last_part(path) for path, _ in model.named_modules()}

    for key, names in {"lora_target_modules": targets, "lora_modules_to_save": saved}.items():
        # A text is a regular expression, which PEFT matches with whole paths.
        if names is None or isinstance(names, str):
            continue

        for name in names:
            # A longer path, such as self_attn.q_proj, is judged by its last part too.
            if last_part(name) in layers:
                continue
            match = nearest(name, layers)
            advice = f"did you mean {match}?" if match else "remove it"
            raise UserError(f"{key}: {type(model).__name__} has no layer {name}; {advice}")


def last_part(path: str) -> str:
    """Return what follows the last dot of a module's path, or the path where it has no dot."""
    return path.rpartition(".")[2]


def check_vocabulary(
    special_tokens: Mapping[str, str], tokenizer, base_model: str, vocabulary_size: int
) -> None:
    """Check that no special token of a recipe is new to the base model.

    Axolotl has added the recipe's tokens to the tokenizer. One that was new got the next free id, and
    the model has no embedding for it. With an embedding of 100 rows, the ids 0 to 99 are known to the
    model, and a new token has the id 100.

    Raises:
        UserError: A token has no row in the embedding.
    """
    for key, token in special_tokens.items():
        # A key may hold a list of tokens, which the tokenizer checks itself.
        if not isinstance(token, str):
            continue
        token_id = tokenizer.convert_tokens_to_ids(token)
        is_new = token_id is not None and token_id >= vocabulary_size
        if is_new:
            raise UserError(
                f"special_tokens.{key}: {base_model} has no token {token!r}; name one that it has"
            )
