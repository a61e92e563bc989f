"""What only the base model can say of a recipe: positions, vocabulary, layers, settings. Each check is a UserError."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from preprocess.errors import UserError
from preprocess.problems import nearest, unknown_key


def check_base(base_model: str) -> None:
    """Raise UserError where a base model is neither a model's folder nor named like a repository of the hub."""
    is_hub_name = base_model.count("/") == 1 and not base_model.startswith((".", "/", "~"))
    if not (Path(base_model) / "config.json").is_file() and (Path(base_model).exists() or not is_hub_name):
        raise UserError(
            f"base_model: {base_model} is no model's folder (no config.json there), and no repository of the hub is named so "
            "(OWNER/NAME)"
        )


def check_vocabulary(special_tokens: Mapping[str, str], tokenizer, vocabulary_size: int) -> None:
    """Raise UserError where a special token of the recipe is new: the base model has no row for it in its embedding."""
    for key, token in special_tokens.items():
        found = tokenizer.convert_tokens_to_ids(token) if isinstance(token, str) else None
        if found is not None and found >= vocabulary_size:
            raise UserError(f"special_tokens.{key}: the base model has no token {token!r}; name one that it has")


def check_model(
    model,
    *,
    budget_tokens: int,
    targets: Iterable[str] | str | None,
    saved: Iterable[str] | None,
    overrides: Mapping[str, object],
    softcap: bool,
) -> None:
    """Raise UserError where the model lacks what the recipe asks of it: positions, layers, keys of its config, a soft cap.

    `targets` are lora_target_modules, or a regular expression, which is PEFT's to judge; `saved` lora_modules_to_save;
    `overrides` is model_config.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions and budget_tokens > positions:
        raise UserError(f"pairwise.budget_tokens: {budget_tokens}, but the base model has {positions} positions; lower it")
    layers = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    for key, names in {"lora_target_modules": targets, "lora_modules_to_save": saved}.items():
        for name in () if isinstance(names, str) else names or ():
            if name.rpartition(".")[2] not in layers:
                match = nearest(name, layers)
                meant = f"did you mean {match}?" if match else "remove it"
                raise UserError(f"{key}: {type(model).__name__} has no layer {name}; {meant}")
    known = type(model.config)().to_dict()  # the model's own already has what the recipe wrote
    for key in overrides:
        if key not in known:
            raise UserError(f"model_config.{key}: {unknown_key(key, known)}")
    if softcap and not getattr(model.config, "attn_logit_softcapping", None):
        raise UserError(f"pairwise.softcap: {type(model).__name__} has no soft cap of attention logits; remove the key")
