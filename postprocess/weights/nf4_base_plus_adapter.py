"""Base and adapter of a LoRA run kept apart: the base in nf4 as it was trained, the adapter as files beside it.

Merging puts an adapter's small changes into weights that nf4 then rounds, and QLoRA trained them
against a base that was rounded already. Kept apart, the model computes what it learnt, for a few per
cent more work. The adapter's files have the names of kaggle_kernels.runtime.models.model.LORA.
"""

import functools
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import BitsAndBytesConfig

from kaggle_kernels.runtime.models.model import LORA
from postprocess.agreement.reference_model import trained_quantization
from postprocess.run_folder import ADAPTER_WEIGHTS, Run, adapter_settings
from postprocess.weights.bnb_quantize import quantization_config
from postprocess.weights.checkpoint_reader import Tensors, open_tensors
from postprocess.weights.merge import Form, merge
from postprocess.weights.meta_model import head_modules
from preprocess.core.errors import UserError
from preprocess.core.files import write_json

TRAINING_SETTINGS = ("base_model_name_or_path", "revision", "auto_mapping", "peft_version")


def unmerged(run: Run, out: Path, key: str = "") -> None:
    """Write a folder with the base in nf4, the adapter's head, the adapter and the tokenizer.

    Raises:
        UserError: The base was trained in another kind of 4 bits, or base and adapter do not belong
            together.
    """
    form = Form(base_settings(run), keeps_adapter_apart=True)

    # The adapter goes into the same temporary folder, so that no base is left without it.
    merge(run, out, form, key=key, add_files=functools.partial(copy_adapter, run.folder))


def copy_adapter(run_folder: Path, out: Path) -> None:
    """Copy a run's adapter in float16, with the settings that loading needs."""
    with open_tensors(run_folder / ADAPTER_WEIGHTS) as tensors:
        save_file(lora_tensors(tensors), out / LORA[1], metadata={"format": "pt"})
    write_json(out / LORA[0], lora_config(adapter_settings(run_folder)))


def base_settings(run: Run) -> BitsAndBytesConfig:
    """Describe how the base is quantised for a package that keeps the adapter apart: to nf4, as in training.

    Raises:
        UserError: The base was trained in another kind of 4 bits.
    """
    # For a base that training had in 16 bits, nothing is recorded.
    trained = trained_quantization(run) or {}
    if trained and trained.get("bnb_4bit_quant_type") != "nf4":
        raise UserError(
            f"{run.folder / 'config.json'}: the base was quantised in training, but not to nf4, which an unmerged "
            "package needs; set pairwise.package.adapter: merged"
        )

    # Modules that training left in 16 bits stay so; where nothing is recorded, that is the head.
    skipped_modules = trained.get("llm_int8_skip_modules")
    if not skipped_modules:
        skipped_modules = head_modules(run.weights, run.contract.head)
    is_double = bool(trained.get("bnb_4bit_use_double_quant"))
    return quantization_config("nf4", list(skipped_modules), is_double)


def lora_tensors(adapter: Tensors) -> dict[str, torch.Tensor]:
    """Read every tensor of the adapter in float16, which a T4 computes in, under PEFT's own names."""
    tensors = {}
    for name in adapter.names():
        tensor = adapter.get(name).to(torch.float16).contiguous()
        if not torch.isfinite(tensor).all():
            raise UserError(f"{adapter.path}: {name} is not finite in float16; train again")
        tensors[name] = tensor
    return tensors


def lora_config(settings: Mapping[str, object]) -> dict:
    """Keep PEFT's settings that loading needs.

    Empty ones are left out: an older PEFT may not know their names.
    """
    kept = {}
    for name, value in settings.items():
        if value is not None and name not in TRAINING_SETTINGS:
            kept[name] = value
    return kept
