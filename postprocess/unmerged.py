"""Base and adapter of a LoRA run kept apart: the base in nf4 as it was trained, the adapter as files beside it.

Merging puts an adapter's small changes into weights that nf4 then rounds, and QLoRA trained them against a base that was
rounded already: kept apart, the model computes what it learnt, for a few per cent more work. The adapter's files have
names of the runtime's own (kaggle_kernels.runtime.model.LORA).
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from kaggle_kernels.runtime.model import CLASSES, LORA
from postprocess.adapter import Adapter
from postprocess.merge import open_sources
from postprocess.quantize import quantization_config
from postprocess.run import Run, adapter_settings
from postprocess.skeleton import Skeleton, head_modules, model_skeleton
from postprocess.trained import trained_quantization
from preprocess.errors import UserError
from preprocess.files import atomic_folder, write_json

OF_THE_TRAINING = ("base_model_name_or_path", "revision", "auto_mapping", "peft_version")


def unmerged(run: Run, out: Path) -> None:
    """Write the folder `out`: the base in nf4, computing in float16, with the adapter's head; the adapter; the tokenizer.

    Scales are quantised too (double quantisation) where they were in training. Raises UserError where the base was trained
    in another kind of 4 bits, or base and adapter do not belong together.
    """
    skeleton = model_skeleton(run.weights, run.contract)
    with open_sources(run, skeleton) as (_, _, adapter), atomic_folder(out) as folder:
        model = base_in_nf4(run, skeleton)
        put_replacements_in(model, adapter)
        model.save_pretrained(folder)  # before it runs: on a CPU, a forward pass repacks nf4 weights in place
        save_file(lora_tensors(adapter), folder / LORA[1], metadata={"format": "pt"})
        write_json(folder / LORA[0], lora_config(adapter_settings(run.folder)))
        for file in run.tokenizer_files():
            shutil.copyfile(file, folder / file.name)


def base_in_nf4(run: Run, skeleton: Skeleton) -> torch.nn.Module:
    """The base model with its linear layers in nf4, quantised from float16; what stayed in 16 bits in training stays so."""
    trained = trained_quantization(run) or {}
    if trained and trained.get("bnb_4bit_quant_type") != "nf4":
        raise UserError(
            f"{run.folder / 'config.json'}: the base was not trained in nf4, and pairwise.package.adapter needs that; set "
            "adapter: merged"
        )
    skipped = trained.get("llm_int8_skip_modules") or head_modules(run.weights, run.contract.head)
    double = bool(trained.get("bnb_4bit_use_double_quant"))
    skeleton.config.dtype = torch.float16
    return CLASSES[run.contract.head].from_pretrained(
        run.weights,
        config=skeleton.config,
        quantization_config=quantization_config("nf4", list(skipped), double),
        dtype=torch.float16,
        device_map={"": "cuda:0" if torch.cuda.is_available() else "cpu"},
        local_files_only=True,
        use_safetensors=True,
    )


def put_replacements_in(model: torch.nn.Module, adapter: Adapter) -> None:
    """Put the tensors that the adapter replaces (the head) into the base, so that no file holds random numbers."""
    with torch.no_grad():
        for name, key in adapter.replacements.items():
            tensor = adapter.tensors.get(key)
            model.get_parameter(name).copy_(_in_float16(tensor, key, adapter))


def lora_tensors(adapter: Adapter) -> dict[str, torch.Tensor]:
    """Every tensor of the adapter in float16, which is what a T4 computes in, under PEFT's own names."""
    return {name: _in_float16(adapter.tensors.get(name), name, adapter) for name in adapter.tensors.names()}


def _in_float16(tensor: torch.Tensor, name: str, adapter: Adapter) -> torch.Tensor:
    rounded = tensor.to(torch.float16).contiguous()
    if not torch.isfinite(rounded).all():
        raise UserError(f"{adapter.tensors.path}: {name} is not finite in float16; train again")
    return rounded


def lora_config(settings: Mapping[str, object]) -> dict:
    """PEFT's settings without what only the training knew, and without empty ones, whose names an older PEFT may not know."""
    return {name: value for name, value in settings.items() if value is not None and name not in OF_THE_TRAINING}
