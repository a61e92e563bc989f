"""The empty model that a run's weights fill, its class chosen by the contract's head: configuration, names, shapes."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig

from kaggle_kernels.runtime.models.model import CLASSES
from preprocess.core.errors import UserError
from preprocess.model_input import Contract

# Heads that are modules of their own, whose outputs have names.
LABELLED = ("score", "reward")
# What transformers raises over a configuration with a value that it does not expect.
UNREADABLE = (OSError, ValueError, TypeError, AttributeError, ArithmeticError, KeyError)


@dataclass(frozen=True)
class Skeleton:
    """The model that is to be filled."""

    config: PretrainedConfig
    # The shape of each tensor by name, without those that are tied.
    shapes: Mapping[str, tuple[int, ...]]
    prefix: str  # what the names of the tensors below the head start with
    head: tuple[str, ...]  # the names of the head's tensors
    # For each tensor that is another one's bytes, and in no file, the name of the other.
    tied: Mapping[str, str]


def model_skeleton(folder: Path, contract: Contract) -> Skeleton:
    """Describe the tensors of a model by its configuration and the contract's head, without reading weights.

    Returns:
        Names and shapes of all tensors, which of them are the head, and which are one with another (tied).

    Raises:
        UserError: transformers has no such model, or its weights are quantised already.
    """
    config = model_config(folder, contract)
    model = build_model(config, contract.head, folder)
    config.architectures = [type(model).__name__]

    # A checkpoint does not hold a tied tensor: the model uses another one in its place.
    tied = dict(model.all_tied_weights_keys)
    shapes = {}
    for name, tensor in model.state_dict().items():
        if name not in tied:
            shapes[name] = tuple(tensor.shape)

    # What is not part of the pretrained model is the head.
    prefix = model.base_model_prefix
    head = tuple(name for name in shapes if not name.startswith(f"{prefix}."))
    return Skeleton(config, shapes, prefix, head, tied)


def model_config(folder: Path, contract: Contract) -> PretrainedConfig:
    """Read a configuration, and set labels, padding token and soft cap as the contract says.

    Raises:
        UserError: It cannot be read, or is that of a quantised model.
    """
    config = read_config(folder)
    if getattr(config, "quantization_config", None):
        raise UserError(
            f"{folder}: the weights of this base model are quantised already; train on the 16-bit original, which "
            "the contract's base_model must name"
        )
    config.pad_token_id = contract.pad_token_id

    # A classifier or a reward model has labelled outputs. The outputs of a causal LM are tokens.
    if contract.head in LABELLED:
        labels = contract.verdicts if contract.head == "score" else ("reward",)
        config.id2label = dict(enumerate(labels))
        config.label2id = {name: label for label, name in config.id2label.items()}

    # The soft cap bounds the scores of attention. The contract says whether the run was trained with it.
    has_softcap = hasattr(config, "attn_logit_softcapping")
    if has_softcap and not contract.softcap:
        config.attn_logit_softcapping = None
    return config


def untie(skeleton: Skeleton) -> Skeleton:
    """Describe the same model with tensors of their own where two were one."""
    skeleton.config.tie_word_embeddings = False
    shapes = dict(skeleton.shapes)
    for name, source in skeleton.tied.items():
        shapes[name] = skeleton.shapes[source]
    return replace(skeleton, shapes=shapes, tied={})


def head_modules(folder: Path, head: str) -> list[str]:
    """Name the modules of a model's head: ["score"], for BERT ["classifier"], for a causal LM ["lm_head"]."""
    model = build_model(read_config(folder), head, folder)
    names = []
    for name, module in model.named_children():
        # What stands beside the pretrained model, but for a dropout or an activation.
        has_parameters = any(True for _ in module.parameters())
        if name != model.base_model_prefix and has_parameters:
            names.append(name)
    return names


def empty_model(config: PretrainedConfig, head: str) -> torch.nn.Module:
    """Build the model of a configuration with this head on the meta device; ValueError where there is none."""
    with torch.device("meta"):
        return CLASSES[head].from_config(config)


def build_model(config: PretrainedConfig, head: str, folder: Path) -> torch.nn.Module:
    """Build an empty model; a UserError names `folder` where transformers cannot."""
    try:
        return empty_model(config, head)
    except (ValueError, TypeError, ArithmeticError) as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError(
            f"{folder}: transformers has no model with the head {head} for it ({reason})"
        ) from None


def read_config(folder: Path) -> PretrainedConfig:
    """Read a model's configuration; a UserError where transformers cannot."""
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (*UNREADABLE, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{folder / 'config.json'}: transformers cannot read it ({reason})"
        ) from None
