"""What only the base model can say of a recipe: positions, settings, vocabulary, layers. Each check is a UserError.

All are made from its config.json and its tokenizer, before rows are tokenised or weights are loaded.
"""

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from preprocess.core.errors import UserError
from preprocess.core.problems import nearest, unknown_key
from recipes.pairwise.config.schema import HOW_TO_GET_IT
from recipes.pairwise.config.served_models import why_not_served


def read_config(base_model: str, revision: str | None):
    """Read the configuration of a base model.

    Args:
        base_model: A folder, or a repository of the hub as OWNER/NAME.
        revision: The repository's commit, branch or tag; None for main.

    Raises:
        UserError: It is in neither, or transformers cannot read it.
    """
    is_hub_name = base_model.count("/") == 1 and not base_model.startswith((".", "/", "~"))
    has_config = (Path(base_model) / "config.json").is_file()

    # A folder without config.json would be taken for a hub's repository.
    if not has_config and (Path(base_model).exists() or not is_hub_name):
        raise UserError(
            f"base_model: {base_model} is no model's folder (no config.json there), and no repository of the hub is named so "
            "(OWNER/NAME)"
        )
    try:
        return AutoConfig.from_pretrained(base_model, revision=revision)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"base_model: {base_model} cannot be read ({reason}); {HOW_TO_GET_IT}"
        ) from None


def warn_of_home_path(base_model: str) -> None:
    """Print a line where the base model is named by a path of the home folder, which contract.json would hand on."""
    path = Path(base_model).expanduser()
    if path.is_absolute() and path.is_relative_to(Path.home()):
        print(
            f"warning: base_model: {base_model} stands below your home folder, and push refuses a package that says so; name "
            "it relative to the current folder, or by its repository",
            file=sys.stderr,
            flush=True,
        )


def warn_of_unserved_model(model_type: str, head: str) -> None:
    """Print a line where Kaggle's T4s cannot run the model, which then can only be a teacher."""
    reason = why_not_served(model_type, head)
    if reason is not None:
        print(f"warning: base_model: {reason}; it cannot be packaged", file=sys.stderr, flush=True)


def check_config(
    config, *, budget_tokens: int, overrides: Mapping[str, object], softcap: bool
) -> None:
    """Check that a base model has what a recipe asks of it.

    Args:
        config: The base model's configuration.
        budget_tokens: Tokens of a sequence, for which there must be positions.
        overrides: The recipe's model_config, whose keys must be the configuration's.
        softcap: Whether the recipe asks for a soft cap of attention logits.

    Raises:
        UserError: It lacks one of them.
    """
    text_config = config.get_text_config()
    positions = getattr(text_config, "max_position_embeddings", None)
    if positions and budget_tokens > positions:
        raise UserError(
            f"pairwise.budget_tokens: {budget_tokens}, but the base model has {positions} positions; lower it"
        )

    # transformers would take an unknown key without a word.
    config_keys = config.to_dict()
    for key in overrides:
        if key not in config_keys:
            raise UserError(f"model_config.{key}: {unknown_key(key, config_keys)}")

    if softcap and not getattr(text_config, "attn_logit_softcapping", None):
        raise UserError(
            "pairwise.softcap: the base model has no soft cap of attention logits; remove the key"
        )


def build_empty_model(config, head: str) -> torch.nn.Module:
    """Build a base model with a head and without weights; a UserError where transformers has none."""
    # On the meta device tensors have shapes, and no bytes.
    auto = AutoModelForCausalLM if head == "label_tokens" else AutoModelForSequenceClassification
    try:
        with torch.device("meta"):
            return auto.from_config(config)
    except ValueError:
        raise UserError(
            f"base_model: transformers has no model of the type {config.model_type} with the head {head}"
        ) from None


def list_head_modules(model: torch.nn.Module) -> list[str]:
    """List the modules beside the base model: ["score"], of an encoder ["pooler", "classifier"], of a causal LM ["lm_head"]."""
    names = []
    for name, module in model.named_children():
        has_weights = any(True for _ in module.parameters())
        if name != model.base_model_prefix and has_weights:
            names.append(name)
    return names


def check_layers(
    model: torch.nn.Module, *, targets: Iterable[str] | str | None, saved: Iterable[str] | None
) -> None:
    """Raise UserError where the model has no layer of a name that LoRA is to adapt or to train whole.

    Args:
        model: The base model with its head.
        targets: lora_target_modules, or a regular expression, which is PEFT's to judge.
        saved: lora_modules_to_save.
    """
    layers = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    for key, names in {"lora_target_modules": targets, "lora_modules_to_save": saved}.items():
        # A regular expression is no list of names.
        if names is None or isinstance(names, str):
            continue

        for name in names:
            if name.rpartition(".")[2] in layers:
                continue
            match = nearest(name, layers)
            advice = f"did you mean {match}?" if match else "remove it"
            raise UserError(f"{key}: {type(model).__name__} has no layer {name}; {advice}")


def check_vocabulary(
    special_tokens: Mapping[str, str], tokenizer, base_model: str, vocabulary_size: int
) -> None:
    """Check that no special token of a recipe is new to the base model.

    Args:
        special_tokens: The recipe's, by their keys.
        tokenizer: The base model's, to which new ones were added.
        base_model: Its name, for the message.
        vocabulary_size: Rows of the base model's embedding.

    Raises:
        UserError: A token has no row in the embedding.
    """
    for key, token in special_tokens.items():
        # A key may hold a list of tokens, which the tokenizer checks itself.
        if not isinstance(token, str):
            continue
        token_id = tokenizer.convert_tokens_to_ids(token)
        if token_id is not None and token_id >= vocabulary_size:
            raise UserError(
                f"special_tokens.{key}: {base_model} has no token {token!r}; name one that it has"
            )
