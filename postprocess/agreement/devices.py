"""Where a model is loaded to be scored: on the CPU, on a GPU, or its layers over all GPUs.

With a device map transformers builds the model without memory, reads each tensor from the mapped
safetensors file and copies it to the device where it stays: no second copy is held in host memory.
reference_model.py, model_scores.py and the check of the memory call this.
"""

from pathlib import Path

import torch

from kaggle_kernels.runtime.models.placement import split_over, weight_sizes

# A batch needs the rest. Where that does not do, batches are made smaller (see model_scores.py).
WEIGHTS_SHARE_OF_GPU = 0.85


def list_gpus() -> list[int]:
    """List the GPUs that this process sees, by the bytes of memory that each has."""
    gpu_count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.cuda.get_device_properties(number).total_memory for number in range(gpu_count)]


def place_checkpoint() -> dict[str, object]:
    """Choose where from_pretrained puts a checkpoint that may be quantised while it is loaded.

    Returns:
        Arguments of from_pretrained. Over several GPUs, transformers fills one after the other, so that
        a model that fits on the first stays there whole.
    """
    gpus = list_gpus()
    if not gpus:
        return {"device_map": {"": "cpu"}}
    if len(gpus) == 1:
        return {"device_map": {"": "cuda:0"}}

    byte_limits = {}
    for number, gpu_bytes in enumerate(gpus):
        byte_limits[number] = int(gpu_bytes * WEIGHTS_SHARE_OF_GPU)
    return {"device_map": "sequential", "max_memory": byte_limits}


def place_package(folder: Path) -> dict[str, str] | None:
    """Choose the device of each part of a package, as Kaggle's kernel does; None where one device holds it all."""
    gpus = list_gpus()
    if len(gpus) < 2:
        return None

    # A model over several GPUs is no faster: they compute one after the other.
    byte_limit = int(min(gpus) * WEIGHTS_SHARE_OF_GPU)
    sizes = weight_sizes(folder)
    weight_bytes = sum(size_bytes for size_bytes, _ in sizes.values())
    if weight_bytes <= byte_limit:
        return None

    devices = [f"cuda:{number}" for number in range(len(gpus))]
    return split_over(folder, devices, byte_limit)
