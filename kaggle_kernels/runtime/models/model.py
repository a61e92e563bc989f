"""The model of a package, loaded so that it answers as it did in training: pad id, attention and soft-cap from the contract."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from kaggle_kernels.runtime.models.gptq import UNPACKING
from kaggle_kernels.runtime.models.shortcuts import SDPA, take_shortcuts
from kaggle_kernels.runtime.package import PackageError

CLASSES = {
    "score": AutoModelForSequenceClassification,
    "reward": AutoModelForSequenceClassification,
    "label_tokens": AutoModelForCausalLM,
}

# Under PEFT's own names for them, transformers would go looking for the base model.
LORA = ("lora_config.json", "lora.safetensors")


def load_model(
    folder: Path | str,
    contract,
    device: str,
    dtype: torch.dtype | None = None,
    device_map: Mapping[str, str] | None = None,
) -> torch.nn.Module:
    """Load the model in `folder` in eval mode, with the adapter on it where the folder holds one.

    Args:
        folder: The package's folder.
        contract: The package's model_input.Contract.
        device: Where the model goes, or with a `device_map` its inputs: the device of the embedding.
        dtype: None for float16 on CUDA (a T4 has no bfloat16 units) and float32 elsewhere.
        device_map: Places parts of the model on several devices.

    Raises:
        PackageError: A weight is missing.
    """
    if dtype is None:
        dtype = torch.float16 if device.startswith("cuda") else torch.float32

    # For some CPUs bitsandbytes looks for a compiled kernel on a hub, and warns that it does without.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

    config = serving_config(folder, contract)
    quantised = getattr(config, "quantization_config", None)
    if quantised and quantised["quant_method"] == "gptq":
        config.quantization_config = {**quantised, "quant_method": UNPACKING}

    # Without a device_map weights are read on the CPU first, and quantised ones are not read at all.
    options = {}
    if device_map or quantised or device != "cpu":
        options["device_map"] = dict(device_map or {"": device})
    model, loading = CLASSES[contract.head].from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        attn_implementation=choose_attention(config, contract),
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
        **options,
    )

    # An adapter may bring a head of its own, which the base model then lacks rightly.
    missing = set(loading["missing_keys"])
    lora_config_path, lora_path = (Path(folder) / name for name in LORA)
    if lora_path.is_file():
        model, replaced_names = add_adapter(model, lora_config_path, lora_path, dtype)
        missing -= replaced_names
    if missing:
        raise PackageError(f"{folder}: weights are missing: {', '.join(sorted(missing)[:5])}")
    take_shortcuts(model, contract.label_token_ids)
    return model.eval()


def choose_attention(config, contract) -> str:
    """Name the fastest implementation of attention that the architecture has, as transformers' attn_implementation."""
    model_class = CLASSES[contract.head]._model_mapping[type(config)]

    # Only transformers' own, slow implementation can cap the attention's logits, as Gemma-2 does.
    if contract.softcap or not model_class._supports_sdpa:
        return "eager"
    if not model_class._supports_attention_backend:
        return "sdpa"
    return SDPA


def add_adapter(
    model: torch.nn.Module, lora_config_path: Path, lora_path: Path, dtype: torch.dtype
) -> tuple[torch.nn.Module, set[str]]:
    """Put a LoRA adapter on a model that it was not merged into, its matrices in `dtype`.

    Returns:
        The model, and the names of the adapter's weights as the base model would name them.
    """
    # Few packages need PEFT, whose import takes seconds.
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict  # noqa: PLC0415

    settings = json.loads(lora_config_path.read_text(encoding="utf-8"))
    lora_config = LoraConfig.from_peft_type(**settings)
    tensors = load_file(lora_path)
    model = get_peft_model(model, lora_config, autocast_adapter_dtype=False)
    set_peft_model_state_dict(model, tensors)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    replaced_names = {name.removeprefix("base_model.model.") for name in tensors}
    return model, replaced_names


def serving_config(folder: Path | str, contract):
    """Read the folder's config.json, with pad id and soft-cap set as the contract says."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    config.pad_token_id = contract.pad_token_id

    # A cache of keys and values serves generation, and nothing is generated: 2.8 GB for Gemma-2-9b.
    config.use_cache = False

    # Training may have left the soft cap of attention out, for the sake of SDPA.
    if not contract.softcap and hasattr(config, "attn_logit_softcapping"):
        config.attn_logit_softcapping = None
    return config
