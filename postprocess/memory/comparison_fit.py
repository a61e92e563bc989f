"""Does the comparison with training fit this machine? Told before a model is loaded. pipeline.py calls this."""

import os
from pathlib import Path

import torch

from postprocess.agreement.devices import WEIGHTS_SHARE_OF_GPU, list_gpus
from postprocess.agreement.reference_model import trained_quantization
from postprocess.memory.model_size import Served, activation_bytes, served_of
from postprocess.run_folder import MODEL_PATTERN, Run
from preprocess.core.errors import UserError
from recipes.pairwise.memory.base_model import NF4_BYTES
from recipes.pairwise.memory.measure import measure_folder

TOKENS_PER_BATCH = 8192  # of scoring.score
FLOAT16_BYTES = 2
FLOAT32_BYTES = 4
# Layers are not divided, so that no GPU is filled to the last byte.
CHECKED_SHARE_OF_GPUS = WEIGHTS_SHARE_OF_GPU - 0.1


def check_comparison(run: Run) -> None:
    """Check that this machine has the memory to compare a run's package with the model as trained.

    This is computed before any model is loaded. They are loaded one after another, so the largest decides.

    Raises:
        UserError: The largest model does not fit, or Kaggle's T4s cannot run the model.
    """
    served = served_of(run.recipe, measure_folder(run.weights))
    has_gpu = torch.cuda.is_available()
    bytes_by_model = estimate_weights(run, served, has_gpu)
    largest = max(bytes_by_model, key=bytes_by_model.get)

    # activation_bytes is measured in 16 bits, as a GPU computes. A CPU computes in 32 bits.
    activations = activation_bytes(served, TOKENS_PER_BATCH)
    if not has_gpu:
        activations *= FLOAT32_BYTES // FLOAT16_BYTES
    check_memory(run.weights, bytes_by_model[largest], activations, f"the {largest} model")


def estimate_weights(run: Run, served: Served, has_gpu: bool) -> dict[str, int]:
    """Estimate the bytes that the weights of each compared model take when it is loaded.

    Returns:
        The bytes by the model's name: trained, unmerged, merged.
    """
    # Only linear layers are quantised, and all other tensors stay in 16 bits.
    linear_weights = 0
    other_weights = 0
    for tensor in served.weights:
        if tensor.kind == "linear":
            linear_weights += tensor.elements
        else:
            other_weights += tensor.elements
    other_bytes = FLOAT16_BYTES * other_weights

    # The same model with its linear layers in 4 bits, or in 8: one byte a weight.
    nf4_bytes = int(linear_weights * NF4_BYTES) + other_bytes
    int8_bytes = linear_weights + other_bytes

    # The trained model is loaded as training had it: QLoRA's base is quantised.
    quantization = trained_quantization(run)
    if not quantization:
        trained_bytes = stored_bytes(run.weights)
    elif quantization.get("load_in_4bit"):
        trained_bytes = nf4_bytes
    else:
        trained_bytes = int8_bytes
    bytes_by_model = {"trained": trained_bytes}

    # The recipe's `adapter` is merged, unmerged, or best: then both are compared. An unmerged adapter
    # has its base in nf4 beside it.
    adapter = run.recipe.pairwise.package.adapter
    if adapter != "merged":
        bytes_by_model["unmerged"] = nf4_bytes
    if adapter != "unmerged":
        bytes_per_weight = FLOAT16_BYTES if has_gpu else FLOAT32_BYTES
        bytes_by_model["merged"] = bytes_per_weight * (linear_weights + other_weights)
    return bytes_by_model


def check_base_model(weights: Path) -> None:
    """Check that a base model that is used as it is fits this machine."""
    check_memory(weights, stored_bytes(weights), 0, "the base model")


def check_memory(weights: Path, weight_bytes: int, activations: int, model: str) -> None:
    """Raise UserError where a model and a batch of it do not fit the GPU, or without one this machine."""
    held_bytes, place = memory()
    if weight_bytes + activations > held_bytes:
        raise UserError(
            f"{weights}: {model} takes {weight_bytes / 1e9:.1f} GB and a batch of it {activations / 1e9:.1f}; "
            f"{place} has {held_bytes / 1e9:.1f} GB, too little to compare what is packaged with the model "
            "as trained; use a larger machine (CUDA_VISIBLE_DEVICES= takes RAM), or adapter: unmerged for a "
            "QLoRA run. A teacher's labels need no package: see pairwise labels"
        )


def stored_bytes(weights: Path) -> int:
    """Count the bytes of a checkpoint's files, in which transformers loads it."""
    return sum(file.stat().st_size for file in weights.glob(MODEL_PATTERN))


def memory() -> tuple[int, str]:
    """Give the bytes that a model may take, of all GPUs or without one of the machine, and where it is."""
    gpus = list_gpus()
    if len(gpus) == 1:
        return gpus[0], "the GPU"
    if gpus:
        return int(sum(gpus) * CHECKED_SHARE_OF_GPUS), f"the room for weights on {len(gpus)} GPUs"
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "this machine"
