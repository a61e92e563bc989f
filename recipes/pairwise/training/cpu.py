"""Training without a GPU: what Axolotl and its launcher get wrong there, put right before they start."""

import os

import torch

from recipes.pairwise.training import deepspeed_cpu


def prepare(cfg: dict) -> None:
    """Set up this process for training on CPUs: float32, all cores, DeepSpeed's process group."""
    # Axolotl takes `bf16: auto` on a CPU for fp16, in which the first step ends in NaN.
    cfg["bf16"] = False
    cfg["fp16"] = False
    # PyTorch warns of pinned memory where there is no GPU to copy it to.
    cfg["dataloader_pin_memory"] = False
    use_all_cores()

    # Axolotl asks this in several processes. PyTorch's own raises without a GPU: in a build without
    # CUDA an AssertionError, which Axolotl lets pass, in PyPI's a RuntimeError, which ends the run.
    torch.cuda.can_device_access_peer = answer_no_peers
    if cfg.get("deepspeed"):
        deepspeed_cpu.start_group()


def answer_no_peers(device, peer) -> bool:
    """Stand in for torch.cuda.can_device_access_peer on a machine without a GPU."""
    return False


def place_model(cfg) -> None:
    """Have the model loaded on the CPU, before Axolotl would give each process a CUDA device."""
    # DeepSpeed places its own.
    cfg.device_map = None if cfg.get("deepspeed") else {"": "cpu"}


def use_all_cores() -> None:
    """Give a single process every core.

    accelerate's launcher sets OMP_NUM_THREADS to 1 where it is unset, GPU or not.
    """
    threads = os.environ.get("OMP_NUM_THREADS")
    processes = os.environ.get("WORLD_SIZE", "1")
    if threads == "1" and processes == "1":
        torch.set_num_threads(count_cores())


def count_cores() -> int:
    """Count the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()
