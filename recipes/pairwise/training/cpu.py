"""Training without a GPU: what Axolotl and its launcher get wrong there, put right by the plugin before they start."""

import os

import torch

from recipes.pairwise.training import deepspeed_cpu


def prepare(cfg: dict) -> None:
    """Set up this process for training on CPUs: float32, all cores, and DeepSpeed's process group where it is asked for."""
    # Axolotl takes `bf16: auto` on a CPU for fp16, in which the first step ends in NaN.
    cfg["bf16"] = cfg["fp16"] = False
    # PyTorch warns of pinned memory where there is no GPU to copy it to.
    cfg["dataloader_pin_memory"] = False
    use_all_cores()
    torch.cuda.can_device_access_peer = no_gpu_has_peers
    if cfg.get("deepspeed"):
        deepspeed_cpu.start_group()


def place_model(cfg) -> None:
    """Have the model loaded on the CPU, just before Axolotl would give each process a CUDA device; DeepSpeed places its own."""
    cfg.device_map = None if cfg.get("deepspeed") else {"": "cpu"}


def use_all_cores() -> None:
    """Give a single process every core: accelerate's launcher sets OMP_NUM_THREADS to 1 where it is unset, GPU or not."""
    if os.environ.get("OMP_NUM_THREADS") == "1" and os.environ.get("WORLD_SIZE", "1") == "1":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(cores)


def no_gpu_has_peers(device, peer) -> bool:
    """Answer for torch.cuda.can_device_access_peer on a machine without a GPU, where Axolotl asks it in several processes.

    PyTorch's own raises: in a build without CUDA an AssertionError, which Axolotl lets pass, in one with CUDA (PyPI's) a
    RuntimeError, which ends the run.
    """
    return False
