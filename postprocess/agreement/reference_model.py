"""The model as it was trained: its base, in the precision of the training, with the adapter on it by PEFT."""

import os

import torch
from peft import PeftModel
from transformers import BitsAndBytesConfig

from kaggle_kernels.runtime.models.model import CLASSES
from kaggle_kernels.runtime.models.shortcuts import keep_label_rows
from postprocess.run_folder import ADAPTER, MODEL_PATTERN, Run
from postprocess.weights.merge import merged_model
from postprocess.weights.meta_model import LABELLED, empty_model, model_config, read_config
from preprocess.core.errors import UserError
from preprocess.core.files import read_object
from recipes.pairwise.training.output_layer import replace_output_layer


def check_memory(run: Run) -> None:
    """Raise UserError where the 16-bit model, which is compared whole, is larger than the GPU's memory, or without one RAM."""
    needed, (held, where) = sum(file.stat().st_size for file in run.weights.glob(MODEL_PATTERN)), memory()
    if needed > held:
        raise UserError(
            f"{run.weights}: {needed / 1e9:.0f} GB of weights, {where} has {held / 1e9:.0f} GB, too little to compare what is "
            "packaged with the model as trained; use a larger machine (CUDA_VISIBLE_DEVICES= takes RAM). A teacher's labels "
            f"need no package: see {run.folder / 'predictions.parquet'}, or of all rows make cv R={run.recipe.path.stem}"
        )


def memory() -> tuple[int, str]:
    """Bytes of the first GPU's memory, or of the machine's, and which it is."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory, "the GPU"
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "this machine"


def load_trained(run: Run, device: str) -> torch.nn.Module:
    """Base and adapter by PEFT, or the model of a full fine-tune, in the dtype of their files, attention as it will be served.

    A base that was quantised for the training (QLoRA) is quantised again, from the dtype that it had then.
    """
    quantised = trained_quantization(run)
    options = {"dtype": "auto"}
    if quantised:
        options = {
            "dtype": read_object(run.folder / "config.json").get("dtype") or "auto",
            "quantization_config": BitsAndBytesConfig.from_dict(quantised),
            "device_map": {"": device},
        }
    config = model_config(run.weights, run.contract)
    has_new_head = run.has_adapter and run.contract.head in LABELLED
    if has_new_head:
        # The base may have a head of its own with other outputs; the adapter holds the run's.
        config.num_labels = read_config(run.weights).num_labels
    model = CLASSES[run.contract.head].from_pretrained(
        run.weights,
        config=config,
        attn_implementation="eager" if run.contract.softcap else None,
        local_files_only=True,
        use_safetensors=True,
        **options,
    )
    if has_new_head and model.config.num_labels != run.contract.num_labels:
        replace_output_layer(model, run.contract.num_labels)
    if run.has_adapter:
        model = PeftModel.from_pretrained(model, run.folder)
    if run.contract.label_token_ids:
        keep_label_rows(model, run.contract.label_token_ids)
    return (model if quantised else model.to(device)).eval()


def load_merged(run: Run, device: str, dtype: torch.dtype) -> torch.nn.Module:
    """The merged model, its float16 weights made in memory, computing in `dtype` as the kernel would."""
    config, tensors = merged_model(run)
    model = type(empty_model(config, run.contract.head)).from_pretrained(
        None,
        config=config,
        state_dict=tensors,
        dtype=dtype,
        attn_implementation="eager" if run.contract.softcap else None,
    )
    if run.contract.label_token_ids:
        keep_label_rows(model, run.contract.label_token_ids)
    return model.to(device).eval()


def trained_quantization(run: Run) -> dict | None:
    """Bitsandbytes' settings of the base during training, as the run's own config.json recorded them; None for 16 bits."""
    if not run.has_adapter:
        return None
    file = run.folder / "config.json"
    recorded = read_object(file).get("quantization_config") if file.is_file() else None
    asked = next((key for key in ("load_in_4bit", "load_in_8bit") if run.recipe.axolotl.get(key)), None)
    if asked and not recorded:
        raise UserError(
            f"{file}: records no quantization_config, though {run.recipe.path.name} says {asked}; the adapter in "
            f"{ADAPTER[0]} is from another training: train again"
        )
    return recorded
