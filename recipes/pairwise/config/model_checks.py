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
    """The config of a base model, from its folder or from the hub; a UserError where it is in neither."""
    is_hub_name = base_model.count("/") == 1 and not base_model.startswith((".", "/", "~"))
    if not (Path(base_model) / "config.json").is_file() and (Path(base_model).exists() or not is_hub_name):
        raise UserError(
            f"base_model: {base_model} is no model's folder (no config.json there), and no repository of the hub is named so "
            "(OWNER/NAME)"
        )
    try:
        return AutoConfig.from_pretrained(base_model, revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(
            f"base_model: {base_model} cannot be read ({' '.join(str(error).split())[:160]}); {HOW_TO_GET_IT}"
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


def check_config(config, *, budget_tokens: int, overrides: Mapping[str, object], softcap: bool) -> None:
    """Raise UserError where the base model lacks what is asked of it: positions for a row, keys of model_config, a soft cap."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions and budget_tokens > positions:
        raise UserError(f"pairwise.budget_tokens: {budget_tokens}, but the base model has {positions} positions; lower it")
    known = config.to_dict()
    for key in overrides:
        if key not in known:
            raise UserError(f"model_config.{key}: {unknown_key(key, known)}")
    if softcap and not getattr(config.get_text_config(), "attn_logit_softcapping", None):
        raise UserError("pairwise.softcap: the base model has no soft cap of attention logits; remove the key")


def build_empty_model(config, head: str) -> torch.nn.Module:
    """Build a base model with a head and without weights; a UserError where transformers has none."""
    auto = AutoModelForCausalLM if head == "label_tokens" else AutoModelForSequenceClassification
    try:
        with torch.device("meta"):
            return auto.from_config(config)
    except ValueError:
        raise UserError(f"base_model: transformers has no model of the type {config.model_type} with the head {head}") from None


def list_head_modules(model: torch.nn.Module) -> list[str]:
    """List the modules beside the base model: ["score"], of an encoder ["pooler", "classifier"], of a causal LM ["lm_head"]."""
    names = []
    for name, module in model.named_children():
        has_weights = any(True for _ in module.parameters())
        if name != model.base_model_prefix and has_weights:
            names.append(name)
    return names


def check_layers(model: torch.nn.Module, *, targets: Iterable[str] | str | None, saved: Iterable[str] | None) -> None:
    """Raise UserError where the model has no layer of a name that LoRA is to adapt or to train whole.

    Args:
        model: The base model with its head.
        targets: lora_target_modules, or a regular expression, which is PEFT's to judge.
        saved: lora_modules_to_save.
    """
    layers = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    for key, names in {"lora_target_modules": targets, "lora_modules_to_save": saved}.items():
        for name in () if isinstance(names, str) else names or ():
            if name.rpartition(".")[2] not in layers:
                match = nearest(name, layers)
                meant = f"did you mean {match}?" if match else "remove it"
                raise UserError(f"{key}: {type(model).__name__} has no layer {name}; {meant}")


def check_vocabulary(special_tokens: Mapping[str, str], tokenizer, base_model: str, vocabulary_size: int) -> None:
    """Raise UserError where a special token of the recipe is new: the base model has no row for it in its embedding."""
    for key, token in special_tokens.items():
        token_id = tokenizer.convert_tokens_to_ids(token) if isinstance(token, str) else None
        if token_id is not None and token_id >= vocabulary_size:
            raise UserError(f"special_tokens.{key}: {base_model} has no token {token!r}; name one that it has")
