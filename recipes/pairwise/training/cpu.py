"""Training without a GPU: what Axolotl and its launcher get wrong there, put right before they start."""

import os

import torch

from recipes.pairwise.training import deepspeed_cpu

BEHIND_CPU = 11  # in the order in which torch.load asks where to put things; the CPU itself has 10


def prepare(cfg: dict) -> None:
    """Set up this process, and Axolotl's configuration, for training on CPUs."""
    # Axolotl takes `bf16: auto` on a CPU for fp16, in which the first step ends in NaN.
    cfg["bf16"] = False
    cfg["fp16"] = False
    # PyTorch warns of pinned memory where there is no GPU to copy it to.
    cfg["dataloader_pin_memory"] = False
    use_all_cores()

    # With several processes Axolotl asks whether GPUs reach each other's memory. Without a GPU the
    # question ends the run in PyPI's build of PyTorch, so it gets an answer that is always no.
    torch.cuda.can_device_access_peer = answer_no_peers

    # A resumed run reads its optimizer back with torch.load, which asks registered functions where to
    # put it. transformers names the process's CPU, "cpu:0", a place that no function of PyTorch knows.
    torch.serialization.register_package(BEHIND_CPU, leave_untagged, keep_on_numbered_cpu)

    if cfg.get("deepspeed"):
        deepspeed_cpu.start_group()


def leave_untagged(storage: torch.UntypedStorage) -> None:
    """Leave it to PyTorch to name the place of what torch.save writes."""


def keep_on_numbered_cpu(
    storage: torch.UntypedStorage, location: str
) -> torch.UntypedStorage | None:
    """Leave what torch.load has read where it is, if it is to be moved to a numbered CPU."""
    return storage if location.startswith("cpu:") else None


def answer_no_peers(device, peer) -> bool:
    """Stand in for torch.cuda.can_device_access_peer on a machine without a GPU."""
    return False


def place_model(cfg) -> None:
    """Have the model loaded on the CPU, before Axolotl would give each process a CUDA device."""
    # DeepSpeed places its own.
    cfg.device_map = None if cfg.get("deepspeed") else {"": "cpu"}


def use_all_cores() -> None:
    """Give a single process every core: accelerate's launcher sets OMP_NUM_THREADS to 1 where it is unset."""
    threads = os.environ.get("OMP_NUM_THREADS")
    processes = os.environ.get("WORLD_SIZE", "1")
    if threads == "1" and processes == "1":
        # macOS does not say which cores a process may use.
        has_affinity = hasattr(os, "sched_getaffinity")
        cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count()
        torch.set_num_threads(cores)
