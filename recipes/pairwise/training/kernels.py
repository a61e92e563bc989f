"""Kernels for GPUs that compute several layers as one: Axolotl's for LoRA, and Liger's. The plugin chooses them for a run."""

import torch
from peft import PeftModel

from recipes.pairwise.processes import LOG
from recipes.pairwise.training.zero3 import is_zero3

# The layers that each kernel takes together: all of them must have an adapter.
LAYERS_OF_KERNELS = {
    "lora_qkv_kernel": ("q_proj", "k_proj", "v_proj"),
    "lora_o_kernel": ("o_proj",),
    "lora_mlp_kernel": ("gate_proj", "up_proj", "down_proj"),
}

LIGER = "axolotl.integrations.liger.LigerPlugin"
LIGER_LAYERS = ("liger_rms_norm", "liger_rope", "liger_glu_activation")

# Model types whose attention Axolotl knows how to rewrite, each compared with PEFT's own layers in
# tests/recipes/training/test_kernels.py.
MODEL_TYPES = ("gemma2", "llama", "mistral", "qwen2", "qwen3")


def turn_on_liger(cfg: dict) -> None:
    """Turn on Liger's layers on a GPU where the recipe names its plugin; a key that the recipe sets stays."""
    if LIGER in cfg["plugins"] and torch.cuda.is_available():
        for key in LIGER_LAYERS:
            cfg.setdefault(key, True)


def choose_lora_kernels(cfg: dict, model_type: str) -> None:
    """Turn on Axolotl's kernels for LoRA, but for those that the run cannot use or the recipe turns off.

    A kernel is code for the GPU that computes several layers with their adapters at once, which is faster.
    """
    obstacle = find_obstacle(cfg, model_type)
    if obstacle is not None and cfg.get("adapter"):
        LOG.info("LoRA kernels: off, %s", obstacle)

    # A kernel is for all layers of its kind, e.g. the three of an MLP: the adapter must be on each.
    adapted_layers = cfg.get("lora_target_modules") or ()
    for kernel, layers in LAYERS_OF_KERNELS.items():
        is_possible = obstacle is None and set(layers).issubset(adapted_layers)
        is_turned_off = cfg.get(kernel) is False
        cfg[kernel] = is_possible and not is_turned_off

    # No recipe adapts embeddings. Without this, Axolotl would turn their kernel on.
    cfg["lora_embedding_kernel"] = False
    if obstacle is None:
        let_classifiers_pass()


def find_obstacle(cfg: dict, model_type: str) -> str | None:
    """Return why a run can use none of Axolotl's kernels for LoRA; None where it can use them."""
    if not cfg.get("adapter"):
        return "there is no adapter"
    if not torch.cuda.is_available():
        return "there is no GPU"
    if model_type not in MODEL_TYPES:
        return f"they are not made for {model_type}"
    if is_zero3(cfg.get("deepspeed")):
        return "under ZeRO-3 the weights that they read are on other GPUs"
    if cfg.get("fsdp_config") or cfg.get("load_in_8bit"):
        return "they are not made for FSDP, or for a base in 8 bits"
    return None


def let_classifiers_pass() -> None:
    """Have Axolotl put its kernels on classifiers too: it insists on a causal LM, and reads nothing that they lack."""
    from axolotl.monkeypatch import lora_kernels  # noqa: PLC0415  imports triton, which needs Linux

    lora_kernels.PeftModelForCausalLM = PeftModel
