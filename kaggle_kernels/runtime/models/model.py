"""The model of a package, loaded so that it answers as it did in training: pad id, attention and soft-cap from the contract."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from kaggle_kernels.runtime.models.gptq import unpacking
from kaggle_kernels.runtime.models.shortcuts import SDPA, take_shortcuts
from kaggle_kernels.runtime.package import PackageError

CLASSES = {
    "score": AutoModelForSequenceClassification,
    "reward": AutoModelForSequenceClassification,
    "label_tokens": AutoModelForCausalLM,
}
LORA = ("lora_config.json", "lora.safetensors")  # under PEFT's own names, transformers would go looking for the base model


def load_model(
    folder: Path | str,
    contract,
    device: str,
    dtype: torch.dtype | None = None,
    device_map: Mapping[str, str] | None = None,
) -> torch.nn.Module:
    """The model in `folder` on `device`, in eval mode, with the adapter on it where the folder holds one.

    `dtype` None means float16 on CUDA (a T4 has no bfloat16 units) and float32 elsewhere; quantised packages load by their
    own config.json. A `device_map` places parts of the model on several devices; its inputs then go to `device`, which holds
    the embedding. Raises PackageError where a weight is missing or the configuration contradicts the contract.
    """
    if contract.head not in CLASSES:
        raise PackageError(f"{folder}: its head is {contract.head!r}; this runtime scores {', '.join(CLASSES)}")
    dtype = dtype or (torch.float16 if device.startswith("cuda") else torch.float32)
    config = serving_config(folder, contract)
    quantised = getattr(config, "quantization_config", None)
    if quantised and device.startswith("cuda") and quantised.get("bnb_4bit_compute_dtype") == "bfloat16":
        raise PackageError(f"{folder}: computes in bfloat16, which a T4 lacks; quantise it again from float16 weights")
    if quantised and quantised.get("quant_method") == "gptq":
        config.quantization_config = unpacking(quantised, folder)
    placed = {"device_map": dict(device_map or {"": device})} if device_map or quantised or device != "cpu" else {}
    model, loaded = CLASSES[contract.head].from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        attn_implementation=choose_attention(config, contract),
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
        **placed,
    )
    lora_config, lora = (Path(folder) / name for name in LORA)
    missing = set(loaded["missing_keys"])
    if lora.is_file():
        model, found = put_adapter_on(model, lora_config, lora, dtype)
        missing -= found
    if missing:
        raise PackageError(f"{folder}: weights are missing: {', '.join(sorted(missing)[:5])}")
    take_shortcuts(model)
    return model.eval()


def choose_attention(config, contract) -> str:
    """Name the fastest implementation of attention that the architecture has; a soft cap has only transformers' eager one."""
    model_class = CLASSES[contract.head]._model_mapping[type(config)]
    if contract.softcap or not model_class._supports_sdpa:
        return "eager"
    if not model_class._supports_attention_backend:
        return "sdpa"
    return SDPA


def put_adapter_on(
    model: torch.nn.Module, lora_config: Path, lora: Path, dtype: torch.dtype
) -> tuple[torch.nn.Module, set[str]]:
    """The model with a LoRA adapter that was not merged, in `dtype`, and the names of the weights that the adapter replaces."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict  # noqa: PLC0415  few packages need it

    config = LoraConfig.from_peft_type(**json.loads(lora_config.read_text(encoding="utf-8")))
    tensors = load_file(lora)
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    result = set_peft_model_state_dict(model, tensors)
    absent = [name for name in result.missing_keys if "lora_" in name or ".modules_to_save." in name]
    if absent or result.unexpected_keys:
        raise PackageError(f"{lora}: not the adapter of {lora_config}: {', '.join([*absent, *result.unexpected_keys][:5])}")
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    return model, {name.removeprefix("base_model.model.") for name in tensors}


def serving_config(folder: Path | str, contract):
    """The folder's config.json with pad id and soft-cap set as the contract says."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    outputs = {"score": len(contract.verdicts), "reward": 1, "label_tokens": 0}[contract.head]
    found = 0 if contract.head == "label_tokens" else config.num_labels
    if not found == contract.num_labels == outputs:
        raise PackageError(
            f"{folder}: config.json has {found} labels, contract.json {contract.num_labels} for the head {contract.head} and "
            f"the verdicts {', '.join(contract.verdicts)}; package the run again"
        )
    if contract.head == "label_tokens" and len(contract.label_token_ids) != len(contract.verdicts):
        raise PackageError(f"{folder}: contract.json names {len(contract.label_token_ids)} label tokens; package the run again")
    config.pad_token_id = contract.pad_token_id
    config.use_cache = False  # keys and values for a generation that never comes: 2.8 GB of Gemma-2-9b at 8,192 tokens
    if contract.softcap and not getattr(config, "attn_logit_softcapping", None):
        raise PackageError(f"{folder}: trained with a soft-cap, but config.json has no attn_logit_softcapping")
    if not contract.softcap and hasattr(config, "attn_logit_softcapping"):
        config.attn_logit_softcapping = None
    return config
