"""The model of a package, loaded so that it answers as it did in training: pad id, attention and soft-cap from the contract."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from kaggle_kernels.runtime.package import PackageError


def load_model(folder: Path | str, contract, device: str, dtype: torch.dtype | None = None) -> torch.nn.Module:
    """The classifier in `folder` on `device`, in eval mode.

    `dtype` None means float16 on CUDA (a T4 has no bfloat16 units) and float32 elsewhere; quantised packages load by their
    own config.json. Raises PackageError where a weight is missing or the configuration contradicts the contract.
    """
    if contract.head != "score":
        raise PackageError(f"{folder}: its head is {contract.head!r}; this runtime scores 'score'")
    dtype = dtype or (torch.float16 if device.startswith("cuda") else torch.float32)
    config = serving_config(folder, contract)
    quantised = getattr(config, "quantization_config", None)
    if quantised and device.startswith("cuda") and quantised.get("bnb_4bit_compute_dtype") == "bfloat16":
        raise PackageError(f"{folder}: computes in bfloat16, which a T4 lacks; quantise it again from float16 weights")
    placed = {"device_map": {"": device}} if quantised or device != "cpu" else {}
    model, loaded = AutoModelForSequenceClassification.from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        attn_implementation="eager" if contract.softcap else "sdpa",
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
        **placed,
    )
    if loaded["missing_keys"]:
        raise PackageError(f"{folder}: weights are missing: {', '.join(sorted(loaded['missing_keys'])[:5])}")
    return model.eval()


def serving_config(folder: Path | str, contract):
    """The folder's config.json with pad id and soft-cap set as the contract says."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if config.num_labels != contract.num_labels or contract.num_labels != len(contract.verdicts):
        raise PackageError(
            f"{folder}: config.json has {config.num_labels} labels, contract.json {contract.num_labels} for the verdicts "
            f"{', '.join(contract.verdicts)}; package the run again"
        )
    config.pad_token_id = contract.pad_token_id
    if contract.softcap and not getattr(config, "attn_logit_softcapping", None):
        raise PackageError(f"{folder}: trained with a soft-cap, but config.json has no attn_logit_softcapping")
    if not contract.softcap and hasattr(config, "attn_logit_softcapping"):
        config.attn_logit_softcapping = None
    return config
