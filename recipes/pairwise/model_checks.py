"""What only the base model can say of a recipe: positions, settings, vocabulary, layers. Each check is a UserError.

What config.json tells is checked before the rows are tokenised, the rest before the first step.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from transformers import AutoConfig

from preprocess.errors import UserError
from preprocess.problems import nearest, unknown_key
from recipes.pairwise.schema import HOW_TO_GET_IT


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


def check_config(config, budget_tokens: int, overrides: Mapping[str, object]) -> None:
    """Raise UserError where rows would be longer than the model has positions, or model_config (`overrides`) has other keys."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions and budget_tokens > positions:
        raise UserError(f"pairwise.budget_tokens: {budget_tokens}, but the base model has {positions} positions; lower it")
    known = config.to_dict()
    for key in overrides:
        if key not in known:
            raise UserError(f"model_config.{key}: {unknown_key(key, known)}")


def check_vocabulary(special_tokens: Mapping[str, str], tokenizer, base_model: str, vocabulary_size: int) -> None:
    """Raise UserError where a special token of the recipe is new: the base model has no row for it in its embedding."""
    for key, token in special_tokens.items():
        found = tokenizer.convert_tokens_to_ids(token) if isinstance(token, str) else None
        if found is not None and found >= vocabulary_size:
            raise UserError(f"special_tokens.{key}: {base_model} has no token {token!r}; name one that it has")


def check_model(model, *, targets: Iterable[str] | str | None, saved: Iterable[str] | None, softcap: bool) -> None:
    """Raise UserError where the model lacks layers or a soft cap that the recipe asks for.

    `targets` are lora_target_modules, or a regular expression, which is PEFT's to judge; `saved` lora_modules_to_save.
    """
    layers = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    for key, names in {"lora_target_modules": targets, "lora_modules_to_save": saved}.items():
        for name in () if isinstance(names, str) else names or ():
            if name.rpartition(".")[2] not in layers:
                match = nearest(name, layers)
                meant = f"did you mean {match}?" if match else "remove it"
                raise UserError(f"{key}: {type(model).__name__} has no layer {name}; {meant}")
    if softcap and not getattr(model.config, "attn_logit_softcapping", None):
        raise UserError(f"pairwise.softcap: {type(model).__name__} has no soft cap of attention logits; remove the key")
