"""Base and adapter of a LoRA run kept apart: the base in nf4 as it was trained, the adapter as files beside it.

Merging puts an adapter's small changes into weights that nf4 then rounds, and QLoRA trained them against a base that was
rounded already: kept apart, the model computes what it learnt, for a few per cent more work. The adapter's files have
names of the runtime's own (kaggle_kernels.runtime.models.model.LORA).
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import BitsAndBytesConfig

from kaggle_kernels.runtime.models.model import LORA
from postprocess.agreement.reference_model import trained_quantization
from postprocess.run_folder import ADAPTER, Run, adapter_settings
from postprocess.weights.bnb_quantize import quantization_config
from postprocess.weights.checkpoint_reader import Tensors, open_tensors
from postprocess.weights.merge import merge
from postprocess.weights.meta_model import head_modules
from preprocess.core.errors import UserError
from preprocess.core.files import write_json

OF_THE_TRAINING = ("base_model_name_or_path", "revision", "auto_mapping", "peft_version")


def unmerged(run: Run, out: Path, key: str = "") -> None:
    """Write the folder `out`: the base in nf4, computing in float16, with the adapter's head; the adapter; the tokenizer.

    Scales are quantised too (double quantisation) where they were in training. Raises UserError where the base was trained
    in another kind of 4 bits, or base and adapter do not belong together. `key` is merge's.
    """

    def add_adapter(folder: Path) -> None:
        with open_tensors(run.folder / ADAPTER[0]) as tensors:
            save_file(lora_tensors(tensors), folder / LORA[1], metadata={"format": "pt"})
        write_json(folder / LORA[0], lora_config(adapter_settings(run.folder)))

    merge(run, out, base_settings(run), key=key, apart=True, finish=add_adapter)


def base_settings(run: Run) -> BitsAndBytesConfig:
    """How the base is quantised: nf4 as in training; what stayed in 16 bits then stays so."""
    trained = trained_quantization(run) or {}
    if trained and trained.get("bnb_4bit_quant_type") != "nf4":
        raise UserError(
            f"{run.folder / 'config.json'}: the base was not trained in nf4, and pairwise.package.adapter needs that; set "
            "adapter: merged"
        )
    skipped = trained.get("llm_int8_skip_modules") or head_modules(run.weights, run.contract.head)
    return quantization_config("nf4", list(skipped), bool(trained.get("bnb_4bit_use_double_quant")))


def lora_tensors(adapter: Tensors) -> dict[str, torch.Tensor]:
    """Every tensor of the adapter in float16, which is what a T4 computes in, under PEFT's own names."""
    found = {name: adapter.get(name).to(torch.float16).contiguous() for name in adapter.names()}
    if unfit := [name for name, tensor in found.items() if not torch.isfinite(tensor).all()]:
        raise UserError(f"{adapter.path}: {unfit[0]} is not finite in float16; train again")
    return found


def lora_config(settings: Mapping[str, object]) -> dict:
    """PEFT's settings without what only the training knew, and without empty ones, whose names an older PEFT may not know."""
    return {name: value for name, value in settings.items() if value is not None and name not in OF_THE_TRAINING}
