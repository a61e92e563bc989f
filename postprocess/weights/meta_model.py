"""The empty model that a run's weights fill, its class chosen by the contract's head: configuration, names and shapes."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig

from kaggle_kernels.runtime.models.model import CLASSES
from preprocess.core.errors import UserError
from preprocess.model_input import Contract

LABELLED = ("score", "reward")  # heads that are modules of their own, with outputs that have names


@dataclass(frozen=True)
class Skeleton:
    """The model to be filled: its configuration, its tensors' shapes by name, its base's prefix, the head's names.

    `tied` are the names of tensors that are another one's bytes, {name: the other one's}; they are in no file.
    """

    config: PretrainedConfig
    shapes: Mapping[str, tuple[int, ...]]
    prefix: str
    head: tuple[str, ...]
    tied: Mapping[str, str]


def _read_config(folder: Path) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, AttributeError, ArithmeticError, KeyError, StrictDataclassError) as error:
        raise UserError(
            f"{folder / 'config.json'}: transformers cannot read it ({' '.join(str(error).split())[:200]})"
        ) from None


def model_config(folder: Path, contract: Contract) -> PretrainedConfig:
    """The configuration in `folder` with labels, pad id and soft-cap as the contract says."""
    config = _read_config(folder)
    if getattr(config, "quantization_config", None):
        raise UserError(f"{folder}: its weights are quantised already; the contract's base_model must be the 16-bit original")
    if contract.head in LABELLED:
        config.id2label = dict(enumerate(contract.verdicts if contract.head == "score" else ("reward",)))
        config.label2id = {name: label for label, name in config.id2label.items()}
    config.pad_token_id = contract.pad_token_id
    if not contract.softcap and hasattr(config, "attn_logit_softcapping"):
        config.attn_logit_softcapping = None
    return config


def model_skeleton(folder: Path, contract: Contract) -> Skeleton:
    """The model of the configuration in `folder` with the contract's head, without weights."""
    config = model_config(folder, contract)
    model = _model_or_error(config, contract.head, folder)
    config.architectures = [type(model).__name__]
    tied = {name: source for name, source in model.all_tied_weights_keys.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    head = tuple(name for name in shapes if not name.startswith(f"{model.base_model_prefix}."))
    return Skeleton(config, shapes, model.base_model_prefix, head, tied)


def untied(skeleton: Skeleton) -> Skeleton:
    """The same model with tensors of their own where two were one."""
    skeleton.config.tie_word_embeddings = False
    own = {name: skeleton.shapes[source] for name, source in skeleton.tied.items()}
    return replace(skeleton, shapes={**skeleton.shapes, **own}, tied={})


def head_modules(folder: Path, head: str) -> list[str]:
    """The names of the modules beside the base model: ["score"], for BERT ["classifier"], for a causal LM ["lm_head"]."""
    model = _model_or_error(_read_config(folder), head, folder)
    return [
        name
        for name, module in model.named_children()
        if name != model.base_model_prefix and any(True for _ in module.parameters())
    ]


def empty_model(config: PretrainedConfig, head: str) -> torch.nn.Module:
    """The model of a configuration with this head, on no device; a ValueError where transformers has none."""
    with torch.device("meta"):
        return CLASSES[head].from_config(config)


def _model_or_error(config: PretrainedConfig, head: str, folder: Path) -> torch.nn.Module:
    try:
        return empty_model(config, head)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise UserError(
            f"{folder}: transformers has no model with the head {head} for it ({str(error).splitlines()[0][:200]})"
        ) from None
